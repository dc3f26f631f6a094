"""Preparing requests holds up nobody, and guards that fail end the engine."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from ssd import SamplingParams
from ssd.engine.front import Front
from ssd.errors import PipelineError, WorkerError
from ssd.grammars.compiler import Grammars
from ssd.request.structured import StructuredOutputsParams
from tests.unit.engine.test_async_engine import LONG, SOON_S, Bench, run


@pytest.mark.parametrize("slow", ["tokenizer", "grammar"])
def test_preparing_a_request_holds_up_nobody(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one prompt is tokenized or its grammar compiled, another stream goes on."""
    began, go_on = threading.Event(), threading.Event()
    tokenize, matcher = Front.tokenize, Grammars.matcher

    def wait() -> None:
        began.set()
        go_on.wait(SOON_S)

    def slow_tokenize(front: Front, text: str) -> list[int]:
        wait()
        return tokenize(front, text)

    def slow_matcher(grammars: Grammars, wanted: StructuredOutputsParams) -> Any:
        wait()
        return matcher(grammars, wanted)

    async def body(bench: Bench) -> None:
        if slow == "tokenizer":
            monkeypatch.setattr(Front, "tokenize", slow_tokenize)
            prompt, params = "def main():", SamplingParams(max_tokens=3)
        else:
            monkeypatch.setattr(Grammars, "matcher", slow_matcher)
            prompt, params = [4], SamplingParams(max_tokens=3, structured_outputs={"regex": "a+"})  # type: ignore[arg-type]
        try:
            preparing = asyncio.ensure_future(bench.engine.generate(prompt, params))
            await bench.until(began.is_set)
            output = await bench.engine.generate([5], SamplingParams(max_tokens=30))
            assert len(output.token_ids) == 30 and not preparing.done()
        finally:
            go_on.set()
        assert len((await preparing).token_ids) == 3

    run(body)


@pytest.mark.parametrize("error", [OSError("no more files"), RuntimeError("a bug"), KeyError("role")], ids=repr)
def test_a_guard_that_fails_ends_the_engine(error: Exception) -> None:
    """Otherwise nobody would notice that workers die."""

    def check() -> list[str]:
        raise error

    async def body(bench: Bench) -> None:
        stream = await bench.engine.open([1], LONG)
        bench.pipeline.check = check  # type: ignore[method-assign]
        with pytest.raises(PipelineError, match="watching the workers failed"):
            async for _ in stream:
                pass
        assert isinstance(await bench.engine.failed(), WorkerError)
        del bench.pipeline.check

    run(body, round_s=0.05)


def test_closing_ends_what_is_being_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()

    def slow(front: Front, text: str) -> list[int]:
        began.set()
        go_on.wait(SOON_S)
        return [4]

    async def whole() -> None:
        bench = Bench()
        async with bench.engine:
            monkeypatch.setattr(Front, "tokenize", slow)
            many = [asyncio.ensure_future(bench.engine.open("x")) for _ in range(8)]
            await bench.until(began.is_set)
        go_on.set()
        for one in many:
            with pytest.raises(PipelineError, match="closed"):
                await one

    asyncio.run(whole())
