"""The simulator against closed forms (Saguaro, arXiv 2603.03251), replay, profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssd.bench.simulate.profile import Costs, Independent, Line, Profile, Replay, hit_curve, load_profile, survival
from ssd.bench.simulate.simulator import Setting, simulate
from ssd.errors import RequestError

A, K = 0.7, 4
E = (1 - A ** (K + 1)) / (1 - A)
"""Tokens a round brings."""
T_SD = 0.4
"""K draft steps, in units of one verification."""
MANY = 60_000


def profile(*, miss: float = 0.0, power: float = 1.0, tree: float = 0.3, acceptance: float = A) -> Profile:
    """One verification takes a second; nothing else costs anything but drafting."""
    costs = Costs(
        target={1: 1.0},
        tree=Line(base=tree),
        jit=Line(per_step=T_SD / K),
        overhead={"none": 0.0, "sd": 0.0, "ssd": 0.0},
    )
    law = Independent(acceptance=acceptance, miss=miss, power=power)
    return Profile(name="law", costs={"0": costs}, content={"0": law})


def rate(found: Profile, **setting) -> float:
    return simulate(found, Setting(lookahead=K, **setting), tokens=MANY).tokens_per_second


def test_plain_decoding() -> None:
    assert rate(profile(), method="none") == pytest.approx(1.0)
    assert rate(profile(), method="none", batch=4) == pytest.approx(4.0)


def test_plain_rounds_may_be_padded() -> None:
    costs = Costs(target={1: 1.0, 5: 2.0}, tree=Line(), jit=Line(), overhead={"none": 0.0})
    law = Independent(acceptance=A)
    padded, exact = (Profile(name="p", costs={"0": costs}, content={"0": law}, padded=p) for p in (True, False))
    assert (rate(padded, method="none"), rate(exact, method="none")) == pytest.approx((0.5, 1.0))
    assert rate(padded, method="none_fast") == pytest.approx(1.0)


def test_a_round_waits_for_its_later_half() -> None:
    """What the verifier does beyond its forward goes on beside the draft."""
    costs = Costs(target={1: 1.0}, tree=Line(base=1.5), jit=Line(), overhead={"ssd": 0.25}, exchange=-0.1)
    found = Profile(name="r", costs={"0": costs}, content={"0": Independent(acceptance=A, miss=0)})
    assert rate(found) == pytest.approx(E / 1.4, rel=0.01)
    early = costs.model_copy(update={"tree": Line(base=1.2)})
    assert rate(found.model_copy(update={"costs": {"0": early}})) == pytest.approx(E / 1.25, rel=0.01)


def test_sd_is_e_over_one_plus_t() -> None:
    assert rate(profile(), method="sd") == pytest.approx(E / (1 + T_SD), rel=0.01)


def test_ssd_that_always_hits_reaches_the_bound() -> None:
    """(1 + T_SD) · E_hit / E_SD over sd (Corollary 9)."""
    found = profile()
    assert rate(found, method="ssd") / rate(found, method="sd") == pytest.approx(1 + T_SD, rel=0.01)


@pytest.mark.parametrize(("p", "t_p"), [(0.8, 0.3), (0.5, 0.9), (0.8, 1.25)])
def test_ssd_is_theorem_7(p: float, t_p: float) -> None:
    found = profile(miss=1 - p, power=1e-9, tree=t_p)
    expected = E / (p * max(1, t_p) + (1 - p) * (max(1, t_p) + T_SD))
    result = simulate(found, Setting(lookahead=K, budget=1), tokens=MANY)
    assert result.hit_rate == pytest.approx(p, abs=0.01)
    assert result.tokens_per_second == pytest.approx(expected, rel=0.015)


def test_ssd_without_fallback_is_theorem_7_with_nothing_to_accept() -> None:
    p = 0.8
    expected = p * E + (1 - p) * 1.0  # tokens a round, which never waits
    assert rate(profile(miss=1 - p, power=1e-9), budget=1, fallback="none") == pytest.approx(expected, rel=0.015)


def test_a_batch_stalls_when_any_row_misses() -> None:
    p, b = 0.9, 4
    expected = b * E / (p**b + (1 - p**b) * (1 + T_SD))
    assert rate(profile(miss=1 - p, power=1e-9), budget=1, batch=b) == pytest.approx(expected, rel=0.015)


def test_misses_follow_the_power_law_of_the_budget() -> None:
    law = Independent(acceptance=A, miss=0.8, power=0.7)
    curve = hit_curve(law, K, K + 1, [2, 8, 32])
    assert curve == pytest.approx([1 - 0.8 * n**-0.7 for n in (2, 8, 32)], abs=0.02)
    assert survival(law, 3, 4) == pytest.approx([A, A**2, A**3], abs=0.02)


def test_devices_split_the_budget_and_the_forward() -> None:
    costs = Costs(
        target={5: 1.0},
        tree=Line(per_row=0.1),
        jit=Line(),
        overhead={"none": 0.0, "sd": 0.0, "ssd": 0.0},
        tensor_parallel={2: 1.6},
        efficiency=0.75,
    )
    found = Profile(name="d", costs={"0": costs}, content={"0": Independent(acceptance=A, miss=0)})
    one, two = rate(found, budget=8), rate(found, budget=8, draft_devices=2)
    assert one == pytest.approx(E / (K * 8 * 0.1), rel=0.01)
    assert two == pytest.approx(E / (K * 4 * 0.1), rel=0.01)
    assert rate(found, method="none", target_devices=2) == pytest.approx(1.6)
    assert rate(found, method="none", target_devices=4) == pytest.approx(1.5**2)


def test_forward_between_measured_rows() -> None:
    costs = Costs(target={1: 1.0, 5: 1.4, 9: 2.2}, tree=Line(), jit=Line(), overhead={"none": 0, "sd": 0, "ssd": 0})
    assert [costs.forward(rows) for rows in (1, 3, 7, 11)] == pytest.approx([1.0, 1.2, 1.8, 2.6])


def test_published_rounds() -> None:
    """Weili-0234's reproduction on Qwen3-32B / 0.6B: 11.5 ms a verification, draft rounds of .71 + 2.83
    + K · 2.54 ms; 210.9, 193.6, 175.3 and 158.6 tokens/s at K = 4..7. One acceptance explains them."""
    costs = Costs(
        target={1: 0.0115},
        tree=Line(base=0.00354, per_step=0.00254),
        jit=Line(per_step=0.00254),
        overhead={"none": 0, "sd": 0, "ssd": 0},
    )
    content = Independent(acceptance=0.75, miss=0.1, power=1e-9)
    found = Profile(name="qwen", costs={"0": costs}, content={"0": content})
    for depth, published in ((4, 210.9), (5, 193.6), (6, 175.3), (7, 158.6)):
        got = simulate(found, Setting(lookahead=depth, budget=1), tokens=MANY).tokens_per_second
        assert got == pytest.approx(published, rel=0.06)


REPLAY = Replay(
    accepted={"0:1": [[0] * 8, [0] * 3], "2:3": [[2, 0, 1, 0, 2, 0, 0, 0], [1, 1, 0]]},
    needed={"0:1": [[1] * 8, [1] * 3], "2:3": [[4, 0, 8, 0, 16, 4, 4, 0], [4, 4, 4]]},
)


def test_replay_visits_the_positions_rounds_begin_at() -> None:
    walk = REPLAY.walk(2, 3, 0)
    # The first round has only its root; then 0 at 1, 1 at 2, 2 at 4, 0 at 7: the text is over.
    assert [walk(False) for _ in range(5)] == [(0, 1), (0, 0), (1, 8), (2, 16), (0, 0)]
    assert walk(False) == (0, 1)
    assert walk(False) == (1, 4)  # two tokens left: all of it
    with pytest.raises(RequestError, match="no tree of lookahead 3"):
        REPLAY.walk(3, 4, 0)


def test_replayed_hits_depend_on_the_budget() -> None:
    costs = Costs(target={3: 1.0}, tree=Line(), jit=Line(base=1.0), overhead={"none": 0, "sd": 0, "ssd": 0})
    found = Profile(name="r", costs={"0": costs}, content={"0": REPLAY})
    low = simulate(found, Setting(lookahead=2, budget=4), tokens=11)
    high = simulate(found, Setting(lookahead=2, budget=16), tokens=11)
    assert (low.count, low.hits, low.seconds) == (7, 3, 7 + 4)
    assert (high.count, high.hits, high.seconds) == (7, 5, 7 + 2)
    assert [one.tokens for one in high.rounds] == [1, 1, 2, 3, 1, 1, 2]


def test_profiles_survive_a_file(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    found = profile()
    file.write_text(found.model_dump_json())
    assert load_profile(file) == found
    file.write_text('{"name": "x", "costs": 3, "content": {}}')
    with pytest.raises(RequestError, match="costs"):
        load_profile(file)
    with pytest.raises(RequestError, match="ssd plan --measure"):
        load_profile(tmp_path / "none.json")
