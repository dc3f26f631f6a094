"""Coupled verification against a walk from the root in plain Python."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ssd.decoding.trees.shape import ABSENT, TreeShape
from ssd.decoding.verify.coupled import verify_coupled


def verify(shape: TreeShape, tokens: list[list[int]], chosen: list[list[int]]) -> list[tuple[int, int]]:
    outcome = verify_coupled(
        torch.tensor(tokens), torch.tensor(chosen), shape.parent_index(), shape.depth_index(), shape.ancestors()
    )
    return list(zip(outcome.node.tolist(), outcome.bonus.tolist(), strict=True))


def walk(shape: TreeShape, tokens: list[int], chosen: list[int]) -> tuple[int, int]:
    """Step to every child that is the target's token; the deepest node reached, the first of equals."""
    reached, frontier = [0], [0]
    while frontier:
        frontier = [c for n in frontier for c in shape.children(n) if tokens[c] != ABSENT and tokens[c] == chosen[n]]
        reached += frontier
    deepest = max(shape.depths[n] for n in reached)
    node = min(n for n in reached if shape.depths[n] == deepest)
    return node, chosen[node]


@st.composite
def rounds(draw: st.DrawFn) -> tuple[TreeShape, list[list[int]], list[list[int]]]:
    count = draw(st.integers(0, 10))
    shape = TreeShape(tuple(draw(st.integers(0, node)) for node in range(count)))
    batch = draw(st.integers(1, 3))
    # Three tokens only, so that paths match often; siblings may repeat a token.
    node_token, choice = st.sampled_from([ABSENT, 0, 1, 2]), st.integers(0, 2)
    tokens = [[draw(choice), *(draw(node_token) for _ in range(count))] for _ in range(batch)]
    return shape, tokens, [[draw(choice) for _ in range(count + 1)] for _ in range(batch)]


@given(rounds())
def test_equals_the_walk(drawn: tuple[TreeShape, list[list[int]], list[list[int]]]) -> None:
    shape, tokens, chosen = drawn
    expected = [walk(shape, t, c) for t, c in zip(tokens, chosen, strict=True)]
    assert verify(shape, tokens, chosen) == expected


@given(rounds())
def test_emits_only_the_targets_tokens(drawn: tuple[TreeShape, list[list[int]], list[list[int]]]) -> None:
    shape, tokens, chosen = drawn
    for row, (node, bonus) in enumerate(verify(shape, tokens, chosen)):
        above = 0
        for step in shape.path(node):
            assert tokens[row][step] == chosen[row][above]
            above = step
        assert bonus == chosen[row][node]
        assert all(tokens[row][child] != bonus for child in shape.children(node))


def test_by_hand() -> None:
    shape = TreeShape.comb(2, siblings=1)  # 0 → 1 → 2; leaves 3 (root), 4 (node 1)
    tokens = [9, 5, 6, 7, 8]
    cases = {
        (5, 6, 1, 2, 3): (2, 1),  # the whole chain
        (5, 8, 1, 2, 3): (4, 3),  # the leaf beside its end
        (5, 4, 1, 2, 3): (1, 4),
        (7, 6, 1, 2, 3): (3, 2),  # the leaf beside its beginning; node 2 matches but hangs in the air
        (4, 6, 1, 2, 3): (0, 4),
    }
    for chosen, expected in cases.items():
        assert verify(shape, [tokens], [list(chosen)]) == [expected]


def test_nothing_below_an_absent_node_counts() -> None:
    shape = TreeShape.comb(2)
    assert verify(shape, [[9, ABSENT, 6]], [[5, 6, 1]]) == [(0, 5)]


def test_the_root_is_always_accepted() -> None:
    shape = TreeShape.comb(1)
    assert verify(shape, [[ABSENT, ABSENT], [3, 4]], [[7, 1], [4, 2]]) == [(0, 7), (1, 2)]
