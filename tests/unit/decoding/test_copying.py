"""The draft's copy bias, against a search written out token by token."""

from __future__ import annotations

import random

import pytest
import torch

from ssd.decoding.text.copying import CopyBias
from ssd.decoding.trees.shape import TreeShape

GAINS = (0.5, 1.0, 2.0)
VOCABULARY = 7
CAPACITY = 24


def expected(certain: list[int], path: list[int]) -> tuple[int, float] | None:
    """The token that gains, and how much, after ``certain`` (the root its last) and candidates ``path``."""
    text = certain + path
    for length in range(len(GAINS), 0, -1):
        if length > len(text):
            continue
        ending = text[-length:]
        # Where the ending stood before and its follower is certain; the last such place.
        for end in range(len(certain) - 2, length - 2, -1):
            if certain[end - length + 1 : end + 1] == ending:
                return certain[end + 1], GAINS[length - 1]
    return None


def gained(row: torch.Tensor) -> tuple[int, float] | None:
    (places,) = row.nonzero(as_tuple=True)
    assert len(places) <= 1
    return (int(places[0]), float(row[places[0]])) if len(places) else None


@pytest.mark.parametrize("shape", [TreeShape.comb(3), TreeShape.comb(2, 2)], ids=["chain", "comb"])
def test_tree_branches_and_chain(shape: TreeShape) -> None:
    rng = random.Random(1)
    for _ in range(40):
        rows = [[rng.randrange(3) for _ in range(rng.randrange(1, CAPACITY))] for _ in range(3)]
        bias = CopyBias(GAINS, shape, batch=3, capacity=CAPACITY)
        for slot, row in enumerate(rows):
            bias.write(slot, 0, [rng.randrange(3) for _ in range(CAPACITY)])  # another sequence was here
            bias.write(slot, 0, row)
        trees = [[row[-1], *[rng.randrange(3) for _ in range(shape.nodes - 1)]] for row in rows]
        lengths = torch.tensor([len(row) - 1 for row in rows])
        source = bias.source(lengths)
        assert source is not None
        endings = source.endings(torch.tensor(trees))
        found = source.biased(torch.zeros(3, shape.nodes, VOCABULARY), endings)
        for row, tree, got in zip(rows, trees, found, strict=True):
            for node in range(shape.nodes):
                assert gained(got[node]) == expected(row, [tree[n] for n in shape.path(node)])
        nodes = torch.tensor([[rng.randrange(shape.nodes) for _ in range(4)] for _ in rows])
        endings = source.continued(endings, nodes)
        paths = [
            [[tree[n] for n in shape.path(node)] for node in some]
            for tree, some in zip(trees, nodes.tolist(), strict=True)
        ]
        for _ in range(3):
            fed = torch.tensor([[rng.randrange(3) for _ in range(4)] for _ in rows])
            endings = source.fed(endings, fed)
            found = source.biased(torch.zeros(3, 4, VOCABULARY), endings)
            for row, some, tokens, got in zip(rows, paths, fed.tolist(), found, strict=True):
                for path, token, one in zip(some, tokens, got, strict=True):
                    path.append(token)
                    assert gained(one) == expected(row, path)
        alone = source.biased(torch.zeros(3, 1, VOCABULARY), source.endings(torch.tensor(trees)[:, :1]))
        for row, got in zip(rows, alone, strict=True):
            assert gained(got[0]) == expected(row, [])


def test_sequences_grow() -> None:
    bias = CopyBias(GAINS, TreeShape.comb(2), batch=1, capacity=CAPACITY)
    text = [1, 2, 3, 1, 2, 4, 1, 2]
    bias.write(0, 0, text[:3])
    for at in range(3, len(text)):
        bias.write(0, at, text[at : at + 1])
    source = bias.source(torch.tensor([len(text) - 1]))
    assert source is not None
    found = source.biased(torch.zeros(1, 1, VOCABULARY), source.endings(torch.tensor([[2]])))
    assert gained(found[0, 0]) == (4, 1.0)  # the later of 3 and 4


def test_tokens_beyond_the_capacity_are_ignored() -> None:
    bias = CopyBias(GAINS, TreeShape.comb(2), batch=1, capacity=4)
    bias.write(0, 2, [5, 6, 5, 6])
    source = bias.source(torch.tensor([4]))
    assert source is not None
    found = source.biased(torch.zeros(1, 1, VOCABULARY), source.endings(torch.tensor([[5]])))
    assert found.shape == (1, 1, VOCABULARY)


def test_no_gains_no_bias() -> None:
    bias = CopyBias((), TreeShape.comb(2), batch=1, capacity=8)
    bias.write(0, 0, [1, 1, 1])
    assert bias.source(torch.tensor([2])) is None
