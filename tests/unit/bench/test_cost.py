"""Costs: the arithmetic against cases computed by hand, and against what a run measures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ssd.bench.report.plan_report import print_advice
from ssd.bench.simulate.cost import Prices, acceptance_of, break_even, cost, devices, sources
from ssd.bench.simulate.plan import Check, Space, advise
from ssd.bench.simulate.profile import Costs, Independent, Line, Profile
from ssd.bench.simulate.simulator import Setting, simulate
from ssd.config.load import load_config
from ssd.config.sections import CostConfig

PUBLISHED = Path(__file__).resolve().parents[3] / "benchmarks/results/validate.json"
PRICES = Prices(target=3.6, draft=0.9, currency="EUR")
SPACE = Space(lookaheads=(2, 4), budgets=(4, 16), rows=())


def profile(acceptance: float = 0.8) -> Profile:
    costs = Costs(
        target={1: 0.010, 9: 0.012},
        tree=Line(base=0.001, per_step=0.0015),
        jit=Line(per_step=0.0015),
        overhead={"none": 0.0, "sd": 0.0005, "ssd": 0.0002},
    )
    content = Independent(acceptance=acceptance, miss=acceptance, power=0.8)
    return Profile(name="made", machine="a machine", costs={"0": costs}, content={"0": content})


@pytest.mark.parametrize(
    ("setting", "rate", "expected"),
    [
        # 10⁶ tokens at 100 per second take 10,000 s; the target's device costs 3.6 / 3600 = 0.001 a second.
        (Setting(method="none_fast"), 100.0, (10_000, 0, 10.0)),
        # The draft of sd holds no device.
        (Setting(method="sd"), 200.0, (5_000, 0, 5.0)),
        # 5,000 s on one target and one draft device: 5 + 5,000 × 0.00025.
        (Setting(method="ssd"), 200.0, (5_000, 5_000, 6.25)),
        (Setting(method="ssd", target_devices=4, draft_devices=2), 1000.0, (4_000, 2_000, 4.5)),
    ],
    ids=["plain", "sd", "ssd", "ssd on six"],
)
def test_cost_of_a_million_tokens(setting: Setting, rate: float, expected: tuple[float, float, float]) -> None:
    found = cost(setting, rate, PRICES)
    assert (found.target_device_seconds, found.draft_device_seconds, found.money) == pytest.approx(expected)


def test_break_even() -> None:
    # The draft adds a quarter of the price. Plain decoding: 100 tokens per second; a round takes 15 ms.
    found = break_even(Setting(method="ssd", lookahead=2), 0.015, 100.0, PRICES)
    assert found.speedup == pytest.approx(1.25)
    assert found.acceptance_length == pytest.approx(1.25 * 100 * 0.015)  # 1.875 tokens per round
    alpha = found.acceptance
    assert alpha is not None and 1 + alpha + alpha**2 == pytest.approx(1.875)
    # Two sequences need half as many tokens each for the same rate.
    halved = break_even(Setting(method="ssd", lookahead=2, batch=2), 0.015, 100.0, PRICES)
    assert halved.acceptance_length == pytest.approx(found.acceptance_length / 2)


@pytest.mark.parametrize(
    ("length", "lookahead", "expected"),
    [(0.5, 4, 0.0), (1.0, 4, 0.0), (1.75, 2, 0.5), (1.5, 1, 0.5), (5.0, 4, 1.0), (5.01, 4, None), (1.0, 0, 0.0)],
)
def test_acceptance_of_a_length(length: float, lookahead: int, expected: float | None) -> None:
    found = acceptance_of(length, lookahead)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-6))


def test_at_the_break_even_acceptance_the_money_is_the_same() -> None:
    """The closed form against the simulator, which draws lengths with that acceptance."""
    setting = Setting(method="sd", lookahead=4)
    plain = simulate(profile(), Setting(method="none_fast"), tokens=20_000)
    one = simulate(profile(0.8), setting, tokens=20_000)
    even = break_even(setting, one.seconds / one.count, plain.tokens_per_second, PRICES)
    assert even.acceptance is not None
    at = simulate(profile(even.acceptance), setting, tokens=200_000)
    same = cost(setting, at.tokens_per_second, PRICES).money
    assert same == pytest.approx(cost(plain.setting, plain.tokens_per_second, PRICES).money, rel=0.03)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Prices(target=1, draft=1, currency="device-hours", assumed=("target_per_hour", "draft_per_hour"))),
        ({"target_per_hour": 2.0}, Prices(target=2, draft=2, currency="USD", assumed=("draft_per_hour",))),
        (
            {"target_per_hour": 2.0, "draft_per_hour": 0.0, "currency": "EUR"},
            Prices(target=2, draft=0, currency="EUR"),
        ),
    ],
    ids=["none", "one", "both"],
)
def test_prices_of_a_configuration(given: dict[str, Any], expected: Prices) -> None:
    assert Prices.of(CostConfig(**given)) == expected


def test_advice_says_what_it_costs_and_where_that_comes_from() -> None:
    advice = advise(profile(), 0.0, SPACE, prices=PRICES)
    assert json.loads(json.dumps(advice)) == advice
    methods = advice["cost"]["batch"]["1"]
    plain, ssd = methods["none_fast"], methods["ssd"]
    rate = advice["ssd"]["tokens_per_second"]
    assert ssd["target_device_seconds"] == ssd["draft_device_seconds"] == pytest.approx(1e6 / rate)
    assert ssd["over_plain"] == pytest.approx(ssd["money"] / plain["money"])
    assert plain["draft_device_seconds"] == methods["sd"]["draft_device_seconds"] == 0
    assert "break_even" not in plain and plain["over_plain"] == 1
    # It is cheaper than plain decoding exactly where more tokens per round are accepted than at break-even.
    for one in (methods["sd"], ssd):
        assert (one["over_plain"] < 1) == (one["acceptance_length"] > one["break_even"]["acceptance_length"])
    console = Console(file=io.StringIO(), width=200)
    print_advice(advice, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "EUR" in printed and "break-even" in printed
    assert "measured: forward times (a machine)" in printed and "assumed: devices are paid for" in printed


def test_measured_and_assumed_are_told_apart() -> None:
    found = sources(profile(), 0.0, Prices.of(CostConfig(target_per_hour=2.0)))
    assert found["configured"] == ["target_per_hour"]
    assert any("draft_per_hour" in one for one in found["assumed"])
    assert any("acceptance" in one for one in found["assumed"])  # a closed form, not recorded text
    assert not any("acceptance" in one for one in found["measured"])


def test_a_check_compares_measured_and_simulated_device_seconds() -> None:
    check = Check(setting=Setting(method="ssd"), measured=200.0, simulated=100.0, machine=2.0)
    assert check.error == 0
    seconds = check.to_json()["device_seconds_per_million"]
    assert seconds == {"measured": pytest.approx(10_000), "simulated": pytest.approx(10_000)}


def test_published_runs_cost_what_the_simulator_says() -> None:
    """Real runs of settings that the profile was not fitted to."""
    checks = json.loads(PUBLISHED.read_text(encoding="utf-8"))["checks"]
    errors = []
    for found in checks:
        numbers = {name: found[name] for name in ("measured", "simulated", "machine")}
        told = Check(setting=Setting(**found["setting"]), **numbers).to_json()["device_seconds_per_million"]
        count = 2 if found["setting"]["method"] == "ssd" else 1
        assert told["measured"] == pytest.approx(count * 1e6 / found["measured"])
        errors.append(abs(told["measured"] / told["simulated"] - 1))
    assert len(errors) >= 16 and sum(errors) / len(errors) < 0.1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"target": (1, None), "draft": (1, None)}),
        (["cost.target_per_hour=4"], {"target": (1, 4.0), "draft": (1, 4.0)}),
        (["target.device=cuda:0", "draft.device=cuda:0"], {"target": (1, None), "draft": (0, None)}),
        (
            ["target.device=cuda:0", "draft.device=cuda:1", "cost.draft_per_hour=1"],
            {"target": (1, None), "draft": (1, 1.0)},
        ),
    ],
    ids=["embedded", "priced", "one GPU", "draft priced"],
)
def test_devices_of_a_configuration(overrides: list[str], expected: dict[str, tuple[int, float | None]]) -> None:
    found = load_config("embedded", overrides).devices
    assert {one.worker: (one.count, one.price_per_hour) for one in found} == expected


def test_devices_of_a_setting() -> None:
    assert devices(Setting(method="ssd", target_devices=2, draft_devices=3)) == (2, 3)
    assert devices(Setting(method="sd", target_devices=2, draft_devices=3)) == (2, 0)
