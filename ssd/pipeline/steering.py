"""What the next rounds do, decided by what the last ones brought: whether rows speculate, what missed
rows verify, how far the draft drafts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..decoding.lookahead import LookaheadChooser
from ..params import Method
from .fallback import FallbackChoice
from .governor import Governor, Round
from .sequence import Sequence
from .verdict import Commit, Verdict


class Steering:
    """Of one verifier.

    Args:
        governed: decode plainly while speculation does not pay. ngram: whether missed rows may take
            n-grams; jit: whether they may wait for the draft instead.
        lookaheads: to choose from, ascending; a single one is no choice.
    """

    def __init__(self, *, governed: bool, ngram: bool, jit: bool, lookaheads: tuple[int, ...]):
        self._governed, self._jit, self._lookaheads = governed, jit, lookaheads
        self.fallback = FallbackChoice() if ngram else None
        self._governors: dict[Method, Governor] = {"sd": Governor(), "ssd": Governor()}
        self._depths = self._choosers(None)

    def calibrate(self, saving_s: float, forward_s: Mapping[int, float]) -> None:
        """With ``numerics: fast``: how much shorter a plain forward is, and one of each lookahead."""
        self._governors = {method: Governor(saving_s=saving_s) for method in self._governors}
        self._depths = self._choosers(forward_s)

    def _choosers(self, forward_s: Mapping[int, float] | None) -> dict[Method, LookaheadChooser]:
        if len(self._lookaheads) == 1:
            return {}
        return {method: LookaheadChooser(self._lookaheads, forward_s) for method in self._governors}

    def speculates(self, row: Sequence) -> bool:
        """Whether the draft has a part in it."""
        governor = self._governors.get(row.method)
        return governor is not None and (governor.speculating or not self._governed)

    @property
    def ngram(self) -> bool:
        """Whether rows that miss now take an n-gram where there is one."""
        return self.fallback is not None and (not self._jit or self.fallback.ngram)

    def lookahead(self, rows: Iterable[Sequence | None]) -> int:
        """K of what the draft drafts after this round. A batch of several methods: ``ssd``'s."""
        if not self._depths:
            return self._lookaheads[-1]
        methods = {row.method for row in rows if row is not None}
        return self._depths["sd" if "sd" in methods and "ssd" not in methods else "ssd"].current

    def learn(self, commits: Iterable[Commit], forward_s: float) -> None:
        """What a verification decided, before anything follows from it."""
        for commit in commits:
            named = self.fallback is not None and self.fallback.sources.get(commit.slot) == "ngram"
            if commit.drafted and not named and (chooser := self._depths.get(commit.sequence.method)) is not None:
                chooser.learn(commit.depth, commit.drafted)
        if self.fallback is not None:
            self.fallback.learn(commits, forward_s)

    def observe(self, verdict: Verdict, *, seconds: float, waited_s: float, draft_s: float, missed_s: float) -> None:
        """How long a round took; as for ``VerifierWorker.observe``. ``missed_s``: of it, for trees
        drafted after misses."""
        methods: set[Method] = {commit.sequence.method for commit in verdict.commits}
        # A mixed batch says little about any one method, and one the draft is behind in about none.
        if len(methods) != 1 or any(commit.sequence.draft_behind for commit in verdict.commits):
            return
        method, rows = methods.pop(), len(verdict.commits)
        governor, chooser = self._governors.get(method), self._depths.get(method)
        if chooser is not None and all(commit.drafted for commit in verdict.commits):
            chooser.observe(seconds=seconds, forward_s=verdict.forward_s, draft_s=draft_s, wait_s=missed_s)
        if governor is not None and self._governed:
            tokens = sum(len(commit.tokens) for commit in verdict.commits)
            governor.observe(Round(tokens=tokens, rows=rows, seconds=seconds, waited_s=waited_s))
