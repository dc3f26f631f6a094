"""Candidates from the sequence itself: what is proposed, and that rows with them decode the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd import LLM, SamplingParams
from ssd.decoding.text.ngram import LONGEST, SHORTEST, NgramIndex
from ssd.pipeline.policy.fallback import FallbackChoice
from ssd.pipeline.runtime.launch import InprocPipeline


def searched(tokens: list[int], count: int) -> list[int]:
    """The same by searching."""
    for length in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[start + length + i])
                return text[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 8), st.integers(0, 30))
def test_proposes_what_followed_last_time(tokens: list[int], count: int, cut: int) -> None:
    index = NgramIndex(tokens[:cut])
    index.extend(tokens[cut:])
    assert index.propose(count) == searched(tokens, count)


def test_a_repetition_is_continued() -> None:
    assert NgramIndex([9, 1, 2, 3, 1, 2, 3, 1, 2]).propose(7) == [3, 1, 2, 3, 1, 2, 3]
    assert NgramIndex([1, 2, 3, 4]).propose(3) == []


def test_the_choice_follows_the_measured_rates() -> None:
    choice = FallbackChoice()

    def miss(ngram_tokens: int) -> str:
        source = "ngram" if choice.ngram else "jit"
        if source == "jit":
            choice.waited(1.0)
        choice.served(source, ngram_tokens if source == "ngram" else 3, 2.0)
        return source

    assert {miss(1) for _ in range(3)} == {"jit", "ngram"}  # both are tried
    poor = [miss(1) for _ in range(64)]  # 1 token in 2 s against 3 in 3 s
    assert 0 < poor.count("ngram") <= 64 // 8
    good = [miss(4) for _ in range(200)][100:]
    assert good.count("jit") <= 100 // 8


@pytest.mark.parametrize("verify", ["coupled", "rejection"])
@pytest.mark.parametrize("fallback", ["ngram", "auto"])
@pytest.mark.parametrize("siblings", [0, 1])
def test_equal_to_plain(fallback: str, siblings: int, verify: str, tiny_config: Callable[..., dict[str, Any]]) -> None:
    """Prompts that repeat themselves, so that n-grams are found, accepted and rejected."""
    forecast = {"budget": 2, "shape": "uniform"}  # so that misses are many
    speculation = {"lookahead": 3, "siblings": siblings, "fallback": fallback, "forecast": forecast, "verify": verify}
    config = tiny_config(engine={"max_batch": 2}, speculation={**speculation, "governor": False})
    prompts = [[5, 6, 7, 8] * 5, [9, 9, 9, 4, 5], [11, 12, 13] * 4]
    temperatures = (0.0, 0.8) if verify == "coupled" else (0.0,)
    with LLM(config, launch=InprocPipeline) as llm:
        for temperature in temperatures:
            outputs = {
                method: llm.generate(
                    prompts,
                    SamplingParams(max_tokens=40, temperature=temperature, seed=3, ignore_eos=True, method=method),
                )
                for method in ("none", "ssd")
            }
            assert llm.degraded is None
            for one, plain in zip(outputs["ssd"], outputs["none"], strict=True):
                assert one.token_ids == plain.token_ids
            assert sum(one.speculation.lookups - one.speculation.hits for one in outputs["ssd"]) > 3
