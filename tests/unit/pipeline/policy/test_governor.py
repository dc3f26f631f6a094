"""The governor against pipelines whose true speeds are known."""

from __future__ import annotations

import random

import pytest

from ssd.pipeline.policy.governor import LONGEST_REST, Arm, Governor, RoundResult
from ssd.pipeline.policy.pace import Pace

PLAIN_S = 0.005
FORWARD_S = 0.004
"""Of a plain round."""


def governor_of(method: Arm = "ssd", *, wide_s: float = 0.0) -> Governor:
    """That knows how much longer a verification's forward is."""
    governor = Governor(method)
    governor.share = FORWARD_S / (FORWARD_S + wide_s)
    return governor


def run(governor: Governor, rounds: int, *, tokens: float, wait_s: float, rows: int = 1, seed: int = 0) -> float:
    """Tokens per second over plain decoding's, with ``tokens`` a row and round on average when
    speculating and ``wait_s`` of waiting in such rounds."""
    noise, total, spent = random.Random(seed), 0, 0.0
    for _ in range(rounds):
        plain = PLAIN_S * noise.uniform(0.9, 1.2)
        if governor.speculating:
            made = sum(int(tokens) + (noise.random() < tokens % 1) for _ in range(rows))
            waited = wait_s * noise.uniform(0.5, 1.5)
            governor.observe(RoundResult(tokens=made, rows=rows, seconds=plain + waited, waited_s=waited))
            spent += plain + waited
        else:
            made = rows
            governor.observe(RoundResult(tokens=rows, rows=rows, seconds=plain))
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
    for wide_s, kept in ((0.0, True), (FORWARD_S, False)):
        governor = governor_of(wide_s=wide_s)
        for _ in range(200):
            if governor.speculating:
                governor.observe(RoundResult(tokens=3, rows=2, seconds=PLAIN_S + wide_s, forward_s=FORWARD_S + wide_s))
            else:
                governor.observe(RoundResult(tokens=2, rows=2, seconds=PLAIN_S, forward_s=FORWARD_S))
        assert governor.speculating == kept


@pytest.mark.parametrize(("told", "kept"), [(0.9, False), (0.2, True)])
def test_widths_are_measured(told: float, kept: bool) -> None:
    """Whatever was calibrated: what plain rounds take is looked at, and what was found is remembered."""
    accepted, wide_s = (2.6, 0.0005) if kept else (1.6, 0.004)
    machine = Machine(accepted=accepted, misses=0.2, tree_s=0.0, jit_s=0.002, named=1.0, wide_s=wide_s)
    governor = Governor()
    governor.share = told
    machine.run(governor, 600)
    assert governor.share == pytest.approx(FORWARD_S / (FORWARD_S + machine.wide_s), rel=0.1)
    assert machine.run(governor, 5000, seed=1) > 0.97 * max(machine.rate(arm) for arm in MACHINES)
    assert machine.spent["ssd" if kept else "none"] > 0.95 * 5000


class Machine:
    """A pipeline whose every arm's rounds are known: tokens a row and seconds waited on top of the forward,
    which takes ``wide_s`` longer with candidates."""

    def __init__(
        self,
        *,
        accepted: float,
        misses: float,
        tree_s: float,
        jit_s: float,
        named: float,
        rows: int = 1,
        wide_s: float = 0.0,
    ):
        self.accepted, self.misses, self.tree_s, self.jit_s = accepted, misses, tree_s, jit_s
        self.named, self.rows, self.wide_s = named, rows, wide_s

    def brings(self, arm: Arm) -> float:
        return {"ssd": self.accepted, "sd": self.accepted, "ngram": self.named, "none": 1.0}[arm]

    def waits(self, arm: Arm, draw: random.Random) -> tuple[float, float]:
        """In all, and of it for trees after misses. Any row's miss makes all wait."""
        if arm not in ("ssd", "sd"):
            return 0.0, 0.0
        missed = arm == "sd" or any(draw.random() < self.misses for _ in range(self.rows))
        missed_s = self.jit_s * missed
        return missed_s + (self.tree_s if arm == "ssd" else 0.0), missed_s

    def rate(self, arm: Arm) -> float:
        draw = random.Random(0)
        wide_s = self.wide_s * (arm != "none")
        return self.brings(arm) / (PLAIN_S * 1.05 + wide_s + sum(self.waits(arm, draw)[0] for _ in range(4000)) / 4000)

    def run(self, governor: Governor, rounds: int, seed: int = 0) -> float:
        """Tokens per second of a row; where the governor spends its rounds is counted in ``spent``."""
        draw, total, seconds = random.Random(seed), 0.0, 0.0
        self.spent: dict[Arm, int] = dict.fromkeys(("ssd", "sd", "ngram", "none"), 0)
        for _ in range(rounds):
            arm = governor.arm
            self.spent[arm] += 1
            tokens = sum(self._some(self.brings(arm), draw) for _ in range(self.rows))
            waited_s, missed_s = self.waits(arm, draw)
            took = PLAIN_S * draw.uniform(0.95, 1.15) + self.wide_s * (arm != "none") + waited_s
            forward_s = FORWARD_S * draw.uniform(0.95, 1.05) + self.wide_s * (arm != "none")
            told = {"waited_s": waited_s, "missed_s": missed_s, "wide": arm != "none", "forward_s": forward_s}
            governor.observe(RoundResult(tokens=tokens, rows=self.rows, seconds=took, **told))
            for _ in range(self.rows):  # what n-grams would have brought over the same text
                governor.count_ngrams(
                    tokens // self.rows, sum(draw.random() < 1 / self.named for _ in range(tokens // self.rows))
                )
            total, seconds = total + tokens / self.rows, seconds + took
        return total / seconds

    @staticmethod
    def _some(mean: float, draw: random.Random) -> int:
        return int(mean) + (draw.random() < mean % 1)


