"""How a verifier decodes, as values."""

from __future__ import annotations

from dataclasses import dataclass

from ...decoding.trees.shape import TreeShape
from ...request.methods import Method


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifierOptions:
    """Derived from the configuration, the same for all requests."""

    shape: TreeShape
    """The candidate tree."""
    method: Method
    """Of requests that do not choose one."""
    jit: bool
    """Missed ``ssd`` rows wait for the draft (fallback ``jit``)."""
    ngram: bool = False
    """Missed ``ssd`` rows may take an n-gram (fallback ``ngram``)."""
    strict: bool
    """Every decode forward has the same number of rows, plain decoding too, unless fewer rows are shown to give the
    same bits (``invariance``). Otherwise plain rounds run one row per sequence."""
    governed: bool
    """Decode plainly while speculation does not pay."""
    lookaheads: tuple[int, ...]
    """K to choose from, ascending. The last one is the depth of ``shape``."""
    ends: frozenset[int]
    """End-of-text ids."""
    max_model_len: int
    """Tokens of a sequence, prompt included."""
    draft_limit: int | None = None
    """Length of a sequence from which on the draft does not speculate on it; None: it does to the end."""
    prefix_caching: bool = True
    """Reuse keys that earlier prompts left in the slots."""
