"""What each layer of a model keeps of a token, and what it attends: found by running the model once."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..errors import ModelError, first_line
from .positions import first_position

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Reach = Literal["full", "window", "chunk"]
UNUSABLE = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model's code may raise where it does not fit this engine."""
TRIAL = 12
"""Tokens of the trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attended:
    """The tokens before itself that a token of a layer attends."""

    reach: Reach = "full"
    size: int = 0
    """Tokens of a window, the token itself included, or of a chunk."""

    def starts(self, positions: Tensor) -> Tensor:
        """Returns the first position that rows at ``positions`` attend. Both ``[B, R]`` int64."""
        if self.reach == "chunk":
            return positions // self.size * self.size
        return (positions - (self.size - 1)).clamp(min=0)


FULL = Attended()
_REACHES: dict[str, Reach] = {
    "full_attention": "full",
    "hybrid": "full",
    "sliding_attention": "window",
    "hybrid_sliding": "window",
    "chunked_attention": "chunk",
}

Key = tuple[int, str, int]
"""Layer, ``conv`` or ``recurrent``, and which of the layer's states of that kind."""


@dataclass(frozen=True, slots=True)
class Recurrent:
    """The recurrent layers of a model."""

    states: dict[Key, Tensor]
    """A state of one sequence each, without the batch dimension, for its shape and dtype."""
    mixers: dict[str, tuple[Key, ...]]
    """The states that a module keeps, by the module's path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """What a model's layers keep."""

    count: int
    heads: dict[int, tuple[int, int, int]]
    """By layer that keeps keys and values: H_kv, D of keys, D of values."""
    indexers: dict[int, int]
    """By layer whose attention looks at selected keys only: D of the keys that select."""
    recurrent: Recurrent | None
    first_position: int
    """What the model calls the position of a text's first token."""
    linears: frozenset[nn.Module]
    """Linear layers whose weights are used by themselves only."""
    tokens: Tensor
    """``[1, TRIAL]``: what the model was run on."""
    logits: Tensor
    """``[TRIAL, V]`` float32: what it answered, without a cache."""

    def divided(self, shares: int) -> Layers:
        """Returns what a rank keeps if heads are divided among ``shares`` ranks."""
        return replace(self, heads={layer: (h // shares, *dims) for layer, (h, *dims) in self.heads.items()})


def attended(text: PretrainedConfig, layers: Layers, capacity: int) -> tuple[Attended, ...]:
    """Returns what every layer attends. A window that holds ``capacity`` tokens hides nothing and counts as full.

    Args:
        text: the text part of a model's configuration.
        layers: of the model.
        capacity: tokens of a sequence.

    Raises:
        ModelError: a layer attends in a way that this engine does not know.
    """
    window = getattr(text, "sliding_window", None)
    chunk = getattr(text, "attention_chunk_size", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        slides = window is not None and getattr(text, "use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"] * layers.count

    def one(index: int) -> Attended:
        if index not in layers.heads:
            return FULL
        kind = kinds[index] if index < len(kinds) else "unknown"
        if kind not in _REACHES:
            raise ModelError(f"{text.model_type}: layers of kind {kind} are not supported")
        reach = _REACHES[kind]
        size = {"full": None, "window": window, "chunk": chunk}[reach]
        return FULL if size is None or size >= capacity else Attended(reach=reach, size=size)

    return tuple(one(index) for index in range(layers.count))


@torch.no_grad()
def find_layers(model: PreTrainedModel) -> Layers:
    """Returns what the model's layers keep: of one token in transformers' own cache.

    Raises:
        ModelError: the model does not run, keeps states outside that cache, or keeps them in a module that attends
            as well.
    """
    kind, active = model.config.get_text_config().model_type, list[str]()
    random = torch.Generator().manual_seed(0)
    most = model.config.get_text_config().vocab_size
    tokens = torch.randint(most, (1, TRIAL), generator=random).to(model.device)
    hooks = list[Any]()
    with _noting(model) as linears, own_attention(model), first_position(model) as first:
        try:
            cache = _Watched(model.config, active)
            hooks = [hook for name, module in model.named_modules() for hook in _watch(module, name, active)]
            model(input_ids=tokens[:, :1], use_cache=True, **{cache_argument(model): cache})
            logits = model(input_ids=tokens, use_cache=False).logits[0].float()
        except UNUSABLE as error:
            if _Watched.__name__ in str(error):
                raise ModelError(f"{kind}: has a cache of its own; not supported") from error
            # Whatever is wrong with code that is not ours makes this model unusable, and nothing else.
            raise ModelError(f"{kind}: does not run as a causal language model ({first_line(error)})") from error
        finally:
            for hook in hooks:
                hook.remove()
    return Layers(
        count=len(cache.layers),
        heads=cache.heads,
        indexers=cache.indexers,
        recurrent=_recurrent(kind, model, cache),
        first_position=first[-1] if first else 0,
        linears=frozenset(linears),
        tokens=tokens,
        logits=logits,
    )


def cache_argument(model: PreTrainedModel) -> str:
    """Returns the name of the argument that takes a cache: ``cache`` from transformers 5.24 on, before it
    ``past_key_values``, or ``cache_params`` in state-space models."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "cache_params") if name in takes), "past_key_values")


def _recurrent(kind: str, model: PreTrainedModel, cache: _Watched) -> Recurrent | None:
    layers: list[Any] = cache.layers
    recurrent = [index for index, layer in enumerate(layers) if hasattr(layer, "recurrent_states")]
    if not recurrent:
        if getattr(model, "_is_stateful", False):
            unknown = {*(getattr(model.config.get_text_config(), "layer_types", None) or ())} - {*_REACHES}
            what = f"layers of kind {sorted(unknown)[0]} keep" if unknown else "keeps"
            raise ModelError(f"{kind}: {what} a state that cannot be taken back; not supported")
        if not cache.heads:
            raise ModelError(f"{kind}: keeps no keys in transformers' cache; not supported")
        return None
    if shared := set(cache.users.values()) & cache.attending:
        raise ModelError(f"{kind}: {sorted(shared)[0]} attends and keeps a state in one module; not supported")
    states: dict[Key, Tensor] = {}
    for layer in recurrent:
        kept = layers[layer]
        for name, tensors in (("conv", kept.conv_states), ("recurrent", kept.recurrent_states)):
            states |= {(layer, name, index): state[0] for index, state in tensors.items() if state is not None}
    if not states or set(states) - set(cache.users):
        raise ModelError(f"{kind}: the modules that keep its states cannot be found; not supported")
    paths = sorted({cache.users[key] for key in states}, key=len)

    def outermost(path: str) -> str:
        return next(one for one in paths if f"{path}.".startswith(f"{one}."))

    mixers: dict[str, tuple[Key, ...]] = {}
    for key in states:
        path = outermost(cache.users[key])
        mixers[path] = (*mixers.get(path, ()), key)
    return Recurrent(states, mixers)


class _Watched(DynamicCache):
    """A cache that notes what is put into it, and by which modules."""

    def __init__(self, config: Any, active: list[str]):
        super().__init__(config=config)
        self._active = active
        self.heads: dict[int, tuple[int, int, int]] = {}
        self.indexers: dict[int, int] = {}
        self.users: dict[Key, str] = {}
        self.attending: set[str] = set()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *given: Any, **named: Any) -> Any:
        self.attending.add(self._active[-1])
        self.heads[layer_idx] = key_states.shape[1], key_states.shape[3], value_states.shape[3]
        return super().update(key_states, value_states, layer_idx, *given, **named)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        self.indexers[layer_idx] = indexer_key_states.shape[-1]
        return super().update_indexer(indexer_key_states, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # also where no layer attends

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        self.users[layer_idx, "conv", state_idx] = self._active[-1]
        return super().get_conv_state(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        self.users[layer_idx, "recurrent", state_idx] = self._active[-1]
        return super().get_recurrent_state(layer_idx, state_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **more: Any) -> Tensor:
        self.users[layer_idx, "conv", state_idx] = self._active[-1]
        return super().update_conv_state(conv_states, layer_idx, state_idx, **more)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **more: Any) -> Any:
        self.users[layer_idx, "recurrent", state_idx] = self._active[-1]
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **more)


@contextlib.contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Lets the model attend as transformers does, also one that has run with this engine's attention."""
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


class _NotedLinear(nn.Linear):
    """A linear layer that notes who reads its weight."""

    running = False
    read = False

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and not self.running:
            self.read = True
        return super().__getattr__(name)


def _watch(module: nn.Module, name: str, active: list[str]) -> Iterator[Any]:
    def enter(*_: Any) -> None:
        active.append(name)
        if isinstance(module, _NotedLinear):
            module.running = True

    def leave(*_: Any) -> None:
        active.pop()
        if isinstance(module, _NotedLinear):
            module.running = False

    yield module.register_forward_pre_hook(enter)
    yield module.register_forward_hook(leave, always_call=True)


@contextlib.contextmanager
def _noting(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Yields a set, which at the end holds the linear layers whose weight nothing else has read."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    unread = set[nn.Module]()
    for module in linears:
        module.__class__ = _NotedLinear
    try:
        yield unread
    finally:
        for module in linears:
            if not module.read:
                unread.add(module)
            module.__class__ = nn.Linear
            for name in ("running", "read"):
                module.__dict__.pop(name, None)
