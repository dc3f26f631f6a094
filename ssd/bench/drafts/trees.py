"""Compares candidate trees by accepted tokens per row, with a draft that runs along known texts.

Under coupled verification the tree below a root depends on the text alone, and an accepted path *is* the text. If
every child is the draft's guess of some rank, only the ranks that the draft gives to the tokens of the text matter
(:meth:`DraftAlong.ranks`), and a static tree is evaluated from them. Trees whose shape follows the draft's confidence
also need its scores of tokens that are not in the text (:meth:`DraftAlong.dynamic_depths`).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...decoding.noise import gumbel
from ...decoding.trees.widths import siblings_within
from ...models.layers import cache_argument
from ...request.sampling_params import SamplingParams

RankPath = tuple[int, ...]
"""A node, as the ranks of the guesses on its path from the root; the root is ()."""


@dataclass(frozen=True)
class RankTree:
    """A static tree, as the paths of all its nodes except the root."""

    paths: frozenset[RankPath]

    @classmethod
    def comb(cls, widths: Sequence[int]) -> RankTree:
        """Returns a comb with ``widths[d]`` guesses at depth d + 1, the chain's among them."""
        return cls(frozenset((*[0] * depth, rank) for depth, width in enumerate(widths) for rank in range(width)))

    @property
    def rows(self) -> int:
        """W: verified rows."""
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        return max((len(path) for path in self.paths), default=0)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Nodes at each depth below the root."""
        counts = Counter(len(path) for path in self.paths)
        return tuple(counts[depth] for depth in range(1, self.depth + 1))

    def accepted(self, ranks: Sequence[int]) -> int:
        """Returns the depth reached in a text whose next tokens have these ranks."""
        node: RankPath = ()
        for rank in ranks:
            if (child := (*node, rank)) not in self.paths:
                break
            node = child
        return len(node)


def tokens_per_round(accepted: Iterable[Sequence[int]]) -> float:
    """Returns the mean tokens of consecutive rounds, from the depth a round reaches at each position of each text."""
    rounds = tokens = 0
    for text in accepted:
        position = 0
        while position < len(text):
            rounds += 1
            tokens += text[position] + 1
            position += text[position] + 1
    return tokens / rounds


def static_accepted(tree: RankTree, texts: Iterable[Sequence[int]], horizon: int) -> list[list[int]]:
    """Returns the depth a round reaches at every position of the texts of ranks, without the last ``horizon``."""
    return [[tree.accepted(text[at : at + tree.depth]) for at in range(len(text) - horizon)] for text in texts]


def rank_curve(texts: Iterable[Sequence[int]], widest: int = 9) -> tuple[float, ...]:
    """Returns for each rank below ``widest`` how often the draft's guess of that rank was right."""
    counts = Counter(rank for text in texts for rank in text)
    return tuple(counts[rank] / counts.total() for rank in range(widest))


def static_tree(curve: Sequence[float], rows: int, deepest: int) -> RankTree:
    """Returns the tree of the ``rows - 1`` most probable nodes (Sequoia, arXiv 2402.12374).

    The probability of a node is the product over the ranks of its path.
    """
    heap: list[tuple[float, RankPath]] = [(-chance, (rank,)) for rank, chance in enumerate(curve)]
    paths: set[RankPath] = set()
    heapq.heapify(heap)
    while len(paths) < rows - 1 and heap:
        worth, path = heapq.heappop(heap)
        paths.add(path)
        if len(path) < deepest:
            for rank, chance in enumerate(curve):
                heapq.heappush(heap, (worth * chance, (*path, rank)))
    return RankTree(frozenset(paths))


def chains(rows: int, deepest: int) -> list[RankTree]:
    """Returns a chain for each depth."""
    return [RankTree.comb([1] * depth) for depth in range(1, min(deepest, rows - 1) + 1)]


