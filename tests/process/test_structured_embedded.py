"""Structured output on the embedded pair: its byte-level tokenizer, its draft, all methods."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from ssd import LLM, SamplingParams
from ssd.pipeline.runtime.launch import InprocPipeline

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kinds": {"type": "array", "items": {"enum": ["é日", "b"]}},
    },
    "required": ["name", "kinds"],
    "additionalProperties": False,
}
ASKED = (
    {"json": SCHEMA, "disable_any_whitespace": True},
    {"regex": r"[a-z]{3,8} = [0-9]{1,4}\n"},
    {"choice": ["日本語", "naïve", "plain"]},
)
PROMPT = "def main():\n    config = "


@pytest.mark.slow
def test_methods_agree() -> None:
    overrides = ["target.compile=false", "draft.compile=false", "speculation.governor=false"]
    with LLM("embedded", overrides=overrides, launch=InprocPipeline) as llm:
        params = [
            SamplingParams(temperature=temperature, seed=3, max_tokens=32, structured_outputs=asked)  # type: ignore[arg-type]
            for temperature in (0.0, 0.9)
            for asked in ASKED
        ]
        plain, sd, ssd = (
            llm.generate([PROMPT] * len(params), [replace(p, method=method) for p in params])
            for method in ("none", "sd", "ssd")
        )
        assert llm.degraded is None
    assert [o.token_ids for o in plain] == [o.token_ids for o in sd] == [o.token_ids for o in ssd]
    for output, asked in zip(plain, (*ASKED, *ASKED), strict=True):
        if output.finish_reason != "stop":
            continue
        if "json" in asked:
            assert set(json.loads(output.text)) == {"name", "kinds"}
        elif "regex" in asked:
            assert re.fullmatch(str(asked["regex"]), output.text)
        else:
            assert output.text in asked["choice"]
    assert sum(output.finish_reason == "stop" for output in plain) >= 4
    assert sum(output.speculation.accepted for output in ssd) > 0
