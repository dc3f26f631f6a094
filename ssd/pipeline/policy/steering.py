"""What the next rounds do, decided by what recent rounds brought: how each sequence decodes, what it verifies after a
miss, how far the draft drafts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...decoding.averages import DecayingRatio
from ...decoding.text.ngram import NgramIndex, NgramRounds
from ...request.methods import WITH_DRAFT, Method
from ..round.roles import Arm, Roles
from ..round.round import Round
from ..round.verdict import Commit, Verdict
from .fallback import FallbackChoice
from .governor import NGRAM_MEMORY, Governor, RoundResult
from .lookahead import LookaheadChooser
from .pace import Pace


@dataclass(slots=True)
class _Row:
    """What is known about one request."""

    method: Method
    pace: Pace = field(default_factory=Pace)
    ngrams: NgramRounds | None = None
    """An index of its tokens, where candidates may come from them. None until it decodes."""


class Steering:
    """The policy of one verifier.

    Args:
        governed: decode by the fastest arm, plainly if speculation does not pay.
        ngram: missed rows may take n-grams.
        jit: missed rows may wait for the draft.
        lookaheads: K to choose from, ascending. A single one leaves no choice.
    """

    def __init__(self, *, governed: bool, ngram: bool, jit: bool, lookaheads: tuple[int, ...]):
        self._governed, self._jit, self._lookaheads = governed, jit, lookaheads
        self._fallback = FallbackChoice() if ngram else None
        self._ngram_tokens = {method: DecayingRatio(NGRAM_MEMORY) for method in WITH_DRAFT}
        self._governors = self._new_governors()
        self._by_slots = {0: self._governors}
        several = len(lookaheads) > 1
        self._depths: dict[Method, LookaheadChooser] = (
            {method: LookaheadChooser(lookaheads) for method in WITH_DRAFT} if several else {}
        )
        self._forward_s: dict[int, Mapping[int, float]] = {}
        self._rows: dict[int, _Row] = {}

    def _new_governors(self) -> dict[Method, Governor]:
        return {method: Governor(method, ngram_tokens=self._ngram_tokens[method]) for method in WITH_DRAFT}

    def calibrate(self, slots: int, plain_s: float, forward_s: Mapping[int, float]) -> None:
        """Set what forwards cost where plain rounds are not padded.

        Args:
            slots: sequences in the forward.
            plain_s: seconds of a plain forward.
            forward_s: seconds of a verification, by lookahead.
        """
        self._switch(slots)
        for governor in self._governors.values():
            governor.share = min(1.0, plain_s / forward_s[self._lookaheads[-1]])
        self._forward_s[slots] = forward_s

    def _switch(self, slots: int) -> None:
        """Use the governors of this number of slots: what is fastest for one need not be fastest for several."""
        if slots not in self._by_slots:
            self._by_slots[slots] = self._new_governors()
        self._governors = self._by_slots[slots]
        if slots in self._forward_s:
            for chooser in self._depths.values():
                chooser.forward_ratio = self._forward_s[slots]

    def roles(self, requests: Sequence[tuple[int, Method] | None], *, drafting: bool) -> Roles:
        """The roles of the next round. Requests that are not listed are forgotten.

        Args:
            requests: ``[B]``, number and method of the request in each slot.
            drafting: whether there is a draft.
        """
        known, self._rows = self._rows, {}
        arms: list[Arm] = []
        for entry in requests:
            if entry is None:
                arms.append("none")
                continue
            request, method = entry
            row = known.get(request)
            if row is None or row.method != method:
                row = _Row(method)
            self._rows[request] = row
            arms.append(self._arm(row, drafting))
        return Roles(tuple(arms))

    def _arm(self, row: _Row, drafting: bool) -> Arm:
        governor = self._governors.get(row.method)
        if governor is None:
            return "none"
        if not self._governed:
            return governor.method if drafting else "none"
        if not drafting:
            return governor.undrafted
        return "ngram" if governor.speculating and not row.pace.drafted else governor.arm

    def start(self, request: int, tokens: Iterable[int]) -> None:
        """The request decodes from now on. ``tokens``: all its certain ones."""
        row = self._rows[request] = _Row(self._rows[request].method)
        if row.method in self._governors and (self._fallback is not None or self._governed):
            row.ngrams = NgramRounds(NgramIndex(tokens), self._lookaheads[-1])

    def propose(self, request: int) -> list[int]:
        """An n-gram that may come next in the request's text, as deep as the tree; empty if there is none."""
        ngrams = self._rows[request].ngrams
        return ngrams.index.propose(self._lookaheads[-1]) if ngrams is not None else []

    @property
    def ngram(self) -> bool:
        """Whether rows that miss now take an n-gram where there is one."""
        return self._fallback is not None and (not self._jit or self._fallback.ngram)

    def lookahead(self, methods: set[Method]) -> int:
        """K of what the draft drafts next. ``methods``: of all sequences that decode. In a mixed batch, ``ssd``'s."""
        if not self._depths:
            return self._lookaheads[-1]
        return self._depths["sd" if "sd" in methods and "ssd" not in methods else "ssd"].current

    def learn(self, commits: Iterable[Commit], *, slots: int, forward_s: float) -> None:
        """Take in the outcomes of a verification.

        Args:
            slots: sequences in its forward.
            forward_s: seconds it took.
        """
        self._switch(slots)
        for commit in commits:
            if commit.drafted and commit.origin != "ngram" and (chooser := self._depths.get(commit.method)) is not None:
                chooser.learn(commit.depth, commit.drafted)
            if (ngrams := self._rows[commit.request].ngrams) is not None:
                rounds = ngrams.extend(commit.tokens)
                self._governors[commit.method].count_ngrams(len(commit.tokens), rounds)
            if self._fallback is not None and commit.origin in ("jit", "ngram"):
                self._fallback.served(commit.origin, commit.depth + 1, forward_s)

    def waited(self, seconds: float) -> None:
        """Rows that missed waited this long for candidates drafted on demand."""
        if self._fallback is not None:
            self._fallback.waited(seconds)

    def observe(
        self, following: Round, verdict: Verdict, *, seconds: float, waited_s: float, draft_s: float, jit_s: float
    ) -> None:
        """Take in how long a round took.

        Args:
            following: the round after it.
            seconds: of the whole round.
            waited_s: of those, waiting for the draft.
            draft_s: the draft's time for its speculation set, beside the forward.
            jit_s: of ``waited_s``, for candidates drafted after misses.
        """
        commits = verdict.commits
        methods: set[Method] = {commit.method for commit in commits}
        # A mixed batch says little about any one method, and so does a row for which nothing could be prepared.
        if len(methods) != 1 or any(commit.request in following.behind for commit in commits):
            return
        method, rows = methods.pop(), len(commits)
        governor, chooser = self._governors.get(method), self._depths.get(method)
        if chooser is not None and all(commit.drafted for commit in commits):
            chooser.observe(seconds=seconds, forward_s=verdict.forward_s, draft_s=draft_s, wait_s=jit_s)
        if governor is None or not self._governed:
            return
        tokens = sum(len(commit.tokens) for commit in commits)
        if governor.speculating and rows > 1:
            self._set_paces(commits, following.waiting, tokens / seconds, governor.missed_s)
        elif not (row := self._rows[commits[0].request]).pace.drafted:
            row.pace = Pace()  # alone, it costs nobody anything
        wide = any(commit.drafted for commit in commits)
        spent = {"seconds": seconds, "waited_s": waited_s, "missed_s": jit_s}
        governor.observe(RoundResult(tokens=tokens, rows=rows, wide=wide, forward_s=verdict.forward_s, **spent))

    def _set_paces(self, commits: list[Commit], waiting: tuple[int, ...], batch_rate: float, wait_s: float) -> None:
        paces = [self._rows[commit.request].pace for commit in commits]
        hits = [1.0 - pace.misses if pace.drafted else 1.0 for pace in paces]
        for number, (commit, pace) in enumerate(zip(commits, paces, strict=True)):
            pace.observe(
                tokens=len(commit.tokens),
                missed=commit.slot in waiting,
                others_hit=math.prod(hits[:number] + hits[number + 1 :]),
                wait_s=wait_s,
                batch_rate=batch_rate,
            )