MACHINES: dict[Arm, Machine] = {
    "ssd": Machine(accepted=2.6, misses=0.2, tree_s=0.0002, jit_s=0.003, named=1.3),
    "sd": Machine(accepted=2.6, misses=0.6, tree_s=0.006, jit_s=0.002, named=1.1),  # a draft slower than the target
    "ngram": Machine(accepted=1.5, misses=0.6, tree_s=0.0, jit_s=0.003, named=2.2),
    "none": Machine(accepted=1.05, misses=0.9, tree_s=0.002, jit_s=0.003, named=1.0, wide_s=0.001),
}


@pytest.mark.parametrize("best", MACHINES)
@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_the_chain_is_found_and_kept(best: Arm, seed: int) -> None:
    machine = MACHINES[best]
    governor = governor_of(wide_s=machine.wide_s)
    assert max(MACHINES, key=machine.rate) == best
    machine.run(governor, 600, seed)
    assert machine.run(governor, 4000, seed + 10) > 0.97 * machine.rate(best)
    assert machine.spent[best] > 0.9 * 4000


@pytest.mark.parametrize("start", MACHINES)
@pytest.mark.parametrize("end", MACHINES)
def test_the_chain_goes_both_ways(start: Arm, end: Arm) -> None:
    governor = governor_of(wide_s=MACHINES[end].wide_s)
    MACHINES[start].run(governor, 1500)
    MACHINES[end].run(governor, LONGEST_REST)
    assert MACHINES[end].run(governor, 500) > 0.9 * MACHINES[end].rate(end)


@pytest.mark.parametrize("rows", [16, 64])
def test_big_batches_fall_to_plain(rows: int) -> None:
    """Some row always misses, and a forward of so many rows costs what its width costs."""
    machine = Machine(accepted=2.0, misses=0.3, tree_s=0.001, jit_s=0.006, named=1.2, rows=rows, wide_s=PLAIN_S / 3)
    governor = governor_of(wide_s=machine.wide_s)
    machine.run(governor, 300)
    assert governor.arm == "none"
    assert machine.run(governor, 3000, seed=1) > 0.97 / (PLAIN_S * 1.05)


def test_sd_requests_never_forecast() -> None:
    machine, governor = MACHINES["ssd"], Governor("sd")
    machine.run(governor, 2000)
    assert machine.spent["ssd"] == 0 and machine.spent["sd"] > 1500


def drive_paces(paces: list[Pace], accepted: list[float], rounds: int) -> float:
    """A batch whose rows accept so many tokens; a row that accepts none misses. Tokens per second."""
    draw, total, spent = random.Random(2), 0, 0.0
    for _ in range(rounds):
        made = [
            1 + int(draw.random() < more) * 2 if pace.drafted else 1 for pace, more in zip(paces, accepted, strict=True)
        ]
        missed = [pace.drafted and draw.random() > more for pace, more in zip(paces, accepted, strict=True)]
        seconds = PLAIN_S + 0.004 * any(missed)
        hits = [1 - pace.misses if pace.drafted else 1.0 for pace in paces]
        for number, pace in enumerate(paces):
            others = 1.0
            for hit in hits[:number] + hits[number + 1 :]:
                others *= hit
            pace.observe(
                tokens=made[number],
                missed=missed[number],
                others_hit=others,
                wait_s=0.004,
                batch_rate=sum(made) / seconds,
            )
        total, spent = total + sum(made), spent + seconds
    return total / spent


def test_a_bad_row_goes_plain_and_the_others_go_on() -> None:
    accepted = [0.95, 0.0, 0.97, 0.96]
    paces = [Pace() for _ in accepted]
    drive_paces(paces, accepted, 60)
    assert [pace.drafted for pace in paces] == [True, False, True, True]
    with_it = [Pace() for _ in accepted]
    for pace in with_it:
        pace._left = 10**9  # never decides
    assert drive_paces(paces, accepted, 500) > 1.1 * drive_paces(with_it, accepted, 500)


def test_a_row_that_turns_good_comes_back() -> None:
    paces = [Pace(), Pace()]
    drive_paces(paces, [0.95, 0.0], 300)
    assert not paces[1].drafted
    drive_paces(paces, [0.95, 0.97], 1500)
    assert paces[1].drafted


def test_without_a_draft_the_better_of_the_others() -> None:
    governor = Governor()
    MACHINES["ngram"].run(governor, 100)
    assert governor.undrafted == "ngram"
    governor = governor_of(wide_s=0.001)
    MACHINES["none"].run(governor, 100)
    assert governor.undrafted == "none"
