"""Fewer rows, the same bits: when strict numerics go without padding, and what is decoded then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssd import LLM, SamplingParams
from ssd.config.load import load_config
from ssd.engine.front import make_plan
from ssd.models.runner import ForwardRunner
from ssd.pipeline.runtime.build_verifier import build_verifier
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.verifier import forward_rows
from ssd.pipeline.verifier.decider import Decider, Decision
from ssd.pipeline.verifier.worker import VerifierWorker
from ssd.testing.models.tiny import ARCHITECTURES

Configure = Callable[..., dict[str, Any]]
ASKED = [[9, 30, 77], [5, 6, 5, 6], list(range(20, 60))]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
PARAMS = [GREEDY, replace(GREEDY, temperature=0.8, seed=11), replace(GREEDY, temperature=1.1, seed=3, top_k=9)]


def worker(configure: Configure, **options: Any) -> VerifierWorker:
    return build_verifier(make_plan(load_config(configure(**options)))[1])[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_our_kernels_need_no_padding(architecture: str, tiny_config: Configure) -> None:
    speculation = {"lookahead": 3, "siblings": [2, 0, 1]}
    made = worker(tiny_config, architecture=architecture, engine={"max_batch": 3}, speculation=speculation)
    assert made.runner.ordered_sums and not made.padded


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"attention": "rows"}])
def test_other_kernels_are_padded(options: dict[str, str], tiny_config: Configure) -> None:
    attention = options.pop("attention", "auto")
    config = tiny_config(**options)
    config["target"]["attention"] = attention
    assert worker(lambda: config).padded


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("row", [0, 2, 4])
def test_one_bit_is_noticed(rows: int, row: int, tiny_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the logits of one row of one forward, the whole tree's or a single row's."""
    decide = Decider.decide

    def off(self: Decider, plan: Any, *rest: Any, **others: Any) -> Decision:
        found = decide(self, plan, *rest, **others)
        if (plan.rows == 1) == (rows == 1):
            last = found.logits[-1, row % plan.rows, -1:]
            last.view(torch.int32).add_(1)
        return found

    monkeypatch.setattr(Decider, "decide", off)
    assert worker(tiny_config, engine={"max_batch": 2}, speculation={"lookahead": 3, "siblings": [0, 0, 2]}).padded


def test_keys_are_compared(tiny_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the same bits over keys of others: the next round would tell."""
    decide = Decider.decide

    def off(self: Decider, plan: Any, context: int, lengths: torch.Tensor, *rest: Any, **others: Any) -> Decision:
        found = decide(self, plan, context, lengths, *rest, **others)
        if plan.rows == 1:
            self._runner.cache.main[0][-1][0, 0, int(lengths[0]), 0].view(torch.int32).add_(1)
        return found

    monkeypatch.setattr(Decider, "decide", off)
    # The last layer's keys of earlier rows are seen by later ones: the logits of the chain's last row say nothing.
    assert worker(tiny_config, speculation={"lookahead": 1}).padded


def test_fewer_slots_are_compared(tiny_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    decide = Decider.decide

    def off(self: Decider, *rest: Any, slots: torch.Tensor | None = None) -> Decision:
        found = decide(self, *rest, slots=slots)
        if slots is not None:
            found.logits[0, 0, :1].view(torch.int32).add_(1)
        return found

    monkeypatch.setattr(Decider, "decide", off)
    assert worker(tiny_config, engine={"max_batch": 3}).padded


def test_experts_are_padded(tiny_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    made = worker(tiny_config)
    monkeypatch.setattr(made.runner.model.config, "num_local_experts", 4, raising=False)
    assert not made.runner.ordered_sums


@pytest.mark.parametrize("lookahead", [3, "auto"])
def test_the_same_tokens_as_padded(
    lookahead: int | str, tiny_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    speculation = {"lookahead": lookahead, "governor": True, "fallback": "auto", "forecast": {"budget": 6}}
    config = tiny_config(engine={"max_batch": 3}, speculation=speculation)

    def tokens() -> dict[str, list[list[int]]]:
        with LLM(config, launch=InprocPipeline) as llm:
            return {
                method: [
                    [*output.token_ids]
                    for output in llm.generate(ASKED, [replace(params, method=method) for params in PARAMS])
                ]
                for method in ("none", "none_fast", "sd", "ssd")
            }

    narrow = tokens()
    monkeypatch.setattr(forward_rows, "interchangeable", lambda *_: False)
    padded = tokens()["none"]
    assert all(found == padded for found in narrow.values())


def test_plain_rounds_have_one_row(tiny_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    logits = ForwardRunner.logits
    with LLM(tiny_config(speculation={"lookahead": 3}), launch=InprocPipeline) as llm:
        monkeypatch.setattr(
            ForwardRunner,
            "logits",
            lambda self, plan, *rest, **others: (
                seen.append((self.parameters, plan.rows)),
                logits(self, plan, *rest, **others),
            )[1],
        )
        llm.generate([ASKED[0]], replace(GREEDY, method="none"))
    assert {rows for _, rows in seen} == {1}
