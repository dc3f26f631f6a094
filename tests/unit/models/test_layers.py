"""What a model's layers keep and attend, found by running it; models that would decode wrong tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ssd.errors import ModelError
from ssd.models.layers import FULL, Attended, Layers, attended, find_layers
from ssd.models.positions import place_positions
from ssd.models.runner import ForwardRunner, RunnerOptions
from ssd.testing.models.census import tiny_causal
from ssd.testing.models.tiny import tiny_model


def layers_of(count: int) -> Layers:
    nothing = torch.zeros(0)
    return Layers(
        count=count,
        heads=dict.fromkeys(range(count), (1, 4, 4)),
        indexers={},
        recurrent=None,
        first_position=0,
        linears=frozenset(),
        tokens=nothing,
        logits=nothing,
    )


def text(**values: Any) -> Any:
    return SimpleNamespace(model_type="some", **values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, FULL),
        ({"sliding_window": 8}, Attended(reach="window", size=8)),
        ({"sliding_window": 8, "use_sliding_window": False}, FULL),
        ({"sliding_window": 100}, FULL),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, FULL),
        ({"sliding_window": 8, "layer_types": ["sliding_attention"]}, Attended(reach="window", size=8)),
        ({"attention_chunk_size": 16, "layer_types": ["chunked_attention"]}, Attended(reach="chunk", size=16)),
    ],
    ids=["plain", "all slide", "off", "longer than the context", "full", "sliding", "chunked"],
)
def test_what_a_layer_attends(values: dict[str, Any], expected: Attended) -> None:
    assert attended(text(**values), layers_of(1), 100) == (expected,)


def test_unknown_kinds_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="indexed_attention"):
        attended(text(layer_types=["indexed_attention"]), layers_of(1), 100)


def test_starts_of_windows_and_chunks() -> None:
    positions = torch.tensor([[0, 7, 8, 20]])
    assert Attended(reach="window", size=8).starts(positions).tolist() == [[0, 0, 1, 13]]
    assert Attended(reach="chunk", size=8).starts(positions).tolist() == [[0, 0, 8, 16]]


def test_keys_and_values_are_found() -> None:
    found = find_layers(tiny_model("llama"))
    assert (found.count, found.recurrent) == (2, None)
    assert found.heads == dict.fromkeys(range(2), (2, 16, 16))


def test_recurrent_layers_are_found() -> None:
    found = find_layers(tiny_causal("qwen3_next"))
    assert found.recurrent is not None
    layers = {layer for keys in found.recurrent.mixers.values() for layer, _, _ in keys}
    assert set(found.heads).isdisjoint(layers)
    assert {*found.heads, *layers} == set(range(found.count))
    assert {name for _, name, _ in found.recurrent.states} == {"conv", "recurrent"}


def test_weights_that_other_modules_read_are_not_replaced() -> None:
    """Mamba multiplies with its time step projection's weight itself."""
    model = tiny_causal("mamba")
    linears = find_layers(model).linears
    projections = {name: module for name, module in model.named_modules() if name.endswith(("in_proj", "dt_proj"))}
    assert {name.rpartition(".")[2] for name, module in projections.items() if module in linears} == {"in_proj"}
    assert {type(module) for module in projections.values()} == {torch.nn.Linear}


def test_a_model_that_looks_ahead_is_refused() -> None:
    """Without its own mask an encoder decodes, but other tokens than the model's own forward gives."""
    model = tiny_causal("camembert")
    model.config.is_decoder = False
    options = RunnerOptions(batch=1, capacity=64, scratch_slots=2, prefill_chunk=8, vocabulary=160)
    with pytest.raises(ModelError, match="other logits"):
        ForwardRunner(model, options)


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "deepseek_v3"])
def test_code_that_works_on_keys_itself_attends_by_itself(model_type: str) -> None:
    options = RunnerOptions(batch=1, capacity=64, scratch_slots=2, prefill_chunk=8, vocabulary=160)
    runner = ForwardRunner(tiny_causal(model_type), options)
    assert runner.attention == "model"
    assert runner.contexts == [runner.cache.main_slots]


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("xlstm", "has a cache of its own"),
        ("rwkv", "keeps a state that cannot be taken back"),
        ("openai-gpt", "keeps no keys in transformers' cache"),
        ("deepseek_v4", "layers of kind .* keep a state that cannot be taken back"),
    ],
)
def test_what_cannot_be_taken_back_is_refused_by_name(model_type: str, why: str) -> None:
    with pytest.raises(ModelError, match=f"^{model_type}: {why}"):
        find_layers(tiny_causal(model_type))


@pytest.mark.parametrize(("model_type", "first"), [("roberta", 3), ("bert", 0), ("llama", 0)])
def test_what_the_first_position_is_called(model_type: str, first: int) -> None:
    assert find_layers(tiny_causal(model_type)).first_position == first


def test_positions_beyond_the_embedding_are_refused() -> None:
    """RoBERTa's embedding of 256 positions begins with 3: 253 are left."""
    options = RunnerOptions(batch=1, capacity=254, scratch_slots=2, prefill_chunk=8, vocabulary=160)
    with pytest.raises(ModelError, match="knows 253 positions, 254 are needed"):
        ForwardRunner(tiny_causal("roberta"), options)


def test_an_embedding_that_counts_from_the_cache_gives_each_row_its_position() -> None:
    model = tiny_causal("bart")
    [embedding] = place_positions(model)
    whole = embedding(torch.zeros(1, 9, dtype=torch.int64), 0)
    embedding.positions = torch.tensor([[3, 8], [0, 3]])
    rows = embedding(torch.zeros(2, 2, dtype=torch.int64), 5)
    assert rows.shape == (2, 2, whole.shape[-1])
    torch.testing.assert_close(rows, whole[0][embedding.positions])
