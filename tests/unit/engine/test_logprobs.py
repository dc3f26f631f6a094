"""Log-probabilities of emitted tokens: those of one full forward over prompt and output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssd import LLM, RequestOutput, SamplingParams, SpeculationRecord, TokenLogprob
from ssd.pipeline.runtime.launch import InprocPipeline

ASKED = [[9, 30, 77], [5], list(range(20, 50)), [40, 41]]
PARAMS = [
    SamplingParams(max_tokens=20, ignore_eos=True, logprobs=3),
    # Raw: whatever the choice was made from.
    SamplingParams(
        max_tokens=20, ignore_eos=True, logprobs=5, temperature=0.9, top_p=0.9, repetition_penalty=1.3, seed=3
    ),
    SamplingParams(max_tokens=17, logprobs=0, temperature=1.2, logit_bias={7: 5.0}, min_tokens=17, seed=4),
    SamplingParams(max_tokens=20, ignore_eos=True),
]


def rescored(model: Any, output: RequestOutput) -> torch.Tensor:
    ids = torch.tensor([[*output.prompt_token_ids, *output.token_ids]])
    with torch.no_grad():
        logprobs = model(ids).logits[0].float().log_softmax(-1)
    return logprobs[len(output.prompt_token_ids) - 1 : -1]


@pytest.mark.parametrize("siblings", [0, 2])
def test_as_rescored_by_transformers(
    siblings: int, tiny_config: Callable[..., Any], folder_of: Callable[..., Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder_of("llama", "target"), dtype=torch.float32)
    config = tiny_config(engine={"max_batch": 3}, speculation={"lookahead": 4, "siblings": siblings})
    with LLM(config, launch=InprocPipeline) as llm:
        outputs = {
            method: llm.generate(ASKED, [replace(p, method=method) for p in PARAMS]) for method in ("none", "sd", "ssd")
        }
        assert llm.degraded is None
    assert sum(output.speculation.accepted for output in outputs["ssd"]) > 10
    ranks = set()
    for method in ("none", "sd", "ssd"):
        for output, p, plain in zip(outputs[method], PARAMS, outputs["none"], strict=True):
            assert output.token_ids == plain.token_ids
            # The very numbers, as everything else.
            assert output.logprobs == plain.logprobs
            if p.logprobs is None:
                assert output.logprobs is None and output.cumulative_logprob is None
                continue
            assert output.logprobs is not None
            expected = rescored(model, output)
            assert len(output.logprobs) == len(output.token_ids) == len(expected)
            for token, given, row in zip(output.token_ids, output.logprobs, expected, strict=True):
                assert given.token_id == token
                assert given.logprob == pytest.approx(float(row[token]), abs=1e-4)
                assert given.rank == 1 + int((row > row[token]).sum())
                ranks.add(given.rank)
                assert len(given.top) == p.logprobs
                best = row.topk(max(1, p.logprobs))
                for (token_id, value), top_id, top in zip(given.top, best.indices, best.values, strict=False):
                    assert token_id == int(top_id)
                    assert value == pytest.approx(float(top), abs=1e-4)
            total = float(expected.gather(1, torch.tensor(output.token_ids)[:, None]).sum())
            assert output.cumulative_logprob == pytest.approx(total, abs=1e-3)
    assert len(ranks) > 2


def test_bfloat16_targets_report_float32(tiny_config: Callable[..., Any]) -> None:
    with LLM(tiny_config(dtype="bfloat16"), launch=InprocPipeline) as llm:
        (output,) = llm.generate([[9, 30]], SamplingParams(max_tokens=8, logprobs=20, ignore_eos=True))
    assert output.logprobs is not None
    for token in output.logprobs:
        assert token.logprob == token.top[0][1] and token.rank == 1
        assert [value for _, value in token.top] == sorted((value for _, value in token.top), reverse=True)
        assert 0.5 < sum(2.718281828**value for _, value in token.top) <= 1.0001


def test_outputs_cross_an_actor_call() -> None:
    """As plain data, as ``PipelineActor`` answers, and back."""
    token = TokenLogprob(token_id=4, logprob=-0.5, rank=2, top=((7, -0.25), (4, -0.5)))
    other = RequestOutput(
        prompt="a",
        prompt_token_ids=(1,),
        text="b",
        token_ids=(4,),
        finish_reason="stop",
        speculation=SpeculationRecord(rounds=1, accepted_histogram=[1]),
        decode_s=0.5,
        stop_reason=4,
        logprobs=(token,),
        index=1,
    )
    first = replace(other, index=0, logprobs=None, others=(other,), stop_reason="b")
    assert RequestOutput.from_dict(asdict(first)) == first
