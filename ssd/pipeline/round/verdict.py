"""What the verifier's rounds decide."""

from __future__ import annotations

from dataclasses import dataclass

from ...decoding.logprobs import Logprobs
from ...request.output import FinishReason, Origin
from ..verifier.sequence import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What a round made certain for one request."""

    request: int
    tokens: list[int]
    accepted: int
    depth: int
    """Drafted tokens the round accepted, before any cut."""
    drafted: int
    hit: bool | None
    origin: Origin
    finished: FinishReason | None
    logprobs: Logprobs | None
    sequence: Sequence
    slot: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a round decided."""

    nodes: list[int]
    """``[B]``, u."""
    bonus: list[int]
    """``[B]``, t."""
    states: list[int]
    """``[B]`` of ``RowState``: for the draft."""
    commits: list[Commit]
    forward_s: float
    ngram: bool = False
    """Rows that miss now take an n-gram where there is one."""
    lookahead: int = 0
    """How far the draft drafts from now on; 0: as deep as the tree."""
    drafted_s: float = 0.0
    """What the verifier's own draft took before (method ``self``)."""
