"""What a model is, and whether this engine decodes it right."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any

from ...config.load import resolve_model_path
from ...config.sections import ModelConfig
from ...errors import ModelError
from ...models.checkpoints.loading import load_model, load_tokenizer, read_config
from ...models.checkpoints.pairs import paired
from ...models.checkpoints.support import usable_positions
from ...models.layers import Attended, Layers, attended, find_layers
from ...models.runner import ForwardRunner, RunnerOptions

CAPACITY = 64
"""Tokens of the runner that tries a model."""
_REACHES = {"full": "full attention", "window": "a window of {}", "chunk": "chunks of {}"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a model is.

    Attributes:
        model: as the configuration names it.
        kind: its type in transformers.
        parameters: how many it has.
        layers: how many layers keep what, in words.
        positions: that it knows; None if it does not say.
        tokens: of its tokenizer.
        rows: of its output head.
        cache_bytes: that its layers keep of one token.
        state_bytes: that its recurrent layers keep of one sequence.
        own_code: whether its own attention code decodes, which is neither compiled nor fast.
    """

    model: str
    kind: str
    parameters: int
    layers: str
    positions: int | None
    tokens: int
    rows: int
    cache_bytes: int
    state_bytes: int
    own_code: bool


def examine(model: ModelConfig) -> ModelFacts:
    """Loads a model and decodes a few tokens with it.

    Raises:
        ModelError: it cannot be loaded, or does not decode as with transformers' own code.
    """
    path = resolve_model_path(model.model)
    tokenizer, text = load_tokenizer(path), read_config(path).get_text_config()
    loaded = load_model(
        path,
        dtype=model.dtype,
        device=model.device,
        max_positions=CAPACITY,
        weights=model.weights,
        adapter=model.adapter,
    )
    layers, rows = find_layers(loaded), _head_rows(loaded)
    positions = usable_positions(text)
    cache_bytes = sum(heads * (keys + values) for heads, keys, values in layers.heads.values()) * loaded.dtype.itemsize
    runner = ForwardRunner(
        loaded,
        RunnerOptions(batch=1, capacity=CAPACITY, scratch_slots=4, prefill_chunk=8, vocabulary=rows, chain=4),
    )
    # The model's own code attends what it attends: the cache knows no windows then.
    own = runner.attention == "model"
    kinds = runner.cache.attended if own else attended(text, layers, positions or CAPACITY)
    return ModelFacts(
        model=model.model,
        kind=text.model_type,
        parameters=runner.parameters,
        layers=_in_words(layers, kinds),
        positions=positions,
        tokens=len(tokenizer.get_vocab()),
        rows=rows,
        cache_bytes=cache_bytes,
        state_bytes=_state_bytes(layers),
        own_code=runner.attention == "model",
    )


def describe_pair(target: ModelFacts, draft: ModelFacts) -> str:
    """Returns how a target and a draft fit, in one line."""
    tokenizers = [load_tokenizer(resolve_model_path(facts.model)) for facts in (target, draft)]
    rows: dict[str, Any] = {"target_rows": target.rows, "draft_rows": draft.rows}
    try:
        found = paired(*tokenizers, **rows)
    except ModelError as same:
        try:
            found = paired(*tokenizers, **rows, shared=True)
        except ModelError:
            return f"does not fit: {same}"
        assert found.map is not None
        return f"different tokenizers: draft.vocabulary=shared drafts {found.map.shared} of {target.tokens} tokens"
    return "one vocabulary" if found.map is None else f"one vocabulary but for added tokens: {found.map.shared} drafted"


def _head_rows(model: Any) -> int:
    head = model.get_output_embeddings()
    rows = getattr(head, "out_features", None)
    return model.config.get_text_config().vocab_size if rows is None else rows


def _in_words(layers: Layers, reaches: tuple[Attended, ...]) -> str:
    kinds = Counter[str]()
    states = set() if layers.recurrent is None else {layer for layer, *_ in layers.recurrent.states}
    for layer, attends in enumerate(reaches):
        kept = [_REACHES[attends.reach].format(attends.size)] if layer in layers.heads else []
        kinds[" and ".join([*kept, *(["a recurrent state"] if layer in states else [])]) or "nothing"] += 1
    return ", ".join(f"{count} with {kind}" for kind, count in kinds.items())


def _state_bytes(layers: Layers) -> int:
    states = {} if layers.recurrent is None else layers.recurrent.states
    return sum(prod(state.shape) * state.dtype.itemsize for state in states.values())
