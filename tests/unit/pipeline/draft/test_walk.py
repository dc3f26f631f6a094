"""Walks of the draft: every executor drafts the same, and rows without any allowed token harm nobody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssd import LLM, SamplingParams
from ssd.config.load import load_config
from ssd.config.sections import Config
from ssd.decoding.trees.shape import ABSENT
from ssd.engine.front import make_plan
from ssd.models.runner import ForwardRunner
from ssd.pipeline.draft.executors import DraftBatch, InParts, StepByStep, Whole
from ssd.pipeline.draft.worker import DraftWorker
from ssd.pipeline.runtime.build_draft import build_draft
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.transport.messages import Admit

Configure = Callable[..., dict[str, Any]]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
WARM = replace(GREEDY, temperature=0.9, seed=4)
PROMPTS = [[5, 6, 7, 5, 6], [9, 30]]
GRAMMAR: dict[str, Any] = {"structured_outputs": {"regex": "[ab]{6}"}}
# None of these leaves a token that the grammar allows.
STUCK = [
    {"allowed_token_ids": (3,)},
    {"allowed_token_ids": (3, 4), "presence_penalty": 1.0},
    {"allowed_token_ids": (3, 4), "temperature": 1.0, "seed": 2},
]


def worker_of(config: Config, params: list[SamplingParams]) -> DraftWorker:
    """A draft with the sequences in its slots, whole."""
    worker = build_draft(make_plan(config)[1])[0]
    for slot, (prompt, asked) in enumerate(zip(PROMPTS, params, strict=True)):
        worker.admit(Admit(slot=slot, tokens=prompt, params=asked, forecasts=True, prompt_length=len(prompt)))
        worker._prefilled = False
        worker._catch_up()
    return worker


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("copy_bias", [[], [1.0, 2.0]], ids=["", "copying"])
def test_executors_draft_alike(tiny_config: Configure, params: SamplingParams, copy_bias: list[float]) -> None:
    speculation = {"lookahead": 4, "siblings": [2, 0, 1], "copy_bias": copy_bias, "anytime": True}
    config = load_config(tiny_config(engine={"max_batch": 2}, speculation=speculation))
    worker = worker_of(config, [params, WARM])
    worker.trees = [[6, 7, 5, *[ABSENT] * 5], [30, 9, 4, 3, 2, 8, ABSENT, 11]]
    parts, stepwise = worker.drafting.fused, worker.drafting.stepwise
    assert isinstance(parts, InParts) and isinstance(stepwise, StepByStep)
    for depth in (1, 3, 4):
        _, batch, longest = worker._batch([0, 1], worker.shape.nodes)
        wanted = stepwise.grow(batch, longest, depth)
        for found in (Whole.grow(parts, batch, longest, depth), parts.grow(batch, longest, depth)):
            assert all(torch.equal(one, other) for one, other in zip(found[:3], wanted[:3], strict=True))
        roots = DraftBatch(batch.tokens[:, :1].clone(), batch.lengths)
        assert torch.equal(parts.chains(roots, longest, depth)[0], stepwise.chains(roots, longest, depth)[0])


@pytest.mark.parametrize("stuck", STUCK, ids=str)
@pytest.mark.parametrize("siblings", [0, 2])
@pytest.mark.parametrize("anytime", [False, True])
def test_a_row_without_allowed_tokens_does_not_disturb_others(
    stuck: dict[str, Any], siblings: int, anytime: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar and the other parameters of a request may exclude every token."""
    monkeypatch.setattr(ForwardRunner, "fuses", True)  # as if it compiled
    options = ["engine.max_batch=2", "draft.compile=false", "speculation.lookahead=3"]
    options += [f"speculation.siblings={siblings}", f"speculation.anytime={anytime}"]
    config = load_config("embedded", options)
    workers = [worker_of(config, [params, WARM]) for params in (replace(GREEDY, **GRAMMAR, **stuck), GREEDY)]
    drafted = [worker.draft_now([True, True]).trees for worker in workers]
    sets = [worker.speculate() for worker in workers]
    assert drafted[0][1] == drafted[1][1] and ABSENT not in drafted[0][1]
    for one, other in zip((sets[0].nodes, sets[0].trees), (sets[1].nodes, sets[1].trees), strict=True):
        assert (one[1] == other[1]).all()


@pytest.mark.parametrize("method", ["sd", "ssd"])
def test_such_a_request_ends_alone(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ForwardRunner, "fuses", True)
    options = ["engine.max_batch=2", "speculation.siblings=1", "target.compile=false", "draft.compile=false"]
    with LLM(load_config("embedded", options), launch=InprocPipeline) as llm:
        (alone,) = llm.generate(PROMPTS[1:], replace(WARM, method="none"))
        asked = replace(GREEDY, method=method, allowed_token_ids=(3,), **GRAMMAR)
        failed, fine = llm.generate(PROMPTS, [asked, replace(WARM, method=method)])
        assert (failed.finish_reason, fine.token_ids) == ("error", alone.token_ids)
        assert llm.degraded is None
