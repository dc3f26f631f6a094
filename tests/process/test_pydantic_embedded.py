"""Pydantic's schemas on the embedded pair: all methods agree, and finished outputs parse."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import TypeAdapter

from ssd import LLM, SamplingParams, StructuredOutputsParams
from ssd.pipeline.runtime.launch import InprocPipeline
from tests.unit.grammars.test_pydantic_schemas import KINDS

PROMPT = "def main():\n    config = "
OVERRIDES = ("target.compile=false", "draft.compile=false", "speculation.governor=false", "engine.max_batch=4")


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_methods_agree_and_outputs_parse(step: int) -> None:
    kinds = dict(list(KINDS.items())[::step])
    adapters = [TypeAdapter(kind) for kind in kinds.values()]
    params = [
        SamplingParams(
            temperature=0.0 if index % 2 else 0.8,
            seed=index,
            max_tokens=40,
            structured_outputs=StructuredOutputsParams(json=adapter.json_schema()),
        )
        for index, adapter in enumerate(adapters)
    ]
    with LLM("embedded", overrides=OVERRIDES, launch=InprocPipeline) as llm:
        plain, ssd = (
            llm.generate([PROMPT] * len(params), [replace(p, method=method) for p in params])
            for method in ("none", "ssd")
        )
        assert llm.degraded is None
    finished = 0
    for name, adapter, one, other in zip(kinds, adapters, plain, ssd, strict=True):
        assert one.token_ids == other.token_ids, name
        assert one.finish_reason == other.finish_reason and one.finish_reason in ("stop", "length"), name
        if one.finish_reason == "stop":
            finished += 1
            adapter.validate_json(one.text)
    assert finished > len(kinds) / 2
