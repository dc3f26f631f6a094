"""Real models and workers: the sampled tokens have the target's joint distribution.

How it is measured stands in ``ssd.testing.laws.chi_square``. The seeds are fixed, so these tests pass
always or never.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssd.pipeline.draft import drafting, sampler
from ssd.pipeline.verifier import judge
from ssd.testing.laws.chi_square import (
    CASES,
    FALLBACKS,
    PARAMS,
    Pair,
    check,
    law_of,
    measure,
    sampled,
    save_pair,
    target_law,
)

P_VALUE = 1e-3
SAMPLES = 1280


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("case", CASES)
def test_joint_law(case: str, pair: Pair) -> None:
    histories = sampled(pair, SAMPLES, case)
    results = check(histories, law_of(case), 60)
    assert {"all", "from round 1 on, tree hit", "from round 1 on, tree jit"} <= results.keys()
    assert {depth for depth in range(3) if any(f"after {depth} acc" in name for name in results)} >= {0, 1}
    assert min(results.values()) > P_VALUE, results


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fallback", FALLBACKS)
def test_joint_law_of_many(case: str, fallback: str, pair: Pair) -> None:
    """The whole of ``benchmarks/chi_square.py``: some hundred tests, hence Bonferroni's bound."""
    tests = measure(pair, case, fallback, 40_000, 10**6)["tests"]
    assert min(test["p"] for test in tests) > P_VALUE / 10, tests


def careless_bonus() -> tuple[str, Any]:
    """The bonus token is drawn from the target's distribution after a rejection too."""
    verify = judge.verify_rejection

    def careless(target_probs: torch.Tensor, *rest: Any) -> Any:
        law = verify(target_probs, *rest)
        return law._replace(probs=target_probs[torch.arange(len(law.node)), law.node])

    return "verify_rejection", careless


def another_story() -> tuple[str, Any]:
    """One distribution is drawn from, and another one is sent."""
    stacked = sampler.stacked

    def lying(steps: list[Any], depth: int) -> Any:
        honest = stacked(steps, depth)
        return type(honest)(honest.tokens, honest.probs.sqrt())

    return "stacked", lying


@pytest.mark.parametrize("mistake", [careless_bonus, another_story], ids=lambda m: m.__name__)
def test_mistakes_show(mistake: Callable[[], tuple[str, Any]], pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: as many samples of a pipeline with one mistake do."""
    name, wrong = mistake()
    for module in (judge, sampler, drafting):
        if name in vars(module):
            monkeypatch.setattr(module, name, wrong)
    results = check(sampled(pair, SAMPLES, "rejection"), target_law(), 60)
    assert min(results.values()) < P_VALUE / 100, results


def test_another_temperature_shows(pair: Pair) -> None:
    histories = sampled(pair, SAMPLES, "rejection")
    assert check(histories, target_law(replace(PARAMS, temperature=1.2 * PARAMS.temperature)), 60)["all"] < P_VALUE
