"""The slot KV cache.

Every sequence has ``main`` slots, where slot = position for everything committed, and a few
``scratch`` slots for rows without a fixed position (sibling candidates, draft branches).
Addresses never change. Rollback needs no work: a slot beyond a sequence's length is never
attended, and is overwritten later.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .device import check_cache_fits
from .layers import FULL, Attended, Layers
from .rows import BLOCK
from .states import RowPlaces, RowSteps, StateSlots


class RowStates(NamedTuple):
    """Keys or values that one layer's rows may attend; the argument of an attention function."""

    main: Tensor
    """``[B, H_kv, T, D]``: the first T main slots."""
    scratch: Tensor | None
    """``[B, H_kv, X, D]``, or None where no row attends scratch slots."""
    own: Tensor
    """``[B, H_kv, R, D]``: each row's own, which it always attends."""
    limits: Tensor
    """``[B, R]`` int64: every row attends the main slots below its limit."""
    scratch_mask: Tensor | None
    """``[R, X]`` or ``[B, R, X]`` bool: the scratch slots each row attends."""
    sequences: Tensor | None = None
    """``[B]`` int64: the sequences of the rows, where ``main`` and ``scratch`` hold more than B sequences."""
    starts: Tensor | None = None
    """``[B, R]`` int64: the first main slot each row attends, in layers with a window; None: from slot 0."""
    attends: Attended = FULL
    """What the layer attends."""
    capacity: int = 0
    """Tokens of a sequence."""

    def picked(self) -> RowStates:
        """Returns the states of the rows' sequences only: a copy, unless they are all."""
        if self.sequences is None:
            return self
        scratch = None if self.scratch is None else self.scratch[self.sequences]
        return self._replace(main=self.main[self.sequences], scratch=scratch, sequences=None)


