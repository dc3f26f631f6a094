"""An ``LLM`` without workers, with scripted tokens and times; for tests of measurements."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ...config.load import load_config
from ...config.sections import Config
from ...pipeline.transport.messages import RoundReport
from ...request.methods import WITH_DRAFT
from ...request.output import RequestOutput, SpeculationRecord, StreamEvent, TokenLogprob
from ...request.sampling_params import SamplingParams

SECONDS = {"none_fast": 2.0, "none": 2.5, "sd": 1.6, "self": 1.8, "ssd": 1.0}
"""Seconds of decoding each prompt, by method."""


class ScriptedLLM:
    """Answers at once, with the methods of ``LLM``.

    Args:
        wrong: methods whose tokens differ.
        drift: each request takes this many times as long as the one before.
    """

    def __init__(self, *_: object, wrong: tuple[str, ...] = (), drift: float = 1.0, **__: object) -> None:
        self.wrong = wrong
        self.drift = drift
        self.calls: list[tuple[str, str, int]] = []
        self.closed = False
        self.degraded: str | None = None
        self.config = next((one for one in _ if isinstance(one, Config)), load_config("embedded"))
        self.logprobs: tuple[TokenLogprob, ...] | None = None
        """Log-probabilities of every output."""

    def __enter__(self) -> ScriptedLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[RoundReport]]:
        """Yields rounds of one second each; every second one is a hit, the others draft after a miss."""
        yield [
            RoundReport(
                began_s=9.0 + i,
                forward_s=0.5,
                wait_s=0.2,
                draft_s=0.6,
                jit_s=0.3 if i % 2 else None,
                round_s=1.0,
                rows=1,
                lookups=1,
                hits=1 - i % 2,
                tokens=2,
            )
            for i in range(6)
        ]

    def timings(self, *, reset: bool = False) -> dict[str, float | None]:
        assert reset
        return {"round_ms": float(len(self.calls)), "hit_round_ms": None, "forward_ms": 1.0, "draft_ms": 0.5}

    def generate(self, prompts: list[str], params: SamplingParams) -> list[RequestOutput]:
        return [self.answer(prompt, params) for prompt in prompts]

    def stream(self, prompt: str, params: SamplingParams) -> Any:
        output = self.answer(prompt, params)
        yield StreamEvent(text="one ", token_ids=(1,), accepted=0)
        yield StreamEvent(text="two", token_ids=(2,), accepted=1, output=output)

    def answer(self, prompt: str, params: SamplingParams) -> RequestOutput:
        method = params.method or "ssd"
        self.calls.append((prompt, method, params.max_tokens))
        tokens = [len(prompt) * 100 + position for position in range(params.max_tokens)]
        if method in self.wrong:
            tokens[3] = 0
        record = SpeculationRecord(rounds=params.max_tokens, tokens=params.max_tokens)
        if method in WITH_DRAFT:
            record = SpeculationRecord(rounds=10, tokens=40, drafted=40, accepted=30 if prompt == "def f" else 10)
        if method == "ssd":
            record.lookups, record.hits = 9, 6
        return RequestOutput(
            prompt=prompt,
            prompt_token_ids=(1,),
            text="text",
            token_ids=tuple(tokens),
            finish_reason="length",
            speculation=record,
            logprobs=self.logprobs,
            decode_s=SECONDS[method] * self.drift ** len(self.calls),
        )
