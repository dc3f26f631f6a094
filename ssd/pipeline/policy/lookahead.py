"""How far to draft: the lookahead K with the most expected tokens per second, estimated from recent rounds.

With ``a_i`` the chance that depth i is accepted given depth i - 1 was, a round of lookahead K brings

    E(K) = 1 + Σ_{i<=K} Π_{j<=i} a_j    tokens in    T(K) = rest + max(forward(K), draft(K)) + wait(K)

seconds. Draft and verifier work side by side, then the verifier waits for the rows that missed. Acceptance is measured
by position instead of assumed to be α^i, because real acceptance falls with depth (SmartSpec's goodput, arXiv
2406.14066; SGLang's tiers). What was not observed recently is extrapolated: a position accepts like the one above it,
and the time of drafting is proportional to its steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...decoding.averages import DecayingRatio

TIERS = (1, 2, 3, 5, 7, 11, 16)
"""Lookaheads to choose from. There are few because each is another compiled shape."""
START = 3
"""Lookahead before anything is known."""
MEMORY = 256
"""Rounds after which an observation has lost 1 - 1/e of its weight."""
PRIOR_ACCEPTANCE, PRIOR_ROUNDS = 0.6, 4.0
"""Assumed acceptance of a position, and how many observations the assumption is worth."""
MARGIN = 0.03
"""Hysteresis: another lookahead must be faster by this share."""
DWELL = 24
"""Least number of rounds between two changes."""


def lookahead_tiers(deepest: int) -> tuple[int, ...]:
    """Lookaheads to choose from, ascending; ``deepest`` is the last of them."""
    return (*(tier for tier in TIERS if tier < deepest), deepest)


def first_lookahead(tiers: Sequence[int]) -> int:
    """The tier to start with."""
    return max((tier for tier in tiers if tier <= START), default=tiers[0])


class LookaheadChooser:
    """Chooses one tier for a whole batch.

    Args:
        tiers: ascending, as from :func:`lookahead_tiers`.
        forward_s: seconds of a verification at each tier, where its rows depend on the tier.
    """

    def __init__(self, tiers: Sequence[int], forward_s: Mapping[int, float] | None = None):
        self.tiers, self.current = tuple(tiers), first_lookahead(tiers)
        self.changes = 0
        self.forward_ratio = forward_s or dict.fromkeys(tiers, 1.0)
        self._accepts = [DecayingRatio(MEMORY) for _ in range(self.tiers[-1])]
        self._forward, self._rest = DecayingRatio(MEMORY), DecayingRatio(MEMORY)
        self._draft = {tier: DecayingRatio(MEMORY) for tier in tiers}
        self._wait = {tier: DecayingRatio(MEMORY) for tier in tiers}
        self._since = 0

    def learn(self, depth: int, drafted: int) -> None:
        """Take in a row that accepted ``depth`` of its ``drafted`` candidates."""
        for position in range(min(depth + 1, drafted, len(self._accepts))):
            self._accepts[position].add(float(position < depth))

    def observe(self, *, seconds: float, forward_s: float, draft_s: float, wait_s: float) -> None:
        """Take in the times of a round at ``current``. ``current`` may change.

        Args:
            seconds: of the whole round.
            forward_s: of its forward.
            draft_s: of the draft's work beside the forward.
            wait_s: of the wait for rows that missed.
        """
        self._forward.add(forward_s / self.forward_ratio[self.current])
        self._draft[self.current].add(draft_s)
        self._wait[self.current].add(wait_s)
        self._rest.add(max(0.0, seconds - max(forward_s, draft_s) - wait_s))
        self._since += 1
        if self._since >= DWELL:
            rates = self.rates()
            best = max(self.tiers, key=lambda tier: (rates[tier], -tier))
            if rates[best] > rates[self.current] * (1 + MARGIN):
                self.current, self._since = best, 0
                self.changes += 1
        for each in (*self._accepts, self._forward, self._rest, *self._draft.values(), *self._wait.values()):
            each.fade()

    def rates(self) -> dict[int, float]:
        """Expected tokens per second of a row, by lookahead."""
        draft_s, wait_s = self._draft[self.current].value or 0.0, self._wait[self.current].value or 0.0
        rates, tokens, reached, acceptance, depth = {}, 1.0, 1.0, PRIOR_ACCEPTANCE, 0
        for tier in self.tiers:
            while depth < tier:
                acceptance = self._accepts[depth].towards(acceptance, PRIOR_ROUNDS)
                reached *= acceptance
                tokens += reached
                depth += 1
            # Drafting is a glue forward and K steps; after a miss it is K steps.
            draft = self._draft[tier].towards(draft_s * (tier + 1) / (self.current + 1), PRIOR_ROUNDS)
            wait = self._wait[tier].towards(wait_s * tier / self.current, PRIOR_ROUNDS)
            forward = (self._forward.value or 0.0) * self.forward_ratio[tier]
            rates[tier] = tokens / max((self._rest.value or 0.0) + max(forward, draft) + wait, 1e-9)
        return rates
