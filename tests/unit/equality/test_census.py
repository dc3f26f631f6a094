"""Models of many kinds of layers, tiny and random: tokens equal to the model's own forward, with every method."""

from __future__ import annotations

import pytest

from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.testing.models.census import examine, model_types

KINDS = {
    "mistral": "all layers slide",
    "gemma3_text": "some layers slide",
    "gpt_oss": "attention sinks, experts",
    "qwen3_moe": "experts",
    "qwen3_next": "linear attention, experts",
    "mamba": "state space only",
    "lfm2": "short convolutions",
    "bloom": "ALiBi, in code that attends by itself",
    "deepseek_v3": "latent attention",
    "roberta": "positions that begin at 3",
}
LEAST_EQUAL = 167
"""Model types of transformers 5.23 that are equal, less three."""


LONG = {"qwen3_next"}
"""Take most of a minute; ``tests/unit/models/test_prompts_of_states.py`` has layers of that kind too."""


@pytest.mark.parametrize(
    "model_type", [pytest.param(kind, marks=[pytest.mark.slow] if kind in LONG else []) for kind in KINDS]
)
def test_kinds_of_layers(model_type: str) -> None:
    finding = examine(model_type, InprocPipeline)
    assert (finding.outcome, finding.why) == ("equal", "")


@pytest.mark.slow
def test_no_model_type_is_wrong() -> None:
    """Each is equal, or refused with the reason; or the census has no tiny configuration of it."""
    findings = [examine(model_type, InprocPipeline) for model_type in model_types()]
    assert [finding for finding in findings if finding.outcome in ("different", "failed")] == []
    assert sum(finding.outcome == "equal" for finding in findings) >= LEAST_EQUAL
