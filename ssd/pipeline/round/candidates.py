"""Candidates: what a sequence verifies in the next round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...decoding.verify.draft_probs import DraftProbs

CandidateOrigin = Literal["none", "prepared", "jit", "ngram", "self"]
"""Where candidates come from: nowhere, the speculation set, a draft made after a miss, the sequence's own text, or
the target with layers skipped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """The token tree below a sequence's root."""

    tokens: list[int]
    """``[W - 1]``; ``ABSENT`` where there is no candidate. Never written to."""
    origin: CandidateOrigin = "none"
    drawn_from: DraftProbs | None = None
    """``[I, m]``, what each inner node's children were drawn from. None: the candidates are point masses."""
    hit: bool | None = None
    """Whether the outcome was found in the speculation set; None if it was not looked up."""
