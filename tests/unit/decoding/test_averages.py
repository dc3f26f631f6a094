"""Decaying averages: they forget at the stated rate, and lean on priors while they know little."""

from __future__ import annotations

import math

import pytest

from ssd.decoding.averages import DecayingRatio


def test_nothing_observed_is_no_value() -> None:
    assert DecayingRatio(10).value is None


@pytest.mark.parametrize("memory", [24, 192, 512])
def test_an_observation_loses_its_weight_within_memory(memory: int) -> None:
    ratio = DecayingRatio(memory)
    ratio.observe(1.0)
    for _ in range(memory):
        ratio.observe(0.0)
    assert ratio.top == pytest.approx(1 / math.e, rel=0.03)


def test_the_lower_sum_may_be_a_measure() -> None:
    rate = DecayingRatio(10)
    for _ in range(3):
        rate.observe(4.0, 0.5)
    assert rate.value == pytest.approx(8.0)


def test_observing_is_fading_and_adding() -> None:
    one, other = DecayingRatio(7), DecayingRatio(7)
    for top in (1.0, 0.25, 3.0):
        one.observe(top)
        other.fade()
        other.add(top)
    assert (one.top, one.bottom) == (other.top, other.bottom)


def test_a_prior_is_outweighed() -> None:
    ratio, prior = DecayingRatio(100), DecayingRatio(100, top=8 * 0.6, bottom=8)
    assert prior.value == ratio.towards(0.6, 8) == pytest.approx(0.6)
    for _ in range(1000):
        ratio.observe(0.0)
        prior.observe(0.0)
    assert prior.value == pytest.approx(0.0, abs=1e-3)
    assert ratio.towards(0.6, 8) == pytest.approx(8 * 0.6 / 108, rel=1e-3)
