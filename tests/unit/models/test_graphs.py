"""Captured bodies, with a twin of CUDA's capture: which arguments are copied or read in place, what happens
when a body cannot be captured; and whole rounds over captured forwards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ssd.config.load import load_config
from ssd.errors import ConfigError
from ssd.models.cpu import operators
from ssd.models.cuda.graphs import LARGE_BYTES, PLACES, Graphs
from ssd.pipeline.draft.executors import StepByStep
from ssd.pipeline.runtime import launch, runners
from ssd.pipeline.runtime.build_draft import build_draft
from ssd.pipeline.runtime.build_verifier import build_verifier
from ssd.pipeline.runtime.plan import Plan
from ssd.request.sampling_params import SamplingParams
from ssd.testing.twins.rounds import play

CPU = torch.device("cpu")


def twin(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """As CUDA does: a replay reads the addresses of the capture and fills the tensors it returned."""
    outputs, _ = tree_flatten(work())
    kept = work()
    filled, _ = tree_flatten(kept)

    def replay() -> None:
        for own, new in zip(filled, tree_flatten(work())[0], strict=True):
            if own is not new:
                own.copy_(new)

    for own in outputs:
        own.fill_(-7)  # a capture computes nothing
    return replay, kept


@pytest.fixture
def as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies are captured, and the CPU's operators are absent."""
    monkeypatch.setattr(operators, "available", lambda: False)
    monkeypatch.setattr(runners, "_graphs", lambda *_: Graphs(CPU, twin))
    monkeypatch.setattr(StepByStep, "grow", lambda *_: pytest.fail("not captured"))


