"""Prompts of recurrent layers: a chunk at once leaves the states that single steps leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssd.models.runner import ForwardRunner, RunnerOptions
from ssd.testing.models.census import tiny_causal

CONTINUE = ("mamba2", "bamba", "lfm2", "qwen3_next", "qwen3_5_text")
STEP = ("mamba", "jamba")
"""Their code for prompts begins with an empty state."""
PROMPT = torch.arange(3, 53).mul(7).remainder(160).tolist()


def runner(model_type: str) -> ForwardRunner:
    options = RunnerOptions(
        batch=2, capacity=96, scratch_slots=2, prefill_chunk=24, vocabulary=160, chain=4, attention="rows"
    )
    return ForwardRunner(tiny_causal(model_type), options)


def states(runner: ForwardRunner, *, together: bool) -> list[Tensor]:
    slots = runner.cache.states
    assert slots is not None
    slots.advance_together(together)
    runner.prefill(1, PROMPT)
    return [kept[1].clone() for kept in slots.main.values()]


@pytest.mark.parametrize("model_type", CONTINUE)
def test_a_prompt_at_once_leaves_the_states_of_single_steps(model_type: str) -> None:
    one = runner(model_type)
    assert one.cache.states is not None
    assert one.cache.states.together
    for found, expected in zip(states(one, together=True), states(one, together=False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", STEP)
def test_a_model_that_does_not_continue_its_state_steps(model_type: str) -> None:
    slots = runner(model_type).cache.states
    assert slots is not None
    assert not slots.together
