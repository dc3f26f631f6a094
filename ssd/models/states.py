"""States of recurrent layers, with rollback: state-space, linear-attention and short-convolution layers.

A slot holds the state after a token as it holds the token's key: main slots by position (a short ring, since only the
last certain state is continued), scratch slots for rows without a fixed position. A row continues the state of the row
or slot before it on its path, so candidate trees and rejected rows need nothing else: what was not accepted is not
continued.

Layers advance one row at a time, by transformers' own step for one token. So a state has the same bits whatever else
was verified with its token. Only prompts are computed many rows at once, by the model's own code for prompts, where a
trial shows that it continues a state (``StateSlots.advance_together``); their last rows, one for each slot of the ring,
are steps again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers import Key, Recurrent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StateSlots:
    """The states of B sequences: by position in a ring of ``ring`` slots, and in ``scratch`` slots."""

    def __init__(self, recurrent: Recurrent, *, batch: int, ring: int, scratch: int, device: torch.device | str):
        def zeros(slots: int) -> dict[Key, Tensor]:
            return {
                key: torch.zeros(batch, slots, *state.shape, dtype=state.dtype, device=device)
                for key, state in recurrent.states.items()
            }

        self.ring, self.together = ring, False
        self.main, self.scratch = zeros(ring), zeros(max(scratch, 1))

    def advance_together(self, together: bool) -> None:
        """Sets whether the rows of a prompt advance together."""
        self.together = together

    @property
    def nbytes(self) -> int:
        return sum(states.nbytes for part in (self.main, self.scratch) for states in part.values())

    def keep(self, batch: Tensor, scratch: Tensor, position: Tensor) -> None:
        """Copies scratch slots to the ring; arguments as for ``SlotCache.keep``."""
        for key, main in self.main.items():
            main[batch, position % self.ring] = self.scratch[key][batch, scratch]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPlaces:
    """Where the R rows of a forward stand."""

    positions: Tensor
    """``[B, R]`` int64."""
    limits: Tensor
    """``[B, R]`` int64; a row follows the token before its limit, unless it follows a scratch slot."""
    in_place: int
    """The first rows, whose states go to the ring."""
    scratch_slots: Tensor
    """``[R - in_place]`` int64, the slots of the others."""
    scratch_mask: Tensor | None
    """``[R, X]`` or ``[B, R, X]`` bool: the scratch slots on a row's path."""
    scratch_positions: Tensor
    """``[B, X]`` int64; a row follows the last slot on its path."""
    count: int | None
    """In a prompt, the first rows that are tokens; the rest is padding. None: decode rows."""


class RowSteps:
    """Where the rows of one forward take their states from and put them.

    Args:
        slots: the states.
        batch: ``[B]`` int64, the sequences of the rows.
        places: of the rows.
    """

    def __init__(self, slots: StateSlots, batch: Tensor, places: RowPlaces):
        positions, limits = places.positions, places.limits
        self.slots, self.batch = slots, batch
        self.rows = positions.shape[1] if places.count is None else places.count
        self.whole = max(0, self.rows - slots.ring) if slots.together and places.count is not None else 0
        """The first rows, which advance together."""
        self._places = (positions % slots.ring).unbind(1)
        self._first = (limits == 0).unbind(1)
        self._before = ((limits - 1) % slots.ring).unbind(1)
        self._in_place, self._scratch_slots = places.in_place, places.scratch_slots
        self._follows: tuple[Tensor, ...] | None = None
        if places.scratch_mask is not None:
            shown = places.scratch_mask.expand(len(batch), -1, -1)
            last = torch.where(shown, places.scratch_positions[:, None], -1).max(-1)
            self._follows, self._aside = last.indices.unbind(1), (last.values >= 0).unbind(1)

    def before(self, row: int, key: Key) -> Tensor:
        """Returns the states ``[B, ...]`` that a row continues: a copy."""
        state = self.slots.main[key][self.batch, self._before[row]]
        shape = (-1, *(1,) * (state.ndim - 1))
        if self._follows is not None:
            aside = self.slots.scratch[key][self.batch, self._follows[row]]
            state = torch.where(self._aside[row].view(shape), aside, state)
            fresh = self._first[row] & ~self._aside[row]
        else:
            fresh = self._first[row]
        return state.masked_fill(fresh.view(shape), 0)

    def begins(self, row: int) -> bool:
        """Returns whether a row of a prompt is its sequence's first."""
        return bool(self._first[row].all())

    def put(self, row: int, key: Key, state: Tensor) -> None:
        """Stores the states ``[B, ...]`` after a row."""
        if row < self._in_place:
            self.slots.main[key][self.batch, self._places[row]] = state
        else:
            self.slots.scratch[key][self.batch, self._scratch_slots[row - self._in_place]] = state


