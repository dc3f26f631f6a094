"""The governor against pipelines whose true speeds are known."""

from __future__ import annotations

import random

import pytest

from ssd.pipeline.governor import LONGEST_REST, Governor, Round

PLAIN_S = 0.005


def run(governor: Governor, rounds: int, *, tokens: float, wait_s: float, rows: int = 1, seed: int = 0) -> float:
    """Tokens per second over plain decoding's, with ``tokens`` a row and round on average when
    speculating and ``wait_s`` of waiting in such rounds."""
    noise, total, spent = random.Random(seed), 0, 0.0
    for _ in range(rounds):
        plain = PLAIN_S * noise.uniform(0.9, 1.2)
        if governor.speculating:
            made = sum(int(tokens) + (noise.random() < tokens % 1) for _ in range(rows))
            waited = wait_s * noise.uniform(0.5, 1.5)
            governor.observe(Round(tokens=made, rows=rows, seconds=plain + waited, waited_s=waited))
            spent += plain + waited
        else:
            made = rows
            governor.observe(Round(tokens=rows, rows=rows, seconds=plain))
            spent += plain
        total += made / rows
    return total / (spent / (PLAIN_S * 1.05))


@pytest.mark.parametrize("rows", [1, 4])
def test_an_adversary_costs_little(rows: int) -> None:
    governor = Governor()
    run(governor, 500, tokens=1.0, wait_s=0.004, rows=rows)
    assert not governor.speculating
    assert run(governor, 4000, tokens=1.0, wait_s=0.004, rows=rows, seed=1) > 0.97


@pytest.mark.parametrize("rows", [1, 4])
def test_what_pays_is_kept(rows: int) -> None:
    governor = Governor()
    assert run(governor, 2000, tokens=2.5, wait_s=0.001, rows=rows) > 2.5 * 5.25 / 6.25 * 0.97
    assert governor.speculating
    assert governor.gain == pytest.approx(2.5 * 5.25 / 6.25, rel=0.15)


def test_it_comes_back() -> None:
    """Also after a long time of draught: the longest rest is bounded."""
    governor = Governor()
    run(governor, 40_000, tokens=1.0, wait_s=0.004)
    for _ in range(LONGEST_REST + 100):
        run(governor, 1, tokens=2.8, wait_s=0.001)
        if governor.speculating and governor.gain and governor.gain > 1.5:
            break
    run(governor, 50, tokens=2.8, wait_s=0.001)
    assert governor.speculating


def test_a_wider_forward_counts() -> None:
    """With a plain forward half as long, 1.5 tokens a round do not pay; without that they do."""
    for saving_s, kept in ((0.0, True), (PLAIN_S / 2, False)):
        governor = Governor(saving_s=saving_s)
        for _ in range(200):
            if governor.speculating:
                governor.observe(Round(tokens=3, rows=2, seconds=PLAIN_S))
            else:
                governor.observe(Round(tokens=2, rows=2, seconds=PLAIN_S - saving_s))
        assert governor.speculating == kept
