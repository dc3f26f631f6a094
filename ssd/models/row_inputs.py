"""The arguments of a model's forward over rows of the slot cache."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from .cache import CacheView, SlotCache
from .layers import Layers, cache_argument
from .paths import PathView
from .positions import place_positions
from .rows import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Attention = Literal["rows", "tree", "model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of one forward."""

    tokens: Tensor
    """``[B, R]`` int64."""
    lengths: Tensor
    """``[B]`` int64, L of every sequence."""
    layout: Layout
    in_place: int
    """The first rows, which are written to main slots."""
    context: int
    """T, the main slots that are looked at."""
    slots: Tensor | None = None
    """``[B]`` int64, the rows' sequences, if they are not all."""


class RowInputs(Protocol):
    """Lays rows out as a model takes them."""

    def decode(self, rows: Rows) -> dict[str, Any]:
        """Returns the keyword arguments of the model for a decode forward."""
        ...

    def prefill(self, slot: int, tokens: Tensor, start: int, layout: Layout, context: int) -> dict[str, Any]:
        """Returns the keyword arguments of the model for a chunk of one sequence's prompt.

        Args:
            slot: the sequence.
            tokens: ``[1, n]`` int64, at most as many as the layout has rows; the rest is padding.
            start: position of the first.
            layout: of the chunk.
            context: as in ``Rows``.
        """
        ...

    def rows(self, logits: Tensor, batch: int) -> Tensor:
        """Returns the logits ``[B, R, V]`` of the model's result."""
        ...


class _Arguments:
    """What both ways of laying out share."""

    def __init__(self, model: PreTrainedModel, layers: Layers):
        self._takes, self._takes_cache = set(inspect.signature(model.forward).parameters), cache_argument(model)
        if "kwargs" in self._takes:  # handed on to the text part
            self._takes |= {"position_ids"} & set(inspect.signature(model.get_decoder().forward).parameters)
        self._first, self._positioned = layers.first_position, place_positions(model)

    def given(self, tokens: Tensor, positions: Tensor, mask: Tensor, view: Any) -> dict[str, Any]:
        """Returns what the model takes of these. Tokens and positions are ``[B, R]``."""
        for embedding in self._positioned:
            embedding.positions = positions
        given = {
            "attention_mask": mask,
            "position_ids": positions + self._first if self._first else positions,
            self._takes_cache: view,
        }
        taken = {name: value for name, value in given.items() if name in self._takes}
        return {"input_ids": tokens, **taken, "use_cache": True}


class SideBySide(_Arguments):
    """A sequence's rows lie side by side, for this engine's attention functions.

    Args:
        model: of the forwards.
        layers: of the model.
        cache: where keys and values are kept.
        masked: whether the attention takes a mask over all slots of the context; otherwise it takes limits.
    """

    def __init__(self, model: PreTrainedModel, layers: Layers, cache: SlotCache, *, masked: bool):
        super().__init__(model, layers)
        self._cache, self._view, self._masked = cache, cache.all_rows(), masked

    def decode(self, rows: Rows) -> dict[str, Any]:
        return self._inputs(self._view, rows, None)

    def prefill(self, slot: int, tokens: Tensor, start: int, layout: Layout, context: int) -> dict[str, Any]:
        count, size = tokens.shape[1], len(layout.offsets)
        padded = torch.nn.functional.pad(tokens, (0, size - count))
        lengths = torch.tensor([start], device=tokens.device)
        rows = Rows(tokens=padded, lengths=lengths, layout=layout, in_place=size, context=context)
        return self._inputs(self._cache.row(slot), rows, count)

    def rows(self, logits: Tensor, batch: int) -> Tensor:
        return logits

    def _inputs(self, view: CacheView, rows: Rows, count: int | None) -> dict[str, Any]:
        lengths, layout = rows.lengths, rows.layout
        # Rows beyond the capacity are meaningless; they are written to its last slot, which no row attends.
        positions = (lengths[:, None] + layout.offsets).clamp(max=view.capacity - 1)
        limits = lengths[:, None] + layout.limits
        if self._masked:
            mask = torch.arange(rows.context, device=lengths.device) < limits[..., None]
            if layout.mask is not None:
                mask = torch.cat([mask, layout.mask.expand(len(lengths), -1, -1)], dim=-1)
        else:  # the limits replace the mask; one of four dimensions keeps transformers from making its own
            mask = torch.ones_like(limits, dtype=torch.bool)[..., None]
        view.prepare(
            positions=positions,
            in_place=rows.in_place,
            scratch_slots=layout.scratch_slots,
            limits=limits,
            scratch_mask=layout.mask,
            context=rows.context,
            sequences=rows.slots,
            count=count,
        )
        return self.given(rows.tokens, positions, mask[:, None], view)


class Unfolded(_Arguments):
    """Every row is a sequence of one token, whose keys are those of the row's path: for the model's own attention.

    The keys lie right-aligned, as in a batch padded on the left, so a row's result does not depend on its neighbours.
    Prompts are computed as transformers computes them: a chunk continues the keys before it.
    """

    def __init__(self, model: PreTrainedModel, layers: Layers, cache: SlotCache):
        super().__init__(model, layers)
        self._cache, self._view = cache, PathView(cache)

    def decode(self, rows: Rows) -> dict[str, Any]:
        lengths, layout = rows.lengths, rows.layout
        positions = (lengths[:, None] + layout.offsets).clamp(max=self._cache.capacity - 1)
        seen = self._view.prepare_rows(
            positions=positions,
            limits=lengths[:, None] + layout.limits,
            in_place=rows.in_place,
            scratch_slots=layout.scratch_slots,
            scratch_mask=layout.mask,
            sequences=rows.slots,
        )
        return self.given(rows.tokens.reshape(-1, 1), positions.reshape(-1, 1), seen, self._view)

    def prefill(self, slot: int, tokens: Tensor, start: int, layout: Layout, context: int) -> dict[str, Any]:
        count = tokens.shape[1]
        self._view.prepare_chunk(slot, start, count)
        positions = torch.arange(start, start + count, device=tokens.device)[None]
        seen = torch.ones(1, start + count, dtype=torch.int64, device=tokens.device)
        return self.given(tokens, positions, seen, self._view)

    def rows(self, logits: Tensor, batch: int) -> Tensor:
        return logits.view(batch, -1, logits.shape[-1])
