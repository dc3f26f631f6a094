"""The drafting walk: forward, copy bias, scores, best tokens, and those are fed to the next forward.

A walk advances N branches of every slot by one token per step. A tree's walk starts from the outcomes that the forecast
chose (``draft.branches``); a chain is a walk with one branch, from the root. A walk is made of the rows of its steps, a
forward and a scorer. Its caller chooses how it runs (compiled as a whole, in parts, step by step): ``step`` may run
inside a compiled function.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...decoding.text.copying import CopySource
from ...decoding.trees.combs import best_tokens
from ...decoding.verify.draft_probs import DraftProbs
from ...models.rows import Layout, RowPlan
from ...models.runner import ForwardRunner
from .slots import SlotSampling


class Rows(NamedTuple):
    """The rows of one forward of a walk."""

    plan: RowPlan
    step: int
    """Depth, below the root of their tree, of the nodes that the candidates continue."""
    ahead: Tensor | int
    """How many positions after L + 1 each row's candidates are (``noise_at``)."""
    layout: Layout | None = None
    """None: the plan's own."""
    shift: int = 0
    """Position of the plan's first row after L."""
    in_tree: bool = False
    """Whether they are rows of the tree under verification, or its root."""


class Frontier(NamedTuple):
    """Where the N branches of B slots stand."""

    fed: Tensor
    """int64 ``[B, N]``, the tokens fed next."""
    nodes: Tensor
    """int64 ``[B, N]``, the tree nodes that the branches continue; 0 for a chain."""
    endings: Tensor | None = None
    """int32 ``[B, N, n]``, the last tokens for the copy bias, ``fed`` included; None without a bias."""
    paths: Tensor | None = None
    """int64 ``[B, N, D]``, all candidates, ``fed`` included; None if the scores do not depend on them."""


class Scorer(ABC):
    """Chooses candidates from logits: ``score`` says how.

    Args:
        sampling: of the slots.
        width: n, the candidates of the widest depth.
    """

    def __init__(self, sampling: SlotSampling, width: int):
        self._sampling, self._width = sampling, width

    @abstractmethod
    def score(self, logits: Tensor, rows: Rows, paths: Tensor | None) -> Tensor:
        """Returns the scores ``[B, R, V]`` of rows below the candidates ``paths [B, R, D]``."""

    def paths(self, tokens: Tensor) -> Tensor | None:
        """Returns the paths of the rows of the trees ``tokens [B, W]``, or of their roots ``[B, 1]``."""
        return None

    def outcomes(self, logits: Tensor, rows: Rows, paths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the scores that bonus tokens are guessed by, and the same without noise under rules that need it
        (``Forecast.outcomes``)."""
        return self.score(logits, rows, paths), None

    def children(self, logits: Tensor, rows: Rows, paths: Tensor | None) -> Tensor:
        """Returns the candidates ``[B, R, n]`` below each row, best first."""
        return best_tokens(self.score(logits, rows, paths), self._width)

    def drawn(self, depth: int) -> DraftProbs | None:
        """Returns the distributions ``[B, N, I, m]`` that the walk's trees of this depth were drawn from, if any."""
        return None


class ChainSteps:
    """One branch per slot, from the root down."""

    def __init__(self, name: str):
        self.plan = RowPlan.sequential(name, 1)

        self._joined: dict[int, RowPlan] = {}

    def rows(self, step: int, nodes: Tensor) -> Rows:
        return Rows(self.plan, step, step, shift=step, in_tree=step == 0)

    def together(self, depth: int, nodes: Tensor) -> Rows:
        """Returns the rows of the first ``depth`` steps as those of one forward, step by step."""
        plan = self._joined.setdefault(depth, RowPlan.sequential(f"{self.plan.name} {depth}", depth))
        return Rows(plan, 0, 0)


Forward = Callable[[Rows, Tensor], Tensor]
"""Logits ``[B, R, V]`` of rows with these tokens ``[B, R]``."""


def fused_forward(runner: ForwardRunner, lengths: Tensor, context: int, slots: Tensor | None) -> Forward:
    """Returns the forward for compiled functions: above L ``[B]``, in one context tier."""
    return lambda rows, tokens: runner.logits(
        rows.plan, tokens, lengths + rows.shift if rows.shift else lengths, context, rows.layout, slots
    )


def single_forward(runner: ForwardRunner, lengths: Tensor, longest: int, slots: Tensor | None) -> Forward:
    """Returns the forward that is compiled by itself. ``longest``: the greatest L in use."""

    def forward(rows: Rows, tokens: Tensor) -> Tensor:
        above, longest_above = lengths + rows.shift if rows.shift else lengths, longest + rows.shift
        return runner.forward(rows.plan, tokens, above, longest=longest_above, layout=rows.layout, slots=slots)

    return forward


class Walk:
    """Chooses candidates one depth at a time.

    Args:
        rows: of a step, for branches that continue nodes ``[B, N]``.
        forward: runs the draft.
        scorer: chooses the candidates.
        source: of the copy bias; None: no bias.
    """

    def __init__(
        self,
        rows: Callable[[int, Tensor], Rows],
        forward: Forward,
        scorer: Scorer,
        source: CopySource | None = None,
    ):
        self._rows, self._forward, self.scorer, self.source = rows, forward, scorer, source

    def below(self, roots: Tensor) -> Frontier:
        """Returns the frontier of a chain at the roots ``[B, 1]``."""
        return Frontier(roots, torch.zeros_like(roots), self.endings(roots), self.scorer.paths(roots))

    def endings(self, tokens: Tensor) -> Tensor | None:
        """Returns the endings of the rows of the trees ``tokens [B, W]``, or of their roots ``[B, 1]``."""
        return None if self.source is None else self.source.endings(tokens)

    def logits(self, rows: Rows, tokens: Tensor, endings: Tensor | None) -> Tensor:
        """Returns the draft's logits ``[B, R, V]``, copy bias included, after these tokens ``[B, R]``."""
        # ``ABSENT`` is fed as token 0: its children are never accepted.
        logits = self._forward(rows, tokens.clamp(min=0))
        return logits if self.source is None or endings is None else self.source.biased(logits, endings)

    def step(self, number: int, frontier: Frontier) -> tuple[Tensor, Frontier]:
        """Returns the candidates ``[B, N, n]`` below the frontier, and the frontier after the chains' tokens."""
        rows = self._rows(number, frontier.nodes)
        children = self.scorer.children(self.logits(rows, frontier.fed, frontier.endings), rows, frontier.paths)
        return children, after(frontier, children[..., 0], self.source)


def after(frontier: Frontier, tokens: Tensor, source: CopySource | None = None) -> Frontier:
    """Returns the frontier after the candidates ``tokens [B, N]``, which are fed next."""
    _, nodes, endings, paths = frontier
    if source is not None and endings is not None:
        endings = source.fed(endings, tokens)
    if paths is not None:
        paths = torch.cat([paths, tokens[..., None]], dim=-1)
    return Frontier(tokens, nodes, endings, paths)


def never() -> bool:
    return False


def walked(
    step: Callable[[int, Frontier], tuple[Tensor, Frontier]],
    frontier: Frontier,
    depth: int,
    ended: Callable[[], bool] = never,
) -> list[Tensor]:
    """Takes ``depth`` steps, fewer if ``ended`` says so; it is asked before every step but the first. Returns the
    candidates ``[B, N, n]`` of each depth."""
    ranked: list[Tensor] = []
    for number in range(depth):
        if ranked and ended():
            break
        children, frontier = step(number, frontier)
        ranked.append(children)
    return ranked
