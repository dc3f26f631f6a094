"""Token trees: the shape of a speculation.

A tree has W nodes. Node 0 is the root: the bonus token of the last round, already committed.
The other nodes are candidates, each continuing its parent. The shape (the parent of every node) is
static and known to both sides; only the tokens travel. A node whose token is ``ABSENT`` is missing in
this round (a shorter branch, a missed row), and so is everything below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ABSENT = -1


@dataclass(frozen=True)
class TreeShape:
    """The parents of nodes 1 to W - 1; ``parents[i]`` is the parent of node ``i + 1``.

    Raises:
        ValueError: a parent does not precede its child.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        for node, parent in enumerate(self.parents, start=1):
            if not 0 <= parent < node:
                raise ValueError(f"node {node} has parent {parent}; parents must precede their children")

    @classmethod
    def comb(cls, lookahead: int, siblings: int | Sequence[int] = 0) -> TreeShape:
        """Returns a chain of ``lookahead`` nodes (1 to K) with leaves beside them, for the draft's next ranks.

        Args:
            lookahead: K.
            siblings: leaves at every depth, or one number for each depth ``[K]``. 0 gives the chain.

        Raises:
            ValueError: the numbers are not one per depth.
        """
        counts = [siblings] * lookahead if isinstance(siblings, int) else siblings
        leaves = tuple(depth for depth, count in zip(range(lookahead), counts, strict=True) for _ in range(count))
        return cls(tuple(range(lookahead)) + leaves)

    @property
    def nodes(self) -> int:
        """W, root and candidates: the rows that a sequence verifies."""
        return len(self.parents) + 1

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of every node ``[W]``; the root's is 0."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def depth(self) -> int:
        """K, the depth of the deepest node."""
        return max(self.depths)

    @cached_property
    def chain(self) -> tuple[int, ...]:
        """Path from the root to the first deepest node, both included: ``[K + 1]``.

        Keys and values of the chain are written in place, those of other nodes to scratch slots."""
        node = self.depths.index(self.depth)
        path = [node]
        while node:
            node = self.parents[node - 1]
            path.append(node)
        return tuple(reversed(path))

    @cached_property
    def is_comb(self) -> bool:
        """Whether every node off the chain is a leaf beside it."""
        on_chain = set(self.chain)
        return all(parent in on_chain for parent in self.parents)

    @cached_property
    def siblings(self) -> tuple[int, ...]:
        """Leaves beside the chain at each depth ``[K]``, for a comb."""
        return tuple(len(self.children(node)) - 1 for node in self.chain[:-1])

    def path(self, node: int) -> tuple[int, ...]:
        """Returns the nodes from below the root down to ``node``; none for the root."""
        return self._node_paths[node]

    @cached_property
    def _node_paths(self) -> tuple[tuple[int, ...], ...]:
        paths: list[tuple[int, ...]] = [()]
        for node, parent in enumerate(self.parents, start=1):
            paths.append((*paths[parent], node))
        return tuple(paths)

    def children(self, node: int) -> tuple[int, ...]:
        """Returns the children of ``node``, ascending."""
        return tuple(i for i, parent in enumerate(self.parents, start=1) if parent == node)

    def parent_index(self, device: torch.device | str = "cpu") -> Tensor:
        """Returns the parents ``[W]`` int64; the root is its own parent."""
        return torch.tensor((0, *self.parents), dtype=torch.int64, device=device)

    def depth_index(self, device: torch.device | str = "cpu") -> Tensor:
        """Returns the depths ``[W]`` int64."""
        return torch.tensor(self.depths, dtype=torch.int64, device=device)

    def ancestors(self, device: torch.device | str = "cpu") -> Tensor:
        """Returns ``[W, W]`` bool: ``[i, j]`` iff j is i or one of its ancestors."""
        seen = torch.eye(self.nodes, dtype=torch.bool)
        for node, parent in enumerate(self.parents, start=1):
            seen[node] |= seen[parent]
        return seen.to(device)

    def paths(self, device: torch.device | str = "cpu") -> Tensor:
        """Returns ``[W, K]`` int64: the path to every node, without the root, padded with -1."""
        rows = [(*self.path(node), *[-1] * (self.depth - self.depths[node])) for node in range(self.nodes)]
        return torch.tensor(rows, dtype=torch.int64, device=device).reshape(self.nodes, self.depth)
