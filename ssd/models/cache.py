"""The slot KV cache.

Every sequence owns ``main`` slots, where slot = position for all that is committed, and a few
``scratch`` slots for rows that hold no position yet (sibling candidates, draft branches).
Addresses never change; rollback is forgetting: a slot beyond a sequence's length is never
attended and is overwritten by whatever comes next.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from .device import check_cache_fits
from .rows import BLOCK


class RowStates(NamedTuple):
    """Keys or values one layer's rows may attend, handed to ``row_attention``."""

    main: Tensor
    """``[B, H_kv, T, D]``: the first T main slots."""
    scratch: Tensor | None
    """``[B, H_kv, X, D]``, or None where no row attends scratch."""
    own: Tensor
    """``[B, H_kv, R, D]``: each row's own, always attended by itself."""
    limits: Tensor
    """``[B, R]``: every row attends the main slots below its limit."""
    scratch_mask: Tensor | None
    """``[R, X]`` or ``[B, R, X]`` bool: which scratch slots."""
    sequences: Tensor | None = None
    """``[B]`` int64: which of S sequences the rows are of, if ``main`` and ``scratch`` hold S > B."""

    def picked(self) -> RowStates:
        """The same with those of the rows' sequences only: a copy."""
        if self.sequences is None:
            return self
        scratch = None if self.scratch is None else self.scratch[self.sequences]
        return self._replace(main=self.main[self.sequences], scratch=scratch, sequences=None)


class SlotCache:
    """Keys and values of B sequences: ``main_slots`` by position and ``scratch_slots`` each.

    A ``CacheView`` of it stands in for a transformers ``Cache``: ``update`` writes a forward's
    rows where they belong and returns what they attend.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        batch: int,
        main_slots: int,
        scratch_slots: int,
        dtype: torch.dtype,
        device: torch.device | str,
        head_shares: int = 1,
    ):
        text = config.get_text_config()
        heads = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) // head_shares
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.layers: int = text.num_hidden_layers
        # Whole blocks: attention walks main in blocks of BLOCK slots.
        self.capacity, self.main_slots = main_slots, -(-main_slots // BLOCK) * BLOCK
        self.scratch_slots = scratch_slots

        slots = self.main_slots + scratch_slots
        needed = 2 * self.layers * batch * heads * slots * head_dim * dtype.itemsize
        check_cache_fits(needed, slots, torch.device(device))

        def zeros(slots: int) -> list[Tensor]:
            shape = (batch, heads, slots, head_dim)
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(self.layers)]

        self.main = (zeros(self.main_slots), zeros(self.main_slots))
        self.scratch = (zeros(scratch_slots), zeros(scratch_slots))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for part in (*self.main, *self.scratch) for t in part)

    def row(self, slot: int) -> CacheView:
        """The cache of one sequence, for its prefill."""
        return CacheView(
            tuple([t[slot : slot + 1] for t in part] for part in self.main),
            tuple([t[slot : slot + 1] for t in part] for part in self.scratch),
            self.capacity,
        )

    def all_rows(self) -> CacheView:
        return CacheView(self.main, self.scratch, self.capacity)

    def copy(self, source: int, slot: int, length: int) -> None:
        """The first ``length`` main slots of one sequence become another's too."""
        for part in self.main:
            for main in part:
                main[slot, :, :length] = main[source, :, :length]

    def keep(self, batch: Tensor, scratch: Tensor, position: Tensor) -> None:
        """Copy scratch slots into main slots; all arguments are ``[n]`` int64, of any device."""
        device = self.main[0][0].device
        batch, scratch, position = (index.to(device, non_blocking=True) for index in (batch, scratch, position))
        for mains, scratches in zip(self.main, self.scratch, strict=True):
            for main, side in zip(mains, scratches, strict=True):
                main[batch, :, position] = side[batch, :, scratch]


class CacheView:
    """What one forward sees of a cache; the object passed as ``past_key_values``."""

    is_compileable = False
    is_sliding: tuple[bool, ...] = ()

    def __init__(self, main: tuple, scratch: tuple, capacity: int):
        self.main, self.scratch, self.capacity = main, scratch, capacity

    def prepare(
        self,
        *,
        main_slots: Tensor,
        scratch_slots: Tensor,
        limits: Tensor,
        scratch_mask: Tensor | None,
        context: int,
        sequences: Tensor | None = None,
    ) -> None:
        """Where the rows of the coming forward go: the first ones to ``main_slots``
        ``[B, n]``, the rest to ``scratch_slots`` ``[R - n]``. What they attend: main slots below
        ``limits`` ``[B, R]`` (of the first ``context``, T) and the masked scratch slots. ``sequences`` ``[B]``:
        which they are of, if not of all."""
        self.main_slots, self.scratch_slots, self.sequences = main_slots, scratch_slots, sequences
        self.limits, self.scratch_mask, self.context = limits, scratch_mask, context

    def update(self, keys: Tensor, values: Tensor, layer: int, *_args, **_kwargs) -> tuple[RowStates, RowStates]:
        return self._write(0, keys, layer), self._write(1, values, layer)

    def _write(self, part: int, own: Tensor, layer: int) -> RowStates:
        main, side, sequences = self.main[part][layer], self.scratch[part][layer], self.sequences
        placed = self.main_slots.shape[1]
        batch = (torch.arange(own.shape[0], device=own.device) if sequences is None else sequences)[:, None]
        if placed:
            main[batch, :, self.main_slots] = own[:, :, :placed].transpose(1, 2)
        if placed < own.shape[2]:
            if sequences is None:
                side[:, :, self.scratch_slots] = own[:, :, placed:]
            else:
                side[batch, :, self.scratch_slots] = own[:, :, placed:].transpose(1, 2)
        scratch = None if self.scratch_mask is None else side
        return RowStates(main[:, :, : self.context], scratch, own, self.limits, self.scratch_mask, sequences)

    def get_seq_length(self, *_args) -> int:
        return 0