def even_combs(rows: int, deepest: int) -> list[RankTree]:
    """Returns combs with the same number of siblings at every depth."""
    return [RankTree.comb([(rows - 1) // depth] * depth) for depth in range(1, min(deepest, rows - 1) + 1)]


def allotted_combs(curve: Sequence[float], rows: int, deepest: int) -> list[RankTree]:
    """Returns a comb for each depth, with siblings where the curve makes acceptance most probable."""
    depths = range(1, min(deepest, rows - 1) + 1)
    return [RankTree.comb([1 + count for count in siblings_within(rows, depth, curve)]) for depth in depths]


class DraftAlong:
    """A draft that runs along one text.

    Args:
        model: a transformers model; there is no copy bias.
        ids: tokens of the text.
        first: position of the first root.
    """

    def __init__(self, model: Any, ids: Sequence[int], first: int, params: SamplingParams, vocabulary: int):
        self._model, self._params, self._vocabulary = model, params, vocabulary
        self.ids, self.first = torch.tensor(ids), first
        self._takes_cache = cache_argument(model)
        self._cache: Any = None  # made by the model's first forward
        positions = torch.arange(len(ids))
        self._scores = self._forward(self.ids, positions, torch.tril(torch.ones(len(ids), len(ids), dtype=torch.bool)))

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Returns scores ``[R, V]`` of rows ``tokens`` at ``positions`` that attend ``mask`` ``[R, slots]``."""
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        with torch.no_grad():
            given = {"position_ids": positions[None], "attention_mask": bias[None, None], "use_cache": True}
            found = self._model(input_ids=tokens[None], **{self._takes_cache: self._cache}, **given)
        self._cache, logits = found[self._takes_cache], found.logits[0, :, : self._vocabulary].float()
        if self._params.temperature == 0:
            return logits
        seeds = torch.tensor([self._params.seed])[:, None]
        return logits + self._params.temperature * gumbel(seeds, positions[None] + 1, self._vocabulary)[0]

    def ranks(self) -> list[int]:
        """Returns for every token after the first root how many guesses the draft ranks before it."""
        scores, right = self._scores[self.first : -1], self.ids[self.first + 1 :]
        return (scores > scores.gather(1, right[:, None])).sum(1).tolist()

    def dynamic_depths(self, rows: int, deepest: int, horizon: int, sharpness: float) -> list[list[int]]:
        """Returns the depth reached from every root by the tree of the nodes of greatest confidence.

        The confidence of a node is the product over its path of softmax(β · scores), noise included; β is
        ``sharpness``. As in EAGLE-2 (arXiv 2406.16858), but nodes are expanded one at a time, without a beam.

        Returns:
            A list for each number of rows 2, 3, …, ``rows``.
        """
        roots = torch.arange(self.first, len(self.ids) - 1 - horizon)
        count, length = len(roots), len(self.ids)
        every = torch.arange(count)
        slots = torch.arange(length) <= roots[:, None]  # slots of the text that the rows below a root attend
        pool = _children(self._scores[roots], torch.zeros(count), rows - 1, sharpness)
        parents, depths = torch.full_like(pool.tokens, -1), torch.ones_like(pool.tokens)
        right = torch.zeros(count, 0, dtype=torch.bool)  # [P, n]: whether a node is on the text's path
        above = torch.zeros(count, 0, 0, dtype=torch.bool)  # [P, n, n]: ancestors of each node, itself included
        found, reached = [], torch.zeros(count, dtype=torch.int64)
        for step in range(rows - 1):
            best = pool.worth.argmax(1)
            worth, token, parent, depth = (x[every, best] for x in (pool.worth, pool.tokens, parents, depths))
            pool.worth[every, best] = -torch.inf
            above_right = right[every, parent.clamp(min=0)] if step else parent < 0
            on_path = ((parent < 0) | above_right) & (token == self.ids[roots + depth])
            reached = torch.where(on_path, depth.maximum(reached), reached)
            found.append(reached.tolist())
            if step == rows - 2:
                break
            right = torch.cat([right, on_path[:, None]], 1)
            grown = torch.zeros(count, step + 1, step + 1, dtype=torch.bool)
            grown[:, :step, :step] = above
            if step:
                grown[:, step, :step] = above[every, parent.clamp(min=0)] & (parent >= 0)[:, None]
            grown[:, step, step] = True
            above = grown
            # The rows of a step are adjacent in the cache: row p of step s is in slot length + s * P + p.
            mine = torch.zeros(count, step + 1, count, dtype=torch.bool)
            mine[every, :, every] = above[:, step]
            scores = self._forward(token, roots + depth, torch.cat([slots, mine.flatten(1)], 1))
            new = _children(scores, worth.masked_fill(depth >= deepest, -torch.inf), rows - 1, sharpness)
            pool = _Pool(torch.cat([pool.worth, new.worth], 1), torch.cat([pool.tokens, new.tokens], 1))
            parents = torch.cat([parents, torch.full_like(new.tokens, step)], 1)
            depths = torch.cat([depths, (depth + 1)[:, None].expand_as(new.tokens)], 1)
        self._cache.crop(-(self._cache.get_seq_length() - length))
        return found


class _Pool(NamedTuple):
    worth: Tensor
    tokens: Tensor


def _children(scores: Tensor, worth: Tensor, most: int, sharpness: float) -> _Pool:
    """Returns the ``most`` best children of nodes ``[P]`` with scores ``[P, V]`` and log-confidence ``worth``."""
    best = (sharpness * scores).log_softmax(-1).topk(most, dim=-1)
    return _Pool(best.values + worth[:, None], best.indices)
