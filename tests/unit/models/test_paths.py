"""The keys that a row finds where it is a sequence of its own: those of its path, by position, right-aligned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssd.decoding.trees.shape import TreeShape
from ssd.models.cache import SlotCache
from ssd.models.layers import FULL, Layers
from ssd.models.paths import KEYS, PathView
from ssd.models.rows import RowPlan
from ssd.models.runner import ForwardRunner, RunnerOptions
from ssd.testing.models.census import tiny_causal

CAPACITY = 12
NOTHING = torch.zeros(0)


def cache() -> SlotCache:
    layers = Layers(
        count=1,
        heads={0: (1, 1, 1)},
        indexers={},
        recurrent=None,
        first_position=0,
        linears=frozenset(),
        tokens=NOTHING,
        logits=NOTHING,
    )
    slots = SlotCache(
        (FULL,),
        batch=2,
        main_slots=CAPACITY,
        scratch_slots=4,
        dtype=torch.float32,
        device="cpu",
        layers=layers,
        chain=3,
    )
    slots.main[KEYS][0][:, 0, :CAPACITY, 0] = torch.arange(CAPACITY) + 100  # key of position p: 100 + p
    return slots


def found(view: PathView, seen: Tensor, own: list[float]) -> list[list[float]]:
    """Returns the keys that each row of the first sequence sees, oldest first."""
    rows = len(seen) // 2
    keys = view.attended(KEYS, 0, torch.tensor(own * 2).view(-1, 1, 1, 1))
    assert keys.shape == (len(seen), 1, CAPACITY, 1)
    return [keys[row, 0, seen[row].bool(), 0].tolist() for row in range(rows)]


def test_a_chain_in_place() -> None:
    view = PathView(cache())
    positions = torch.tensor([[3, 4, 5]]).expand(2, -1)
    seen = view.prepare_rows(
        positions=positions,
        limits=positions,
        in_place=3,
        scratch_slots=torch.zeros(0, dtype=torch.int64),
        scratch_mask=None,
        sequences=None,
    )
    assert view.past == CAPACITY - 1
    assert found(view, seen, [1.0, 2.0, 3.0]) == [
        [100.0, 101.0, 102.0, 1.0],
        [100.0, 101.0, 102.0, 1.0, 2.0],
        [100.0, 101.0, 102.0, 1.0, 2.0, 3.0],
    ]


def test_a_leaf_beside_a_chain_sees_neither_its_sibling_nor_what_follows() -> None:
    view = PathView(cache())
    positions = torch.tensor([[3, 4, 4]]).expand(2, -1)
    seen = view.prepare_rows(
        positions=positions,
        limits=positions,
        in_place=2,
        scratch_slots=torch.tensor([1]),
        scratch_mask=None,
        sequences=None,
    )
    assert found(view, seen, [1.0, 2.0, 9.0])[2] == [100.0, 101.0, 102.0, 1.0, 9.0]


def test_branches_in_scratch_slots() -> None:
    """The second row of a branch finds the first in a scratch slot, the other branch's row does not."""
    slots = cache()
    view, limits = PathView(slots), torch.tensor([[2, 2]]).expand(2, -1)

    def step(position: int, scratch: list[int], mask: list[list[bool]]) -> Tensor:
        return view.prepare_rows(
            positions=torch.full((2, 2), position),
            limits=limits,
            in_place=0,
            scratch_slots=torch.tensor(scratch),
            scratch_mask=torch.tensor(mask),
            sequences=None,
        )

    seen = step(2, [0, 1], [[False] * 4] * 2)
    assert found(view, seen, [1.0, 2.0]) == [[100.0, 101.0, 1.0], [100.0, 101.0, 2.0]]
    seen = step(3, [2, 3], [[True, False, False, False], [False, True, False, False]])
    assert found(view, seen, [11.0, 22.0]) == [[100.0, 101.0, 1.0, 11.0], [100.0, 101.0, 2.0, 22.0]]


@pytest.mark.parametrize("start", [0, 3])
def test_a_chunk_of_a_prompt_continues_the_keys_before_it(start: int) -> None:
    slots = cache()
    view = PathView(slots)
    view.prepare_chunk(1, start, 2)
    keys = view.attended(KEYS, 0, torch.tensor([7.0, 8.0]).view(1, 1, 2, 1))
    assert keys.flatten().tolist() == [*range(100, 100 + start), 7.0, 8.0]
    assert slots.main[KEYS][0][1, 0, start : start + 2, 0].tolist() == [7.0, 8.0]
    assert slots.main[KEYS][0][0, 0, start, 0] == 100 + start
    assert view.get_mask_sizes(2, 0) == (start + 2, 0)


@pytest.mark.parametrize("model_type", ["bloom", "deepseek_v3"])
def test_a_token_has_the_same_bits_in_the_chain_and_beside_it(model_type: str) -> None:
    """Strict numerics rely on it."""
    options = RunnerOptions(batch=2, capacity=64, scratch_slots=2, prefill_chunk=8, vocabulary=160, chain=2)
    runner = ForwardRunner(tiny_causal(model_type), options)
    assert runner.attention == "model"
    for slot in range(2):
        runner.prefill(slot, list(range(20, 33)))
    plan, lengths = RowPlan.tree("verify", TreeShape.comb(1, siblings=1)), torch.tensor([13, 13])

    def logits(rows: list[int]) -> Tensor:
        return runner.forward(plan, torch.tensor([rows, [7, 8, 9]]), lengths, longest=13)[0]

    one, other = logits([40, 41, 42]), logits([40, 42, 41])
    assert torch.equal(one[1], other[2])
    assert torch.equal(one[2], other[1])