class SlotCache:
    """Keys and values of B sequences, ``main_slots`` by position and ``scratch_slots`` each.

    A ``CacheView`` of it takes the place of a transformers ``Cache``: ``update`` writes a forward's
    rows to their slots and returns the states they attend.

    Args:
        attended: what each layer attends.
        batch: B.
        main_slots: tokens of a sequence; rounded up to whole blocks.
        scratch_slots: X.
        dtype: of keys and values.
        device: where they are kept.
        layers: what the model's layers keep.
        chain: most rows of a decode forward that go to main slots.

    Raises:
        ConfigError: it does not fit the device.
    """

    def __init__(
        self,
        attended: tuple[Attended, ...],
        *,
        batch: int,
        main_slots: int,
        scratch_slots: int,
        dtype: torch.dtype,
        device: torch.device | str,
        layers: Layers,
        chain: int = 1,
    ):
        self.layers = layers.count
        # Whole blocks: attention sums over main slots in blocks of BLOCK.
        self.capacity, self.main_slots = main_slots, -(-main_slots // BLOCK) * BLOCK
        self.scratch_slots = scratch_slots
        self.attended = attended

        slots = self.main_slots + scratch_slots
        shapes = [layers.heads.get(layer, (0, 0, 0)) for layer in range(self.layers)]
        parts = [[(heads, keys) for heads, keys, _ in shapes], [(heads, values) for heads, _, values in shapes]]
        if layers.indexers:
            parts.append(
                [(int(layer in layers.indexers), layers.indexers.get(layer, 0)) for layer in range(self.layers)]
            )
        needed = batch * slots * sum(heads * dim for part in parts for heads, dim in part) * dtype.itemsize
        check_cache_fits(needed, slots, torch.device(device))

        self.whole = tuple(
            [torch.zeros(batch, heads, slots, dim, dtype=dtype, device=device) for heads, dim in part] for part in parts
        )
        """By part (keys, values, and keys of indexers if there are any) and layer: main slots, then scratch slots."""
        self.main = tuple([whole[:, :, : self.main_slots] for whole in part] for part in self.whole)
        self.scratch = tuple([whole[:, :, self.main_slots :] for whole in part] for part in self.whole)
        self.states = None
        if (recurrent := layers.recurrent) is not None:  # the state before a chain, and one after each of its rows
            self.states = StateSlots(recurrent, batch=batch, ring=chain + 1, scratch=scratch_slots, device=device)
        self.scratch_positions = torch.zeros(batch, scratch_slots, dtype=torch.int64, device=device)
        """Positions of the scratch slots' tokens: windows hide those that lie too far before a row."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        kept = 0 if self.states is None else self.states.nbytes
        return kept + sum(t.nbytes for part in self.whole for t in part)

    def row(self, slot: int) -> CacheView:
        """Returns the view of one sequence, for its prefill."""
        return CacheView(
            tuple([t[slot : slot + 1] for t in part] for part in self.main),
            tuple([t[slot : slot + 1] for t in part] for part in self.scratch),
            self,
            slot,
        )

    def all_rows(self) -> CacheView:
        """Returns the view of all sequences."""
        return CacheView(self.main, self.scratch, self)

    def copy(self, source: int, slot: int, length: int) -> None:
        """Copies the first ``length`` main slots of sequence ``source`` to sequence ``slot``; at most all there are."""
        for part in self.main:
            for main in part:
                main[slot, :, :length] = main[source, :, :length]

    def keep(self, batch: Tensor, scratch: Tensor, position: Tensor) -> None:
        """Copies scratch slots to main slots.

        Args:
            batch: ``[n]`` int64 on any device, the sequences.
            scratch: ``[n]`` likewise, the scratch slots to read.
            position: ``[n]`` likewise, the main slots to write. Out of range, torch raises IndexError on a
                CPU and fails the stream on CUDA.
        """
        device = self.main[0][0].device
        batch, scratch, position = (index.to(device, non_blocking=True) for index in (batch, scratch, position))
        for mains, scratches in zip(self.main, self.scratch, strict=True):
            for main, side in zip(mains, scratches, strict=True):
                main[batch, :, position] = side[batch, :, scratch]
        if self.states is not None:
            self.states.keep(batch, scratch, position)


class CacheView:
    """The part of a cache that one forward uses: the object passed as ``past_key_values``."""

    is_compileable = False
    is_sliding: tuple[bool, ...] = ()

    steps: RowSteps | None = None
    """How recurrent layers advance in the next forward, if there are any."""

    def __init__(self, main: tuple, scratch: tuple, cache: SlotCache, slot: int | None = None):
        self.main, self.scratch, self.capacity = main, scratch, cache.capacity
        self._attended, self._states = cache.attended, cache.states
        self._scratch_positions = cache.scratch_positions if slot is None else cache.scratch_positions[slot : slot + 1]
        self._batch = torch.arange(len(cache.scratch_positions), device=cache.scratch_positions.device)
        self._batch = self._batch if slot is None else self._batch[slot : slot + 1]
        self._narrow = sorted(set(cache.attended) - {FULL}, key=lambda one: (one.reach, one.size))
        self._reached: dict[Attended, tuple[Tensor | None, Tensor | None]] = {}

    def prepare(
        self,
        *,
        positions: Tensor,
        in_place: int,
        scratch_slots: Tensor,
        limits: Tensor,
        scratch_mask: Tensor | None,
        context: int,
        sequences: Tensor | None = None,
        count: int | None = None,
    ) -> None:
        """Sets what the next forward writes and attends.

        Args:
            positions: ``[B, R]`` int64, of the rows; the first rows' are also their main slots.
            in_place: n, the rows that are written to main slots.
            scratch_slots: ``[R - n]`` int64, the slots of the other rows.
            limits: ``[B, R]`` int64; a row attends the main slots below its limit.
            scratch_mask: as in ``RowStates``.
            context: T, the main slots that are looked at; no limit exceeds it.
            sequences: ``[B]`` int64, the rows' sequences, if they are not all.
            count: the first rows that are tokens, where the rest is padding.
        """
        self.main_slots, self.scratch_slots, self.sequences = positions[:, :in_place], scratch_slots, sequences
        self.limits, self.scratch_mask, self.context = limits, scratch_mask, context
        self._reached = {FULL: (None, scratch_mask)}
        if not self._narrow and self._states is None:
            return
        held = self._scratch_positions
        if in_place < positions.shape[1]:
            if sequences is None:
                held[:, scratch_slots] = positions[:, in_place:]
            else:
                held[sequences[:, None], scratch_slots] = positions[:, in_place:]
        for one in self._narrow:
            starts, mask = one.starts(positions), scratch_mask
            if mask is not None:
                mask = mask & ((held if sequences is None else held[sequences])[:, None] >= starts[..., None])
            self._reached[one] = starts, mask
        if self._states is not None:
            places = RowPlaces(
                positions=positions,
                limits=limits,
                in_place=in_place,
                scratch_slots=scratch_slots,
                scratch_mask=scratch_mask,
                scratch_positions=held if sequences is None else held[sequences],
                count=count,
            )
            self.steps = RowSteps(self._states, self._batch if sequences is None else sequences, places)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_args, **_kwargs) -> tuple[RowStates, RowStates]:
        """Writes a layer's keys and values, ``[B, H_kv, R, D]`` each; returns what the rows attend of both.

        Slots hold finite values only: a slot that a row does not attend has weight 0, and 0 times NaN is NaN. What
        attends a row that is NaN still learns it, from the key."""
        return self._write(0, keys, layer), self._write(1, values, layer)

    def _write(self, part: int, own: Tensor, layer: int) -> RowStates:
        main, side, sequences = self.main[part][layer], self.scratch[part][layer], self.sequences
        kept = own.nan_to_num() if part else own
        placed = self.main_slots.shape[1]
        batch = (torch.arange(own.shape[0], device=own.device) if sequences is None else sequences)[:, None]
        if placed:
            main[batch, :, self.main_slots] = kept[:, :, :placed].transpose(1, 2)
        if placed < own.shape[2]:
            if sequences is None:
                side[:, :, self.scratch_slots] = kept[:, :, placed:]
            else:
                side[batch, :, self.scratch_slots] = kept[:, :, placed:].transpose(1, 2)
        scratch, attends = None if self.scratch_mask is None else side, self._attended[layer]
        starts, mask = self._reached[attends]
        return RowStates(
            main[:, :, : self.context], scratch, own, self.limits, mask, sequences, starts, attends, self.capacity
        )

    def get_seq_length(self, *_args) -> int:
        """Returns 0: positions and masks are given explicitly."""
        return 0
