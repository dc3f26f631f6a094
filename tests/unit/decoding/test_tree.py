"""Token trees: literal tables of small shapes, and that the tables agree on random ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd.decoding.trees.shape import TreeShape


@st.composite
def shapes(draw: st.DrawFn) -> TreeShape:
    count = draw(st.integers(0, 12))
    return TreeShape(tuple(draw(st.integers(0, node)) for node in range(count)))


def test_chain() -> None:
    shape = TreeShape.comb(3)
    assert shape.parents == (0, 1, 2)
    assert (shape.nodes, shape.depth, shape.depths, shape.chain) == (4, 3, (0, 1, 2, 3), (0, 1, 2, 3))
    assert shape.is_comb
    assert shape.parent_index().tolist() == [0, 0, 1, 2]
    assert shape.ancestors().int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert shape.paths().tolist() == [[-1, -1, -1], [1, -1, -1], [1, 2, -1], [1, 2, 3]]


def test_comb() -> None:
    """Chain 1-2, two leaves beside each of its nodes: 3, 4 under the root, 5, 6 under node 1."""
    shape = TreeShape.comb(2, siblings=2)
    assert shape.parents == (0, 1, 0, 0, 1, 1)
    assert (shape.nodes, shape.depth, shape.chain) == (7, 2, (0, 1, 2))
    assert shape.depths == (0, 1, 2, 1, 1, 2, 2)
    assert shape.depth_index().tolist() == [0, 1, 2, 1, 1, 2, 2]
    assert [shape.children(node) for node in range(7)] == [(1, 3, 4), (2, 5, 6), (), (), (), (), ()]
    assert [shape.path(node) for node in range(7)] == [(), (1,), (1, 2), (3,), (4,), (1, 5), (1, 6)]
    assert shape.ancestors().int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1],
    ]
    assert shape.paths().tolist() == [[-1, -1], [1, -1], [1, 2], [3, -1], [4, -1], [1, 5], [1, 6]]


@pytest.mark.parametrize("lookahead", range(1, 9))
@pytest.mark.parametrize("siblings", range(4))
def test_comb_counts(lookahead: int, siblings: int) -> None:
    shape = TreeShape.comb(lookahead, siblings)
    assert shape.nodes == 1 + lookahead * (1 + siblings)
    assert shape.chain == tuple(range(lookahead + 1))
    assert shape.is_comb
    for depth in range(1, lookahead + 1):
        assert shape.depths.count(depth) == 1 + siblings


def test_shapes_that_are_not_combs() -> None:
    assert not TreeShape((0, 1, 0, 3)).is_comb  # 4 hangs below the leaf 3
    assert TreeShape((0, 0)).is_comb


def test_only_a_root() -> None:
    shape = TreeShape(())
    assert (shape.nodes, shape.depth, shape.depths, shape.chain) == (1, 0, (0,), (0,))
    assert shape.paths().shape == (1, 0)


@pytest.mark.parametrize("parents", [(1,), (0, 2), (-1,)])
def test_parents_must_precede_children(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="parents stand before"):
        TreeShape(parents)


@given(shapes())
def test_tables_agree(shape: TreeShape) -> None:
    paths, ancestors = shape.paths().tolist(), shape.ancestors().tolist()
    for node in range(shape.nodes):
        path = shape.path(node)
        assert len(path) == shape.depths[node]
        assert [n for n in paths[node] if n != -1] == list(path)
        assert {n for n, above in enumerate(ancestors[node]) if above} == {0, *path}
        for parent, child in zip((0, *path), path, strict=False):
            assert child in shape.children(parent)
