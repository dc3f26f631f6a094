"""How long a text may be for a configuration, and rotary embeddings of every kind against the model's own forward."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, XLNetConfig

from ssd.errors import ModelError
from ssd.models.checkpoints.support import check_supported, usable_positions
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.testing.models import census

HALF = 8  # D / 2 of the census' models
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + n / 8 for n in range(HALF)],
        "long_factor": [4.0 + n for n in range(HALF)],
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
}


def llama(**rope: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_embeddings_decode_as_the_model_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = {"rope_theta": 10000.0, **ROPES[kind]}
    model_type = "phi" if kind == "partial" else "llama"
    monkeypatch.setitem(census.OWN, model_type, {"rope_parameters": rope})
    finding = census.examine(model_type, InprocPipeline)
    assert (finding.outcome, finding.why) == ("equal", "")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("default", 256), ("linear", 512), ("dynamic", 256), ("yarn", 256), ("longrope", 64), ("llama3", 256)],
)
def test_usable_positions(kind: str, expected: int) -> None:
    assert usable_positions(llama(**ROPES[kind])) == expected


def test_yarn_reaches_factor_times_original() -> None:
    assert usable_positions(llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=256)) == 1024


def test_no_limit() -> None:
    assert usable_positions(XLNetConfig()) is None


@pytest.mark.parametrize(("kind", "limit"), [("dynamic", 256), ("longrope", 64)])
def test_a_text_beyond_the_first_length_is_refused_in_one_line(kind: str, limit: int) -> None:
    check_supported(llama(**ROPES[kind]), limit)
    with pytest.raises(ModelError, match=f"{kind}.*engine.max_model_len to at most {limit}") as error:
        check_supported(llama(**ROPES[kind]), limit + 1)
    assert "\n" not in str(error.value)