def refusing(_work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    raise RuntimeError("operation not permitted when stream is capturing\ndetails")


def add(one: Tensor, others: tuple[Tensor, Tensor]) -> Tensor:
    return one + others[0] + others[1][: len(one)]


def test_replays_with_new_arguments_into_the_same_tensor() -> None:
    calls = []

    def body(one: Tensor, others: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(one)
        return add(one, others)

    run, large = Graphs(CPU, twin).of(body, "add"), torch.ones(LARGE_BYTES)
    first = run(torch.tensor([1.0, 2.0]), (torch.tensor([10.0, 20.0]), large))
    assert first.tolist() == [12.0, 23.0]
    large.fill_(2.0)  # read where it lies
    second = run(torch.tensor([3.0, 4.0]), (torch.tensor([0.0, 0.0]), large))
    assert second is first and second.tolist() == [5.0, 6.0]
    assert all(one is calls[0] for one in calls)  # always the graph's own buffer


def test_each_address_of_a_large_argument_has_a_graph_up_to_a_limit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, zero = Graphs(CPU, twin).of(add, "add"), torch.zeros(2)
    places = [torch.full((LARGE_BYTES,), float(n)) for n in range(PLACES + 1)]
    results = [run(zero, (zero, place)) for place in places[:PLACES]]
    assert len({id(result) for result in results}) == PLACES
    assert run(zero, (zero, places[0])) is results[0]
    with caplog.at_level(logging.WARNING):
        for place in places:
            assert run(zero, (zero, place)).tolist() == [place[0].item()] * 2
    assert "add runs without a CUDA graph" in caplog.text


def test_a_body_that_cannot_be_captured_runs_uncaptured(caplog: pytest.LogCaptureFixture) -> None:
    run = Graphs(CPU, refusing).of(add, "verify")
    with caplog.at_level(logging.WARNING):
        for value in (1.0, 2.0):
            assert run(torch.tensor([value]), (torch.ones(1), torch.ones(1))).tolist() == [value + 2]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["verify runs without a CUDA graph: operation not permitted when stream is capturing"]


@pytest.mark.parametrize("attention", ["rows", "tree"])
@pytest.mark.parametrize("siblings", [0, 2])
def test_captured_forwards_decode_the_same_tokens(
    attention: str, siblings: int, tiny_config: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(speculation={"lookahead": 3, "siblings": siblings}, engine={"max_batch": 2})
    plain, both = SamplingParams(max_tokens=20, ignore_eos=True, seed=3), []
    params = [replace(plain, method="ssd"), replace(plain, temperature=0.9, method="ssd")]
    prompts = [list(range(5, 40)), [9, 8, 7]]
    for graphs in (None, Graphs(CPU, twin)):
        wanted = {"attention": attention if graphs else "rows", "graphs": graphs is not None}
        made = load_config({**config, "target": {**config["target"], **wanted}, "draft": {**config["draft"], **wanted}})
        plan = Plan(config=made, vocabulary=128, ends=(0,))
        with monkeypatch.context() as patch:
            if graphs is not None:  # the check for a GPU stands before
                patch.setattr(runners, "_graphs", lambda *_, graphs=graphs: graphs)
            verifier, draft = build_verifier(plan)[0], build_draft(plan)[0]
        assert verifier.runner.attention == wanted["attention"]
        histories = play(verifier, draft, plan, prompts, params)
        both.append([history.tokens for history in histories])
        assert any(one.source == "hit" for history in histories for one in history.rounds)
    assert both[0] == both[1]


@pytest.mark.usefixtures("as_on_gpus")
@pytest.mark.parametrize("asked", [{"top_p": 0.7}, {"top_k": 5, "min_p": 0.1}, {"presence_penalty": 1.0}])
def test_drafts_with_filters_and_penalties_are_captured(
    asked: dict[str, Any], tiny_config: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs, where filters are torch code: in separate graphs, beside those of requests without filters. A draft
    that is the target is always right if it applies everything."""
    made = load_config(tiny_config(draft="target", speculation={"lookahead": 3, "forecast": {"budget": 12}}))
    plan = Plan(config=made, vocabulary=128, ends=(0,))
    verifier, draft = build_verifier(plan)[0], build_draft(plan)[0]
    assert not draft.sampling.filters
    plain = SamplingParams(max_tokens=20, ignore_eos=True, seed=3, temperature=0.9, method="ssd")
    params = [plain, replace(plain, **asked), replace(plain, temperature=0.0)]
    histories = play(verifier, draft, plan, [[9, 8, 7]] * len(params), params)
    with monkeypatch.context() as patch:
        patch.setattr(runners, "_graphs", lambda *_: None)
        verifier = build_verifier(plan)[0]
    alone = play(verifier, draft, plan, [[9, 8, 7]] * len(params), [replace(p, method="none") for p in params])
    for history, expected, wanted in zip(histories, alone, params, strict=True):
        assert history.tokens == expected.tokens
        if wanted.presence_penalty == 0:
            assert all(one.accepted == 3 for one in history.rounds[1:-1])
    assert histories[0].tokens != histories[1].tokens


def test_graphs_on_a_cpu_are_refused(tiny_config: Callable[..., dict[str, Any]]) -> None:
    config = load_config(tiny_config(draft=None, speculation={"method": "none"}), ["target.graphs=true"])
    with pytest.raises(ConfigError, match="graphs: true needs a CUDA device, not cpu"):
        build_verifier(Plan(config=config, vocabulary=128, ends=(0,)))


def test_a_cache_that_does_not_fit_names_the_tokens_that_would(
    tiny_config: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssd.models.device.free_bytes", lambda device: 100_000)
    config = load_config(tiny_config(draft=None, speculation={"method": "none"}))
    with pytest.raises(ConfigError, match=r"KV cache needs 0\.00 GB and cpu has .*max_model_len to about \d+"):
        build_verifier(Plan(config=config, vocabulary=128, ends=(0,)))


@pytest.mark.parametrize(
    ("overrides", "threads"),
    [
        ([], False),
        (["engine.workers=threads"], True),
        (["target.device=cuda:0", "draft.device=cuda:0"], True),
        (["target.device=cuda:0", "draft.device=cuda:0", "engine.workers=processes"], False),
        (["target.device=cuda:0", "draft.device=cuda:1"], False),
    ],
)
def test_two_models_on_one_gpu_run_as_threads(
    overrides: list[str], threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("InprocPipeline", "LocalPipeline"):
        monkeypatch.setattr(launch, name, lambda plan, name=name: name)
    plan = Plan(config=load_config("embedded", overrides), vocabulary=128, ends=(0,))
    assert launch.launch_here(plan) == ("InprocPipeline" if threads else "LocalPipeline")
