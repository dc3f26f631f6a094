"""What the next rounds do, decided by what the last ones brought: how rows decode, what missed rows
verify, how far the draft drafts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from ...decoding.text.ngram import NgramIndex, NgramRounds
from ...request.methods import Method
from ..round.verdict import Commit, Verdict
from ..verifier.sequence import Sequence
from .fallback import FallbackChoice
from .governor import NAMED_MEMORY, Arm, Governor, Mean, Round
from .lookahead import LookaheadChooser
from .pace import Pace

SPECULATIVE: tuple[Literal["sd", "ssd"], ...] = ("sd", "ssd")


class Steering:
    """Of one verifier.

    Args:
        governed: decode by the fastest arm, plainly if speculation does not pay. ngram: whether missed
            rows may take n-grams; jit: whether they may wait for the draft instead.
        lookaheads: to choose from, ascending; a single one is no choice.
    """

    def __init__(self, *, governed: bool, ngram: bool, jit: bool, lookaheads: tuple[int, ...]):
        self._governed, self._jit, self._lookaheads = governed, jit, lookaheads
        self.fallback = FallbackChoice() if ngram else None
        self._named_means = {method: Mean(NAMED_MEMORY) for method in SPECULATIVE}
        self._governors = self._new_governors()
        self._by_slots = {0: self._governors}
        several = len(lookaheads) > 1
        self._depths: dict[Method, LookaheadChooser] = (
            {method: LookaheadChooser(lookaheads) for method in SPECULATIVE} if several else {}
        )
        self._forward_s: dict[int, Mapping[int, float]] = {}
        self._named: set[int] = set()

    def _new_governors(self) -> dict[Method, Governor]:
        return {method: Governor(method, named=self._named_means[method]) for method in SPECULATIVE}

    def calibrate(self, slots: int, plain_s: float, forward_s: Mapping[int, float]) -> None:
        """Where plain rounds are not padded: how long a plain forward of so many slots takes, and one of each
        lookahead."""
        self.ran(slots)
        for governor in self._governors.values():
            governor.share = min(1.0, plain_s / forward_s[self._lookaheads[-1]])
        self._forward_s[slots] = forward_s

    def ran(self, slots: int) -> None:
        """The last forward was of so many. What is fastest for one slot need not be for several: each number has
        governors of its own."""
        if slots not in self._by_slots:
            self._by_slots[slots] = self._new_governors()
        self._governors = self._by_slots[slots]
        if slots in self._forward_s:
            for chooser in self._depths.values():
                chooser.forward_ratio = self._forward_s[slots]

    def start(self, row: Sequence) -> None:
        """The row decodes from now on."""
        if row.method in self._governors and (self.fallback is not None or self._governed):
            row.ngrams = NgramRounds(NgramIndex([*row.tokens, row.root]), self._lookaheads[-1])

    def arm(self, row: Sequence, *, drafting: bool = True) -> Arm:
        """How a row decodes now. ``drafting``: whether there is a draft."""
        governor = self._governors.get(row.method)
        if governor is None:
            return "none"
        if not self._governed:
            return governor.method if drafting else "none"
        if not drafting:
            return governor.undrafted
        return "ngram" if governor.speculating and not row.pace.drafted else governor.arm

    def name(self, slot: int) -> None:
        """The slot's next candidates are an n-gram."""
        self._named.add(slot)
        if self.fallback is not None:
            self.fallback.sources[slot] = "ngram"

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
            row, method = commit.sequence, commit.sequence.method
            if commit.drafted and commit.slot not in self._named and (chooser := self._depths.get(method)) is not None:
                chooser.learn(commit.depth, commit.drafted)
            if row.ngrams is not None:
                rounds = row.ngrams.extend(commit.tokens)
                self._governors[method].named(len(commit.tokens), rounds)
        self._named.clear()
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
        if governor is None or not self._governed:
            return
        tokens = sum(len(commit.tokens) for commit in verdict.commits)
        if governor.speculating and rows > 1:
            self._set_paces(verdict.commits, tokens / seconds, governor.missed_s)
        elif not (row := verdict.commits[0].sequence).pace.drafted:
            row.pace = Pace()  # alone, it costs nobody anything
        wide = any(commit.drafted for commit in verdict.commits)
        spent = {"seconds": seconds, "waited_s": waited_s, "missed_s": missed_s}
        governor.observe(Round(tokens=tokens, rows=rows, wide=wide, forward_s=verdict.forward_s, **spent))

    def _set_paces(self, commits: list[Commit], batch_rate: float, wait_s: float) -> None:
        paces = [commit.sequence.pace for commit in commits]
        hits = [1.0 - pace.misses if pace.drafted else 1.0 for pace in paces]
        for number, (commit, pace) in enumerate(zip(commits, paces, strict=True)):
            pace.observe(
                tokens=len(commit.tokens),
                missed=commit.sequence.waited,
                others_hit=math.prod(hits[:number] + hits[number + 1 :]),
                wait_s=wait_s,
                batch_rate=batch_rate,
            )
