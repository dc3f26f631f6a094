"""What one request may ask for at once: several completions, stop strings, log-probabilities, penalties and
filters. Tokens, text, ends and log-probabilities of every method are plain decoding's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ssd import LLM, RequestOutput, SamplingParams
from ssd.pipeline.runtime.launch import InprocPipeline

PROMPTS = [[9, 30, 77], [5], list(range(20, 44)), [100, 9, 9, 9]]
BASE = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=2, repetition_penalty=1.2, frequency_penalty=0.3)
WARM = replace(BASE, temperature=0.9, top_p=0.95, min_p=0.01, seed=7, n=2)
KINDS = [BASE, WARM, replace(WARM, n=3, logprobs=0, min_tokens=5), replace(WARM, n=1, top_k=12, presence_penalty=0.6)]


def told(output: RequestOutput) -> list[tuple[Any, ...]]:
    """All that the completions say of themselves, but for how they were made."""
    return [(o.token_ids, o.text, o.finish_reason, o.stop_reason, o.logprobs) for o in output.outputs]


@pytest.mark.parametrize(
    ("verify", "siblings", "batch", "fallback"),
    [("coupled", 0, 3, "jit"), ("coupled", 2, 2, "ngram"), ("rejection", 1, 3, "none"), ("block", 0, 3, "jit")],
)
def test_completions_stops_and_logprobs(
    verify: str, siblings: int, batch: int, fallback: str, tiny_config: Callable[..., dict[str, Any]]
) -> None:
    speculation = {"verify": verify, "siblings": siblings, "fallback": fallback, "forecast": {"budget": 10}}
    config = tiny_config(engine={"max_batch": batch}, speculation=speculation)
    # The rules other than coupled promise the tokens at temperature 0 only.
    params = KINDS if verify == "coupled" else [replace(kind, temperature=0.0, n=1) for kind in KINDS]
    with LLM(config, launch=InprocPipeline) as llm:
        free = llm.generate(PROMPTS, [replace(p, method="none") for p in params])
        # Of every second request: what stands in the middle of each completion's text.
        stopping = list(params)
        for at in (0, 2):
            middles = tuple(o.text[len(o.text) // 2 :][:3] for o in free[at].outputs)
            stopping[at] = replace(params[at], stop=middles, include_stop_str_in_output=at > 1)
        plain, *others = (
            llm.generate(PROMPTS, [replace(p, method=method) for p in stopping]) for method in ("none", "sd", "ssd")
        )
        for output, p, whole in zip(plain, stopping, free, strict=True):
            assert len(output.outputs) == p.n
            for one, uncut in zip(output.outputs, whole.outputs, strict=True):
                assert one.finish_reason == ("stop" if p.stop else "length")
                assert one.token_ids == uncut.token_ids[: len(one.token_ids)]
                assert one.logprobs is not None and len(one.logprobs) == len(one.token_ids)
                assert not p.stop or one.stop_reason in p.stop
        for outputs in others:
            assert [told(output) for output in outputs] == [told(output) for output in plain]
            assert sum(o.speculation.accepted for output in outputs for o in output.outputs) > 10
        events = list(llm.stream(PROMPTS[2], replace(stopping[2], method="ssd")))
        for one in plain[2].outputs:
            ours = [event for event in events if event.index == one.index]
            assert "".join(event.text for event in ours) == one.text
            last = ours[-1].output
            assert last is not None and (last.token_ids, last.logprobs) == (one.token_ids, one.logprobs)
        assert llm.degraded is None