class RowByRow(nn.Module):
    """A recurrent module that advances one row at a time. It takes the place of ``mixer``."""

    def __init__(self, mixer: nn.Module, keys: tuple[Key, ...]):
        super().__init__()
        self.mixer, self._keys = mixer, keys

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("mixer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        view = next(
            (given for given in (*args, *kwargs.values()) if getattr(given, "steps", None) is not None),
            None,
        )
        if view is None:
            return self.mixer(hidden_states, *args, **kwargs)
        steps: RowSteps = view.steps
        batch, shape = len(steps.batch), hidden_states.shape
        hidden_states = hidden_states.reshape(batch, -1, shape[-1])

        def given(each: Any, first: int, end: int) -> Any:
            if each is view:
                return step
            if not isinstance(each, Tensor):
                return each
            if each.shape[:2] == shape[:2]:  # of each row
                return each.reshape(batch, -1, *each.shape[2:])[:, first:end]
            if each.ndim == 4 or (each.ndim == 2 and len(each) == shape[0]):  # a mask, which says nothing about states
                return None
            return each

        ends = [steps.whole] * bool(steps.whole) + list(range(steps.whole + 1, steps.rows + 1))
        outputs, first = [], 0
        for end in ends:
            states = {key: steps.before(first, key) for key in self._keys}
            step = _Step(states) if end == first + 1 else _Prompt(states, fresh=steps.begins(first))
            out = self.mixer(
                hidden_states[:, first:end],
                *(given(each, first, end) for each in args),
                **{name: given(each, first, end) for name, each in kwargs.items()},
            )
            outputs.append(out if isinstance(out, tuple) else (out,))
            for key, state in step.states.items():
                steps.put(end - 1, key, state)
            first = end
        padding = hidden_states.shape[1] - steps.rows

        def together(parts: tuple[Any, ...]) -> Any:
            last = parts[-1]
            if not isinstance(last, Tensor) or last.shape[:2] != (batch, 1):
                return last
            return torch.cat([*parts, *[torch.zeros_like(last)] * padding], dim=1).reshape(*shape[:2], *last.shape[2:])

        whole = tuple(together(parts) for parts in zip(*outputs, strict=True))
        return whole if isinstance(out, tuple) else whole[0]


class _Kept(NamedTuple):
    """The states of one layer, as modules of transformers 5.17 read them."""

    conv_states: dict[int, Tensor]
    recurrent_states: dict[int, Tensor]
    record_past: bool = False


class _Step:
    """The part of transformers' ``Cache`` that a recurrent module reads and writes in a step of one token."""

    def __init__(self, states: dict[Key, Tensor]):
        self.states = states

    @property
    def layers(self) -> dict[int, _Kept]:
        """The states by layer."""
        found = {layer: _Kept({}, {}) for layer, *_ in self.states}
        for (layer, kind, index), state in self.states.items():
            (found[layer].conv_states if kind == "conv" else found[layer].recurrent_states)[index] = state
        return found

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.states[layer_idx, "conv", state_idx]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.states[layer_idx, "recurrent", state_idx]

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        key = layer_idx, "conv", state_idx
        full = torch.cat([self.states[key], conv_states], dim=-1)
        self.states[key] = full[..., -self.states[key].shape[-1] :]
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self.states[layer_idx, "recurrent", state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return True

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 1


class _Prompt(_Step):
    """The part that it reads and writes where it computes many tokens of a prompt."""

    def __init__(self, states: dict[Key, Tensor], *, fresh: bool):
        super().__init__(states)
        self._fresh = set(states) if fresh else set[Key]()

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        key = layer_idx, "conv", state_idx
        return None if key in self._fresh else self.states[key]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        key = layer_idx, "recurrent", state_idx
        return None if key in self._fresh else self.states[key]

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **more: Any) -> Tensor:
        key = layer_idx, "conv", state_idx
        if key not in self._fresh:
            return super().update_conv_state(conv_states, layer_idx, state_idx, **more)
        self._fresh -= {key, (layer_idx, "recurrent", state_idx)}
        size = self.states[key].shape[-1]
        full = nn.functional.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        self.states[key] = full[..., -size:]
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self._fresh.discard((layer_idx, "recurrent", state_idx))
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return not self._fresh


def step_by_rows(model: PreTrainedModel, recurrent: Recurrent) -> None:
    """Replaces the model's recurrent modules by ``RowByRow``."""
    for path, keys in recurrent.mixers.items():
        parent, _, name = path.rpartition(".")
        owner, mixer = model.get_submodule(parent), model.get_submodule(path)
        if not isinstance(owner, RowByRow):  # another runner of the same model has replaced it
            setattr(owner, name, RowByRow(mixer, keys))
