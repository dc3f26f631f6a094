"""The arguments of the attention operators, in the order of their schema."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionInputs(NamedTuple):
    """Rows of B sequences and everything they attend.

    A row attends the main slots from its start up to its limit, the scratch slots its mask shows, and itself.
    """

    query: Tensor
    """``[B, H, R, D]``."""
    main_keys: Tensor
    """``[B, H_kv, T, D]``."""
    main_values: Tensor
    scratch_keys: Tensor | None
    """``[B, H_kv, X, D]``, or None where no row attends scratch slots."""
    scratch_values: Tensor | None
    own_keys: Tensor
    """``[B, H_kv, R, D]``: each row's own key, which it always attends."""
    own_values: Tensor
    limits: Tensor
    """``[B, R]`` int64."""
    mask: Tensor | None
    """``[R, X]`` or ``[B, R, X]`` bool."""
    scale: float
    """Factor on the scores."""
    softcap: float
    """Scores become ``softcap · tanh(score / softcap)``; 0 leaves them."""
    starts: Tensor | None = None
    """``[B, R]`` int64: the first main slot each row attends (sliding windows, chunks); None for slot 0."""
    sinks: Tensor | None = None
    """``[H]``: a score of each head that takes its share of the weights and has no value (GPT-OSS)."""

    @property
    def scratch(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Scratch keys, scratch values and their mask, if there are any."""
        if self.scratch_keys is None or self.scratch_values is None or self.mask is None:
            return None
        return self.scratch_keys, self.scratch_values, self.mask


SCHEMA = (
    "(Tensor query, Tensor main_keys, Tensor main_values, Tensor? scratch_keys, Tensor? scratch_values, "
    "Tensor own_keys, Tensor own_values, Tensor limits, Tensor? mask, float scale, float softcap, Tensor? starts, "
    "Tensor? sinks) -> Tensor"
)
