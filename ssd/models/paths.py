"""The slot cache as transformers' own cache, for model code that works on keys and values itself.

Every row of a decode forward is a sequence of one token there. Its keys are those of its path: main slots, then the
scratch slots before it, then its own, by position and right-aligned. So masks, biases and relative positions that model
code computes from the place of a key are right for candidates of a tree too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .cache import SlotCache
from .states import RowPlaces, RowSteps

KEYS, VALUES, INDEXERS = 0, 1, 2


class PathView(Cache):
    """The part of a cache that one forward uses: the object passed as ``past_key_values``."""

    steps: RowSteps | None = None
    """How recurrent layers advance in the next forward, if there are any."""

    def __init__(self, cache: SlotCache):
        super().__init__(layers=[_PathLayer(self, layer) for layer in range(cache.layers)])
        self._cache, self._width = cache, cache.capacity
        self._all = torch.arange(len(cache.scratch_positions), device=cache.scratch_positions.device)
        self.past = 0
        """Keys before the first row's own."""
        self.past_positions = torch.zeros(3, 0, 0, dtype=torch.int64)
        """Their positions ``[3, B · R, past]``, in as many dimensions as multi-dimensional rotary embeddings have."""
        self._chunk: tuple[int, int, int] | None = None
        self._batch = self._slots = self._sources = self._all

    def prepare_rows(
        self,
        *,
        positions: Tensor,
        limits: Tensor,
        in_place: int,
        scratch_slots: Tensor,
        scratch_mask: Tensor | None,
        sequences: Tensor | None,
    ) -> Tensor:
        """Sets what the next decode forward writes and attends; arguments as for ``CacheView.prepare``.

        Returns:
            ``[B · R, T]`` int64: 1 where a row has a key.
        """
        cache, width = self._cache, self._width
        self._batch, self._chunk, self.past = self._all if sequences is None else sequences, None, width - 1
        held = cache.scratch_positions
        aside = (cache.main_slots + scratch_slots).expand(len(positions), -1)
        self._slots = torch.cat([positions[:, :in_place], aside], dim=1)
        held[self._batch[:, None], scratch_slots] = positions[:, in_place:]
        held = held[self._batch]

        last = positions[..., None]
        places = torch.arange(width, device=positions.device) + (last - (width - 1))
        seen = (places >= 0) & ((places < limits[..., None]) | (places == last))
        sources = places.clamp(min=0)
        self.past_positions = sources[..., :-1].flatten(0, 1).expand(3, -1, -1)
        if scratch_mask is not None:
            shown = scratch_mask.expand(*positions.shape, -1) & (held[:, None] >= limits[..., None])
            column = held[:, None] - last + (width - 1)
            column = torch.where(shown & (column >= 0) & (column < width - 1), column, width)  # or beyond the end
            slots = torch.arange(cache.main_slots, cache.main_slots + cache.scratch_slots, device=positions.device)
            sources = torch.nn.functional.pad(sources, (0, 1)).scatter(-1, column, slots.expand_as(column))[..., :-1]
            seen = torch.nn.functional.pad(seen, (0, 1)).scatter(-1, column, True)[..., :-1]
        self._sources = sources
        if cache.states is not None:
            places = RowPlaces(
                positions=positions,
                limits=limits,
                in_place=in_place,
                scratch_slots=scratch_slots,
                scratch_mask=scratch_mask,
                scratch_positions=held,
                count=None,
            )
            self.steps = RowSteps(cache.states, self._batch, places)
        return seen.flatten(0, 1).to(torch.int64)

    def prepare_chunk(self, slot: int, start: int, count: int) -> None:
        """Sets that the next forward continues one sequence by ``count`` tokens from position ``start`` on."""
        self._chunk, self.past = (slot, start, count), start
        self.past_positions = torch.arange(start, device=self._all.device).expand(3, 1, -1)
        if self._cache.states is None:
            return
        positions = torch.arange(start, start + count, device=self._all.device)[None]
        places = RowPlaces(
            positions=positions,
            limits=positions,
            in_place=count,
            scratch_slots=self._all[:0],
            scratch_mask=None,
            scratch_positions=self._cache.scratch_positions[slot : slot + 1],
            count=count,
        )
        self.steps = RowSteps(self._cache.states, self._all[slot : slot + 1], places)

    def attended(self, part: int, layer: int, own: Tensor) -> Tensor:
        """Writes a layer's keys or values ``[B · R, H_kv, 1, D]`` and returns those of the rows' paths,
        ``[B · R, H_kv, T, D]``. In a chunk: ``[1, H_kv, n, D]`` and ``[1, H_kv, start + n, D]``."""
        whole = self._cache.whole[part][layer]
        kept = own.nan_to_num() if part == VALUES else own
        if self._chunk is not None:
            slot, start, count = self._chunk
            whole[slot, :, start : start + count] = kept[0]
            return torch.cat([whole[slot : slot + 1, :, :start], own], dim=2)
        batch, rows = self._slots.shape
        whole[self._batch[:, None], :, self._slots] = kept.view(batch, rows, *kept.shape[1::2])
        heads = torch.arange(whole.shape[1], device=own.device)
        states = whole[self._batch[:, None, None, None], heads[:, None], self._sources[:, :, None]].flatten(0, 1)
        states[:, :, -1] = own[:, :, 0]
        return states


class _PathLayer(CacheLayerMixin):
    """A layer of a ``PathView``."""

    is_sliding = False

    def __init__(self, view: PathView, layer: int):
        super().__init__()
        self._view, self._layer, self.is_initialized = view, layer, True
        self.keys = self.values = torch.zeros(0)  # what cross-attention without images finds

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: slots are allocated once."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        attended = self._view.attended
        self.keys, self.values = attended(KEYS, self._layer, key_states), attended(VALUES, self._layer, value_states)
        return self.keys, self.values

    @property
    def indexer_position_ids(self) -> Tensor | None:
        """Positions of the keys before the rows' own, ``[3, B · R, past]``; None if there are none."""
        return self._view.past_positions if self._view.past else None

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: Tensor) -> None:
        """Does nothing: positions are those of the slots."""

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        return self._view.attended(INDEXERS, self._layer, indexer_key_states[:, None])[:, 0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._view.past + query_length, 0

    def get_seq_length(self) -> int:
        return self._view.past

    def get_max_length(self) -> int:
        return -1
