"""End to end against ``transformers``: our engine's tokens are those of its ``generate``, with the same
parameters, whatever drafts.

At temperature 0 that is ``generate(do_sample=False)``. Above it, ``generate(do_sample=True)`` with our noise where
it calls ``torch.multinomial``: processors and filters, their order and their defaults are all its own, and its
probabilities p choose argmax(log p + noise). Penalties that ``transformers`` lacks stand in
``test_processed_equality.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ssd import LLM, SamplingParams
from ssd.decoding.noise import gumbel
from ssd.pipeline.runtime.launch import InprocPipeline

VOCABULARY, COUNT = 128, 20
PROMPTS = [[9, 30, 77], [5], list(range(20, 44)), [100, 9, 9, 9]]
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 9},
    {"top_p": 0.85},
    {"min_p": 0.08},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.02},
]
ENDS = tuple(range(4, 64))
ALLOWED = tuple(range(8, 128, 3))
# Of each: our fields, and generate's arguments that mean the same.
PROCESSED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    ({"repetition_penalty": 0.7}, {"repetition_penalty": 0.7}),
    (
        {"logit_bias": {12: 3.0, 40: 2.0}, "repetition_penalty": 1.3},  # the bias is penalized, as the logit is
        {"sequence_bias": [[[12], 3.0], [[40], 2.0]], "repetition_penalty": 1.3},
    ),
    (
        {"allowed_token_ids": ALLOWED, "bad_words": ([17], [20, 23]), "repetition_penalty": 1.2},
        {
            "suppress_tokens": sorted(set(range(VOCABULARY)) - set(ALLOWED)),
            "bad_words_ids": [[17], [20, 23]],
            "repetition_penalty": 1.2,
        },
    ),
    (
        {"min_tokens": 11, "stop_token_ids": ENDS, "ignore_eos": False, "repetition_penalty": 1.1},
        {"min_new_tokens": 11, "eos_token_id": [0, *ENDS], "repetition_penalty": 1.1},
    ),
]


def generated(model: Any, prompt: list[int], params: SamplingParams, **theirs: Any) -> list[int]:
    """What ``generate`` appends to the prompt."""
    calls = 0

    def with_our_noise(probs: Tensor, num_samples: int) -> Tensor:
        nonlocal calls
        assert probs.shape == (1, VOCABULARY) and num_samples == 1
        noise = gumbel(torch.tensor([params.seed]), torch.tensor([len(prompt) + calls]), VOCABULARY)
        calls += 1
        return (probs.log() + noise).argmax(-1, keepdim=True)

    warm = params.temperature > 0
    sampling = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
    arguments = {"eos_token_id": None, "pad_token_id": 0, **(sampling if warm else {}), **theirs}
    ids = torch.tensor([prompt])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", with_our_noise)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=warm, max_new_tokens=COUNT, **arguments
        )
    tokens = found[0, len(prompt) :].tolist()
    assert calls == (len(tokens) if warm else 0)
    return tokens


@pytest.fixture(scope="module")
def cases(folder_of: Callable[..., Any]) -> list[tuple[list[int], SamplingParams, list[int]]]:
    """Prompt, parameters, and the tokens ``generate`` makes of them."""
    model = AutoModelForCausalLM.from_pretrained(folder_of("llama", "target"), dtype=torch.float32)
    made = []
    for at, (ours, theirs) in enumerate(PROCESSED):
        settings = [(0.0, {}), *((0.8 + 0.3 * (at % 3), filters) for filters in FILTERS)]
        for number, (temperature, filters) in enumerate(settings):
            prompt = PROMPTS[(at + number) % len(PROMPTS)]
            given = {"ignore_eos": True, **ours, **filters}
            params = SamplingParams(temperature=temperature, seed=10 * at + number, max_tokens=COUNT, **given)
            made.append((prompt, params, generated(model, prompt, params, **theirs)))
    return made


def test_every_parameter_matters(cases: Any, folder_of: Callable[..., Any]) -> None:
    """What is compared below is not plain sampling: without its parameters a case has other tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder_of("llama", "target"), dtype=torch.float32)
    free = [
        generated(model, prompt, SamplingParams(temperature=params.temperature, seed=params.seed))
        for prompt, params, _ in cases
    ]
    changed = [tokens != expected for tokens, (_, _, expected) in zip(free, cases, strict=True)]
    assert not any(changed[:2])  # nothing asked for
    for at in range(len(PROCESSED)):
        assert sum(changed[6 * at : 6 * at + 6]) >= (5 if at else 3)
    assert any(len(tokens) < COUNT for _, _, tokens in cases)


@pytest.mark.parametrize(
    ("batch", "siblings", "lookahead", "fallback"), [(4, 0, 4, "jit"), (4, 2, 3, "none"), (3, 1, 2, "ngram")]
)
def test_tokens_are_those_of_generate(
    batch: int, siblings: int, lookahead: int, fallback: str, cases: Any, tiny_config: Callable[..., dict[str, Any]]
) -> None:
    speculation = {"lookahead": lookahead, "siblings": siblings, "fallback": fallback, "forecast": {"budget": 12}}
    with LLM(tiny_config(engine={"max_batch": batch}, speculation=speculation), launch=InprocPipeline) as llm:
        for method in ("none", "sd", "ssd"):
            outputs = llm.generate(
                [prompt for prompt, _, _ in cases], [replace(params, method=method) for _, params, _ in cases]
            )
            for output, (_, params, expected) in zip(outputs, cases, strict=True):
                assert list(output.token_ids) == expected, (method, params)
            if method != "none":
                assert sum(output.speculation.accepted for output in outputs) > len(cases)
        assert llm.degraded is None
