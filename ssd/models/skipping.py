"""A model with sublayers left out, sharing every weight with the whole one: self-speculation's draft.

Sources: Draft & Verify (Zhang et al. 2023, arXiv 2309.08168), which skips attention and MLP of chosen layers;
LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710), which leaves early, that is, skips the last layers whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError

if TYPE_CHECKING:  # as in loading.py
    from transformers import PreTrainedModel

KEY = "speculation.self"


@dataclass(frozen=True, slots=True)
class SkipSet:
    """Which sublayers of a model of ``layers`` layers are left out; indices count from 0.

    Raises:
        ConfigError: an index that is no layer.
    """

    attention: frozenset[int]
    mlp: frozenset[int]
    layers: int

    def __post_init__(self) -> None:
        for name, chosen in (("skip_attention", self.attention), ("skip_mlp", self.mlp)):
            if wrong := sorted(index for index in chosen if not 0 <= index < self.layers):
                raise ConfigError(
                    f"{KEY}.{name} names layer {wrong[0]}; the target has {self.layers} layers, 0 to {self.layers - 1}"
                )

    @classmethod
    def of(cls, attention: Iterable[int] | None, mlp: Iterable[int] | None, layers: int) -> SkipSet:
        """None stands for the sublayers of every second layer between the first and the last, where SWIFT (Xia et
        al. 2024, arXiv 2410.06916) begins its search."""
        second = range(1, layers - 1, 2)
        return cls(
            frozenset(second if attention is None else attention), frozenset(second if mlp is None else mlp), layers
        )

    @property
    def count(self) -> int:
        """Sublayers left out, of 2 · ``layers``."""
        return len(self.attention) + len(self.mlp)

    @property
    def exit(self) -> int | None:
        """E, if what is left are the first E layers, whole: an early exit."""
        left = self.layers - len(self.attention)
        return left if self.attention == self.mlp == frozenset(range(left, self.layers)) else None


class _NoAttention(nn.Module):
    """Adds nothing to the residual stream, and writes no keys."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class _NoMLP(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class _NoLayer(nn.Module):
    """Stands where a layer stood, for models count their layers."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states


def skipping(model: PreTrainedModel, skips: SkipSet) -> PreTrainedModel:
    """``model`` without these sublayers: its very modules, so it costs no memory, and what replaces its weights
    later (``pack_linears``) must come before.

    Raises:
        ModelError: its layers' attention or MLP cannot be told.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != skips.layers:
        raise ModelError(f"{model.config.model_type}: its layers cannot be told apart, so none can be skipped")
    return _replaced(model, decoder, _with(decoder, layers=_skipped(model.config.model_type, layers, skips)))


def _skipped(kind: str, layers: nn.ModuleList, skips: SkipSet) -> nn.ModuleList:
    found = []
    for index, layer in enumerate(layers):
        changed: dict[str, nn.Module] = {}
        if index in skips.attention:
            changed[_child(kind, layer, "Attention")] = _NoAttention()
        if index in skips.mlp:
            changed[_child(kind, layer, "MLP")] = _NoMLP()
        found.append(_NoLayer() if len(changed) == 2 else _with(layer, **changed))
    return nn.ModuleList(found)


def _child(kind: str, layer: nn.Module, what: str) -> str:
    """Name of the layer's only child whose class says that it is one."""
    names = [name for name, child in layer.named_children() if what in type(child).__name__]
    if len(names) != 1:
        raise ModelError(f"{kind}: the {what} of a layer cannot be told, so it cannot be skipped")
    return names[0]


def _with(module: nn.Module, **children: nn.Module) -> Any:
    """The module with other children; everything else is shared."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


def _replaced(module: nn.Module, old: nn.Module, new: nn.Module) -> Any:
    """The module with ``new`` in ``old``'s place, however deep."""
    if module is old:
        return new
    changed = {
        name: _replaced(child, old, new)
        for name, child in module.named_children()
        if any(part is old for part in child.modules())
    }
    return _with(module, **changed)
