"""A draft that lies, fails or breaks the protocol costs speed, never a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ssd import LLM, SamplingParams
from ssd.pipeline.draft.worker import DraftedTrees, DraftWorker
from ssd.pipeline.round.frames import Frames, SpeculationSet
from ssd.pipeline.runtime import build_draft
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.sampling.slots import SlotSampling

Configure = Callable[..., dict[str, Any]]

PARAMS = [
    SamplingParams(max_tokens=30, ignore_eos=True),
    SamplingParams(max_tokens=30, ignore_eos=True, temperature=1.0, seed=3),
    SamplingParams(max_tokens=21, ignore_eos=True, temperature=0.8, top_p=0.9, seed=4),
]
ASKED = [[9, 30, 77], [5], list(range(20, 50))]


@pytest.fixture
def config(tiny_config: Configure) -> dict[str, Any]:
    engine = {"max_batch": 2, "draft_restarts": 0}
    return tiny_config(engine=engine, speculation={"lookahead": 4, "siblings": 1, "forecast": {"budget": 20}})


def check(config: dict[str, Any], method: str = "ssd") -> tuple[str | None, int]:
    """Equal tokens; why the draft was lost, and how many candidates were accepted."""
    with LLM(config, launch=InprocPipeline) as llm:
        outputs = llm.generate(ASKED, [replace(p, method=method) for p in PARAMS])
        degraded = llm.degraded
        plain = llm.generate(ASKED, [replace(p, method="none") for p in PARAMS])
        assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
        assert [output.finish_reason for output in outputs] == ["length"] * 3
    return degraded, sum(output.speculation.accepted for output in outputs)


@pytest.mark.parametrize("method", ["sd", "ssd"])
@pytest.mark.parametrize("low_high", [(-1, 128), (-(2**31), 2**31 - 1), (7, 8)], ids=["tokens", "any int32", "one"])
def test_random_tokens(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, low_high: tuple[int, int], method: str
) -> None:
    """Random tokens, invalid ids, children of absent nodes, siblings with one token."""
    generator = torch.Generator().manual_seed(1)

    def random(low: int, high: int, *shape: int) -> np.ndarray:
        return torch.randint(low, high, shape, generator=generator).numpy()

    def speculate(self: DraftWorker, bell: Any) -> SpeculationSet:
        batch, branches, below = len(self.rows), self.forecast.budget, self.shape.nodes - 1
        # Guesses over the whole vocabulary, so that some hit and the trees are verified.
        guesses = random(0, 128, batch, branches)
        nodes = random(-1, self.shape.nodes + 1, batch, branches)
        return SpeculationSet(nodes=nodes, guesses=guesses, trees=random(*low_high, batch, branches, below))

    def draft_now(self: DraftWorker, missed: list[bool]) -> DraftedTrees:
        trees = random(*low_high, len(self.rows), self.shape.nodes - 1).tolist()
        for slot in (slot for slot, waits in enumerate(missed) if waits):
            self.trees[slot][1:] = trees[slot]
        return DraftedTrees(trees=trees, draft=None)

    monkeypatch.setattr(DraftWorker, "speculate", speculate)
    monkeypatch.setattr(DraftWorker, "draft_now", draft_now)
    degraded, _ = check(config, method)
    assert degraded is None


def test_trees_of_another_outcome(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Good speculations, each for its neighbour's outcome."""
    speculate = DraftWorker.speculate

    def shifted(self: DraftWorker, bell: Any) -> SpeculationSet:
        honest = speculate(self, bell)
        return replace(honest, trees=np.roll(honest.trees, 1, axis=1))

    monkeypatch.setattr(DraftWorker, "speculate", shifted)
    assert check(config)[0] is None


def test_short_branches(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees with nodes missing, at any depth."""
    speculate, generator = DraftWorker.speculate, np.random.default_rng(2)

    def holey(self: DraftWorker, bell: Any) -> SpeculationSet:
        honest = speculate(self, bell)
        holes = generator.random(honest.trees.shape) < 0.3
        return replace(honest, trees=np.where(holes, -1, honest.trees))

    monkeypatch.setattr(DraftWorker, "speculate", holey)
    degraded, accepted = check(config)
    assert degraded is None
    assert accepted > 0


def test_other_noise(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft with another seed only guesses badly."""

    class Other(SlotSampling):
        def set(self, slot: int, params: SamplingParams) -> None:
            super().set(slot, replace(params, seed=params.seed + 1))

    monkeypatch.setattr(build_draft, "SlotSampling", Other)
    assert check(config)[0] is None


@pytest.mark.parametrize("after", [0, 1, 5])
def test_fails(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    speculate, calls = DraftWorker.speculate, iter(range(1000))

    def breaking(self: DraftWorker, bell: Any) -> SpeculationSet:
        if next(calls) >= after:
            raise ZeroDivisionError("out of ideas")
        return speculate(self, bell)

    monkeypatch.setattr(DraftWorker, "speculate", breaking)
    assert check(config)[0]


def test_fails_while_the_verifier_waits(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftWorker, "draft_now", lambda _self, _missed: 1 / 0)
    assert check(config, "sd")[0]


def test_frames_of_another_round(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pack = Frames.pack_speculation

    def skips(self: Frames, speculation: SpeculationSet, round: int, spent_us: int) -> np.ndarray:
        return pack(self, speculation, round + (round > 3), spent_us)

    monkeypatch.setattr(Frames, "pack_speculation", skips)
    degraded, _ = check(config)
    assert degraded is not None and "out of step" in degraded
