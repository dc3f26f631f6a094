"""Tool calls with speculation are those without it, however many tokens come at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from ssd import AsyncEngine
from ssd.bench.exactness.tool_calls import MARKERS, SIZES, WAYS, Way, compare
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.request.methods import Method
from ssd.serving.parsers.formats import CALL_FORMATS, REASONING_FORMATS
from ssd.testing.models.tiny import tiny_model, tiny_tokenizer

VOCABULARY = 400
"""From 324 ids on the tiny tokenizer spells every byte."""
METHODS: tuple[Method, ...] = ("none", "sd", "ssd")
PROMPTS = [[9, 30, 77], [5, 8], [20, 21, 22, 23], [100, 9, 9, 9]]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Any]]:
    """Pairs whose tokenizers have the markers as special tokens, or not. The draft is the target with disturbed
    weights."""
    found: dict[bool, dict[str, Any]] = {}
    for special in (False, True):
        folder = tmp_path_factory.mktemp("pair")
        tokenizer: Any = tiny_tokenizer(VOCABULARY)
        if special:
            tokenizer.add_tokens([AddedToken(marker, special=True) for marker in MARKERS], special_tokens=True)
        for role, noise in (("target", 0.0), ("draft", 0.02)):
            model = tiny_model("llama", vocab_size=len(tokenizer))
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(torch.randn(weight.shape, generator=generator) * weight.std(correction=0) * noise)
            model.save_pretrained(folder / role)
            tokenizer.save_pretrained(folder / role)
        found[special] = {
            **{role: {"model": str(folder / role), "compile": False} for role in ("target", "draft")},
            "speculation": {"lookahead": 4, "governor": False},
            "engine": {"max_batch": len(PROMPTS), "max_model_len": 320},
        }
    return found


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_calls_are_those_of_plain_decoding(configs: dict[bool, dict[str, Any]], way: Way) -> None:
    async def compared() -> dict[str, Any]:
        async with AsyncEngine(configs[way.special], launch=InprocPipeline) as engine:
            return await compare(engine, PROMPTS, METHODS, ways=[way], max_tokens=200, at_once=len(PROMPTS))

    tallies = asyncio.run(compared())[way.name].values()
    assert [tally["different"] for tally in tallies] == [[], []]
    assert sum(tally["replays"] for tally in tallies) == len(SIZES) * len(PROMPTS)
    assert sum(tally["calls"] for tally in tallies) >= sum(tally["with_calls"] for tally in tallies) >= 2
    for method in METHODS:
        assert (max(tally["most_at_once"][method] for tally in tallies) > 1) is (method != "none")
    if way.reasoning not in ("none", "gpt_oss"):  # every answer begins with it
        assert sum(tally["reasoning"] for tally in tallies) == len(PROMPTS)


def test_every_format_is_compared() -> None:
    assert {way.calls for way in WAYS} == {*CALL_FORMATS}
    assert {way.reasoning for way in WAYS} - {"none"} == {*REASONING_FORMATS}


def test_what_differs_is_told(configs: dict[bool, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser that depends on the cuts is found."""
    from ssd.serving.parsers.reader import Trimmed

    monkeypatch.setattr(Trimmed, "add", lambda _self, text: text.strip())
    [way] = [way for way in WAYS if way.name == "hermes+think"]

    async def compared() -> dict[str, Any]:
        async with AsyncEngine(configs[False], launch=InprocPipeline) as engine:
            return await compare(engine, PROMPTS[:2], METHODS[:2], ways=[way], max_tokens=60, at_once=2)

    assert any(tally["different"] for tally in asyncio.run(compared())[way.name].values())
