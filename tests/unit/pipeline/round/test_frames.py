"""Frames: what is packed comes out again; anything else is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd.errors import LinkError
from ssd.pipeline.round.frames import HEADER, Frames, Next, OutcomeFrame, SpeculationSet
from ssd.pipeline.round.lookup import lookup

INT32 = st.integers(-1, 2**31 - 1)
ROUND = st.integers(0, 2**40)
frames_of = st.builds(Frames, batch=st.integers(1, 5), branches=st.integers(1, 6), nodes=st.integers(1, 6))


def array(data: st.DataObject, *shape: int) -> np.ndarray:
    count = math.prod(shape)
    values = data.draw(st.lists(INT32, min_size=count, max_size=count))
    return np.array(values, dtype=np.int64).reshape(shape)


@given(st.data(), frames_of, ROUND, st.integers(0, 2**31 - 1), st.sampled_from(Next))
def test_outcome(data: st.DataObject, frames: Frames, round: int, count: int, next_: Next) -> None:
    columns = {name: array(data, frames.batch).tolist() for name in ("states", "nodes", "bonus")}
    raw = frames.pack_outcome(OutcomeFrame(round=round, control_count=count, next=next_, **columns))
    assert (raw.dtype, raw.shape) == (np.int32, (frames.outcome_size,))
    back = frames.unpack_outcome(raw, round)
    assert (back.round, back.control_count, back.next) == (round, count, next_)
    for name, column in columns.items():
        assert getattr(back, name) == column


@given(st.data(), frames_of, ROUND, st.integers(0, 2**31 - 1))
def test_speculation(data: st.DataObject, frames: Frames, round: int, spent_us: int) -> None:
    nodes, guesses = (array(data, frames.batch, frames.branches) for _ in range(2))
    trees = array(data, frames.batch, frames.branches, frames.nodes - 1)
    raw = frames.pack_speculation(SpeculationSet(nodes=nodes, guesses=guesses, trees=trees), round, spent_us)
    assert (raw.dtype, raw.shape) == (np.int32, (frames.speculation_size,))
    back, spent = frames.unpack_speculation(raw, round)
    assert np.array_equal(back.nodes, nodes)
    assert np.array_equal(back.guesses, guesses)
    assert np.array_equal(back.trees, trees)
    assert spent == spent_us


@given(st.data(), frames_of, ROUND, st.integers(0, 2**31 - 1))
def test_trees(data: st.DataObject, frames: Frames, round: int, spent_us: int) -> None:
    trees = array(data, frames.batch, frames.nodes - 1).tolist()
    raw = frames.pack_trees(trees, round, spent_us)
    assert (raw.dtype, raw.shape) == (np.int32, (frames.tree_size,))
    back, spent = frames.unpack_trees(raw, round)
    assert back == trees
    assert spent == spent_us


FRAMES = Frames(batch=2, branches=3, nodes=4)
UNPACKERS = {
    FRAMES.outcome_size: FRAMES.unpack_outcome,
    FRAMES.speculation_size: FRAMES.unpack_speculation,
    FRAMES.tree_size: FRAMES.unpack_trees,
}


def good(size: int, round: int) -> np.ndarray:
    header = FRAMES.pack_trees([[0] * 3] * 2, round, 0)[:HEADER]
    return np.concatenate([header, np.zeros(size - HEADER, dtype=np.int32)])


@pytest.mark.parametrize("size", UNPACKERS)
def test_foreign_and_late_frames_are_refused(size: int) -> None:
    unpack = UNPACKERS[size]
    unpack(good(size, 5), 5)
    with pytest.raises(LinkError, match="does not speak"):
        unpack(np.zeros(size, dtype=np.int32), 0)
    wrong = good(size, 5)
    wrong[0] ^= 1
    with pytest.raises(LinkError, match="does not speak"):
        unpack(wrong, 5)
    wrong = good(size, 5)
    wrong[1] = 1
    with pytest.raises(LinkError, match="epoch 1 came on the link of epoch 0"):
        unpack(wrong, 5)
    for round in (4, 6):
        with pytest.raises(LinkError, match=f"round 5 where {round} was due"):
            unpack(good(size, 5), round)


def test_an_unknown_next_is_refused() -> None:
    raw = good(FRAMES.outcome_size, 5)
    raw[4] = 77
    with pytest.raises(LinkError):
        FRAMES.unpack_outcome(raw, 5)


def test_a_very_slow_draft_does_not_overflow_its_header() -> None:
    raw = FRAMES.pack_trees([[0] * 3] * 2, 0, 2**33)
    assert FRAMES.unpack_trees(raw, 0)[1] > 2**30


@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.integers(0, 3))
def test_lookup_equals_the_reference(data: st.DataObject, batch: int, branches: int, below: int) -> None:
    small = st.integers(0, 2)

    def draw(*shape: int) -> np.ndarray:
        count = math.prod(shape)
        values = data.draw(st.lists(small, min_size=count, max_size=count))
        return np.array(values, dtype=np.int64).reshape(shape)

    plan, nodes, bonus, guesses = draw(batch, branches), draw(batch), draw(batch), draw(batch, branches) - 1
    trees = np.arange(batch * branches * below).reshape(batch, branches, below)
    found = lookup(nodes.tolist(), bonus.tolist(), SpeculationSet(nodes=plan, guesses=guesses, trees=trees))
    for row in range(batch):
        right = [n for n in range(branches) if plan[row, n] == nodes[row] and guesses[row, n] == bonus[row]]
        expected = trees[row, right[0]].tolist() if right else [-1] * below
        assert found.branches[row] == (right[0] if right else None)
        assert found.trees[row] == [int(bonus[row]), *expected]
        assert found.prepared[row] == any(guesses[row] != -1)


def test_lookup_is_by_node_and_token() -> None:
    """Two branches guess the same token, after different nodes."""
    speculation = SpeculationSet(nodes=np.array([[2, 0]]), guesses=np.array([[9, 9]]), trees=np.array([[[1], [5]]]))
    for node, tree, branch in ((2, 1, 0), (0, 5, 1), (1, -1, None)):
        found = lookup([node], [9], speculation)
        assert (found.trees, found.branches) == ([[9, tree]], [branch])
