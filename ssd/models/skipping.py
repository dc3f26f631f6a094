"""Models with sublayers left out, which share every weight with the whole model: drafts of self-speculation.

Sources: Draft & Verify (Zhang et al. 2023, arXiv 2309.08168), which skips attention and MLP of chosen layers;
LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710), which exits early, that is, skips all of the last layers.
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
    """The sublayers that are left out of a model with ``layers`` layers; indices count from 0.

    Raises:
        ConfigError: an index is out of range.
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
        """Returns the set of these indices. None means every second layer between the first and the last, where SWIFT
        (Xia et al. 2024, arXiv 2410.06916) begins its search."""
        second = range(1, layers - 1, 2)
        return cls(
            frozenset(second if attention is None else attention), frozenset(second if mlp is None else mlp), layers
        )

    @property
    def count(self) -> int:
        """Number of sublayers left out, of 2 · ``layers``."""
        return len(self.attention) + len(self.mlp)

    @property
    def exit(self) -> int | None:
        """E, if exactly the first E layers are left, whole (an early exit); otherwise None."""
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
    """Takes a layer's place, since models count their layers."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states


def skipping(model: PreTrainedModel, skips: SkipSet) -> PreTrainedModel:
    """Returns ``model`` without these sublayers.

    It consists of the same modules, so it takes no memory; weights must be replaced (``pack_linears``) before.

    Raises:
        ModelError: the layers, or their attention or MLP, cannot be identified.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != skips.layers:
        raise ModelError(f"{model.config.model_type}: its layers cannot be identified, so none can be skipped")
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
    """Returns the name of the layer's only child with ``what`` in its class name."""
    names = [name for name, child in layer.named_children() if what in type(child).__name__]
    if len(names) != 1:
        raise ModelError(f"{kind}: the {what} of a layer cannot be identified, so it cannot be skipped")
    return names[0]


def _with(module: nn.Module, **children: nn.Module) -> Any:
    """Returns the module with other children; everything else is shared."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


def _replaced(module: nn.Module, old: nn.Module, new: nn.Module) -> Any:
    """Returns the module with ``new`` in place of ``old``, at any depth."""
    if module is old:
        return new
    changed = {
        name: _replaced(child, old, new)
        for name, child in module.named_children()
        if any(part is old for part in child.modules())
    }
    return _with(module, **changed)
