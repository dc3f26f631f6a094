"""What a round decided."""

from __future__ import annotations

from dataclasses import dataclass

from ...decoding.logprobs import Logprobs
from ...request.methods import Method
from ...request.output import FinishReason, SpeculationRecord
from .candidates import CandidateOrigin
from .frames import Next, OutcomeFrame, RowState


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What a round made certain for one request."""

    request: int
    method: Method
    slot: int
    tokens: list[int]
    accepted: int
    """How many of the tokens were drafted."""
    depth: int
    """Drafted tokens that the round accepted, before any cut."""
    drafted: int
    """Depth of the candidates that were verified."""
    origin: CandidateOrigin
    hit: bool | None
    finished: FinishReason | None
    error: str | None
    """Why, where the reason is ``error``."""
    logprobs: Logprobs | None
    record: SpeculationRecord
    """Of the whole request so far."""
    cached: int
    """Prompt tokens whose keys were found, not computed."""
    started_s: float
    """When the prompt was complete, on the verifier's clock."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The outcomes of a round, and what the draft does next."""

    nodes: list[int]
    """``[B]``, u."""
    bonus: list[int]
    """``[B]``, t."""
    states: list[int]
    """``[B]`` of ``RowState``: for the draft."""
    commits: list[Commit]
    forward_s: float
    self_draft_s: float = 0.0
    """What the verifier's own draft took before the forward (method ``self``)."""
    ngram: bool = False
    """Rows that miss now take an n-gram where there is one."""
    lookahead: int = 0
    """How far the draft drafts from now on; 0: as deep as the tree."""

    @property
    def next(self) -> Next:
        """Whether the draft takes part in the next round."""
        going_on = RowState.ACTIVE in self.states or RowState.PREFILL in self.states
        return Next.ROUND if going_on else Next.IDLE

    def outcome(self, round: int, control_count: int) -> OutcomeFrame:
        """The frame that tells the draft. Arguments as for ``OutcomeFrame``."""
        return OutcomeFrame(
            round=round,
            control_count=control_count,
            next=self.next,
            ngram=self.ngram,
            lookahead=self.lookahead,
            states=self.states,
            nodes=self.nodes,
            bonus=self.bonus,
        )
