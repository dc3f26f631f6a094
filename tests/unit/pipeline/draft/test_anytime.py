"""Trees that end when the verifier waits for them are shorter and otherwise the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ssd import ConfigError
from ssd.config.load import load_config
from ssd.decoding.trees.shape import ABSENT
from ssd.pipeline.draft.executors import InParts, Whole
from ssd.pipeline.runtime.build_draft import build_draft
from ssd.pipeline.runtime.plan import Plan
from ssd.pipeline.transport.inbox import Inbox
from ssd.pipeline.transport.lanes import InprocLane
from ssd.pipeline.transport.links.inproc import InprocLink
from ssd.pipeline.transport.messages import Admit, Bell, Cancel
from tests.unit.equality.test_equality import GREEDY, HOT, MIXED, WARM, same_as_plain, total

Configure = Callable[..., dict[str, Any]]
TREE = {"lookahead": 4, "siblings": 1, "forecast": {"budget": 6}, "anytime": True}


@pytest.fixture
def fickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bell that rings at any step."""
    draw = random.Random(1)
    monkeypatch.setattr(Inbox, "rung", lambda self, round: draw.random() < 0.3)


@pytest.mark.parametrize("more", [{}, {"fallback": "auto"}, {"lookahead": "auto", "lookahead_max": 5}], ids=str)
def test_tokens_are_plain_decodings(fickle: None, tiny_config: Configure, more: dict[str, Any]) -> None:
    outputs = same_as_plain(tiny_config(speculation=TREE | more, engine={"max_batch": 3}), MIXED)
    assert total(outputs["ssd"], "accepted") > 0


@pytest.mark.parametrize("verify", ["rejection", "block"])
def test_rules_that_send_probabilities(fickle: None, tiny_config: Configure, verify: str) -> None:
    same_as_plain(tiny_config(speculation=TREE | {"verify": verify, "siblings": 0}), [GREEDY])


def test_without_a_ringing_bell_trees_are_whole(tiny_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bell that rings at once leaves a single token."""
    accepted = {}
    for name, rung in (("never", False), ("always", True)):
        monkeypatch.setattr(Inbox, "rung", lambda self, round, rung=rung: rung)
        speculation = TREE | {"fallback": "none"}
        outputs = same_as_plain(tiny_config(draft="target", speculation=speculation), [GREEDY])["ssd"]
        record = outputs[0].speculation
        accepted[name] = record.accepted / record.rounds
        assert record.accepted == record.drafted
    assert accepted["never"] > 2 > 1 >= accepted["always"] > 0.5


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("copy_bias", [[], [1.0, 2.0]], ids=["", "copying"])
def test_a_tree_that_ends_early_is_the_beginning_of_the_whole(
    tiny_config: Configure, params: Any, copy_bias: list[float]
) -> None:
    """In one function, in parts, and step by step."""
    config = load_config(tiny_config(speculation=TREE | {"copy_bias": copy_bias}))
    worker, _ = build_draft(Plan(config=config, vocabulary=128, ends=()))
    worker.admit(Admit(slot=0, tokens=[5, 6, 7, 5, 6], params=params, forecasts=True))
    while not worker.rows[0].whole:  # pyright: ignore[reportOptionalMemberAccess]
        worker._prefilled = False
        worker._catch_up()
    worker.trees = [[6, 7, 5, 6, 7, *[ABSENT] * 4]]
    _, batch, longest = worker._batch([0], worker.shape.nodes)
    parts, stepwise = worker.drafting.fused, worker.drafting.stepwise
    assert isinstance(parts, InParts)
    nodes, guesses, whole, _ = Whole.grow(parts, batch, longest, 4)
    assert (whole != ABSENT).all()
    for steps in (1, 2, 3, 4):
        asked = 0

        def bell(steps: int = steps) -> bool:
            nonlocal asked
            asked += 1
            return asked == steps

        absent = torch.tensor([depth > steps for depth in worker.shape.depths[1:]])
        wanted = whole.masked_fill(absent, ABSENT)
        for executor in (parts, stepwise):
            asked = 0
            found = executor.grow(batch, longest, 4, bell)
            assert asked == min(steps, 3)
            assert all(torch.equal(one, other) for one, other in zip(found[:3], (nodes, guesses, wanted), strict=True))


class Mute(InprocLink):
    """Like gloo and NCCL: only receiving shows whether a frame has arrived."""

    @property
    def arrived(self) -> bool | None:
        return None


def test_a_bell_on_the_lane_keeps_the_order_of_what_comes_with_it() -> None:
    verifier, draft = InprocLane.pair()
    inbox = Inbox(draft, Mute.pair()[1])
    assert not inbox.rung(0)
    told = [Cancel(request=number) for number in range(3)]
    for message in (Bell(round=0), told[0], Bell(round=1), told[1], told[2]):
        verifier.send(message)
    assert not inbox.rung(2)  # bells of earlier rounds do not count
    verifier.send(Bell(round=2))
    assert inbox.rung(2) and inbox.rung(2)
    assert [inbox.receive(0) for _ in range(4)] == [*told, None]


def test_a_late_bell_is_skipped() -> None:
    verifier, draft = InprocLane.pair()
    inbox = Inbox(draft, Mute.pair()[1])
    verifier.send(Bell(round=0))
    verifier.send(Cancel(request=1))
    assert inbox.receive(0) == Cancel(request=1)
    assert inbox.rung(0) and not inbox.rung(1)


def test_the_frame_is_the_bell_where_it_can_be_seen() -> None:
    verifier, draft = InprocLink.pair()
    inbox = Inbox(InprocLane.pair()[1], draft)
    assert not inbox.rung(0)
    verifier.send(torch.zeros(3, dtype=torch.int32).numpy())
    assert inbox.rung(0)


def test_anytime_needs_a_single_draft() -> None:
    with pytest.raises(ConfigError, match="anytime ends the tree of one draft"):
        load_config("embedded", ["speculation.anytime=true", "draft.data_parallel=2", "draft.cores=[0,1]"])


def test_hot_rows(fickle: None, tiny_config: Configure) -> None:
    same_as_plain(tiny_config(speculation=TREE), [HOT])
