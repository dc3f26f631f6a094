"""Replays the draft over known texts: what a round at every position accepts, and which forecasts it hits.

Under coupled verification the tree below a root depends on the tokens before it alone, whether it was prepared as a
branch or drafted after a miss. So the draft runs along the target's own tokens and drafts the deepest and widest tree
at every position; all smaller trees are parts of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...decoding.processors import TreePaths
from ...decoding.trees.combs import comb_tokens
from ...decoding.trees.shape import ABSENT, TreeShape
from ...decoding.trees.widths import siblings_within
from ...errors import ConfigError
from ...models.rows import RowPlan
from ...pipeline.draft.worker import DraftWorker
from ...pipeline.runtime.build_draft import build_draft
from ...pipeline.runtime.plan import Plan
from ...pipeline.sampling.scorers import ExactScorer
from ...pipeline.sampling.walk import ChainSteps, Rows, Walk, single_forward, walked
from ...pipeline.transport.messages import Admit
from ...request.sampling_params import SamplingParams
from .profile import NEVER, ROOT, Replay

BUDGETS = (4, 8, 12, 16, 24, 32, 48)
CHUNK_BYTES = 64 << 20
WIDEST = 3
"""Combs with more rows than this for each depth are not replayed."""


def replay(
    plan: Plan,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    params: SamplingParams,
    *,
    lookaheads: Sequence[int],
    rows: Sequence[int] = (),
    budgets: Sequence[int] = BUDGETS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Replay:
    """Returns the tables of accepted tokens and needed budgets, for chains and for combs.

    Args:
        plan: of the pair; shape and sharpness of its forecast are used.
        texts: token ids of each prompt and of the target's answer to it under ``params``. The last
            ``max(lookaheads) + 1`` tokens of an answer serve only as outcomes of the rounds before.
        rows: rows W of the combs.
        budgets: budgets of the forecasts. Smaller confidence forecasts are prefixes of the largest.
        progress: called with the number of texts done and the total.

    Raises:
        ConfigError: the forecast learns, so its outcomes depend on the order of rounds.
    """
    if plan.config.speculation.forecast.shape == "measured":
        raise ConfigError(
            "a forecast that learns changes in every round; measure profiles with speculation.forecast.shape"
            "=confidence (benchmarks/forecasts.py compares hit rates)"
        )
    combs = {
        (depth, count): siblings_within(count, depth)
        for depth in lookaheads
        for count in sorted({depth + 1, *rows})
        if depth < count <= 1 + WIDEST * depth
    }
    deepest, widest = max(lookaheads), max(max(beside) for beside in combs.values())
    whole = TreeShape.comb(deepest, widest)
    worker = build_draft(draft_plan(plan, deepest, widest, max(budgets)))[0]
    trees = {ROOT: (TreeShape.comb(1), [0, 0])}
    for (depth, count), beside in combs.items():
        trees[f"{depth}:{count}"] = TreeShape.comb(depth, beside), _nodes(deepest, widest, beside)
    # The confidence forecast lists outcomes by probability, so a smaller one is a prefix of a larger one.
    nested = plan.config.speculation.forecast.shape == "confidence"
    sizes = [max(budgets)] if nested else sorted(budgets, reverse=True)
    forecasts = {
        name: [_sized(plan, shape, size).forecast("cpu") for size in sizes] for name, (shape, _) in trees.items()
    }
    accepted: dict[str, list[list[int]]] = {name: [[] for _ in texts] for name in trees}
    needed: dict[str, list[list[int]]] = {name: [[] for _ in texts] for name in trees}
    chunk = max(1, CHUNK_BYTES // (4 * whole.nodes * plan.vocabulary))
    for number, (prompt, answer) in enumerate(texts):
        text = DraftAlongText(worker, [*prompt, *answer], params)
        roots = range(len(prompt) - 1, len(prompt) + len(answer) - deepest - 2)
        for start in range(0, len(roots), chunk):
            seen = [text.at(root) for root in roots[start : start + chunk]]
            tokens, marks = torch.stack([t for t, _ in seen]), torch.stack([s for _, s in seen])
            ahead = torch.tensor([text.ids[root + 1 : root + deepest + 2] for root in roots[start : start + chunk]])
            for name, (shape, nodes) in trees.items():
                part, scored = tokens[:, nodes].clone(), marks[:, nodes]
                if name == ROOT:
                    part[:, 1] = ABSENT
                node, depth = deepest_node(shape, part, ahead)
                bonus = ahead.gather(1, depth[:, None])
                accepted[name][number] += depth.tolist()
                least = torch.full_like(node, NEVER)
                for size, forecast in zip(sizes, forecasts[name], strict=True):
                    outcomes, guesses = forecast.outcomes(scored, part)
                    found = (outcomes == node[:, None]) & (guesses == bonus)
                    least = torch.where(found.any(1), found.int().argmax(1) + 1 if nested else size, least)
                needed[name][number] += least.tolist()
        progress(number + 1, len(texts))
    return Replay(accepted=accepted, needed=needed)


class DraftAlongText:
    """The draft on one text: at any root, in ascending order, the whole tree and its scores.

    Args:
        worker: of one slot; its tree is drafted.
        ids: the text.
        params: the text was written under.
    """

    def __init__(self, worker: DraftWorker, ids: list[int], params: SamplingParams):
        self.ids, self._worker, shape = ids, worker, worker.shape
        worker.admit(Admit(slot=0, tokens=ids, params=params, forecasts=True))
        worker.sampling.processors.clear(0)  # they would count the whole text, not the part before a root
        self._chain, self._paths = ChainSteps("step"), TreePaths(shape, worker.runner.device)
        depths = shape.depth_index(worker.runner.device)[None]
        self._tree = Rows(RowPlan.tree("replay", shape), 0, depths)
        self._ready = False

    @torch.no_grad()
    def at(self, root: int) -> tuple[Tensor, Tensor]:
        """Returns tokens ``[W]`` and draft scores ``[W, V]`` (float32, on the CPU) of the tree below ``root``."""
        runner, sampling, shape = self._worker.runner, self._worker.sampling, self._worker.shape
        if not self._ready and root:
            runner.prefill(0, self.ids[:root])  # later positions are written on the way
        self._ready = True
        length, roots = (torch.tensor(value, device=runner.device) for value in ([root], [[self.ids[root]]]))
        scorer = ExactScorer(sampling, 1 + max(shape.siblings), sampling.noise(length), self._paths)
        forward, source = single_forward(runner, length, root, None), self._worker.copying.source(length)
        walk = Walk(self._chain.rows, forward, scorer, source)
        ranked = walked(walk.step, walk.below(roots), shape.depth)
        tokens = torch.cat([roots, comb_tokens(ranked, shape.siblings)[:, 0]], dim=1)
        logits = walk.logits(self._tree, tokens, walk.endings(tokens))
        scores, _ = scorer.outcomes(logits, self._tree, scorer.paths(tokens))
        return tokens[0].cpu(), scores[0].cpu()


def deepest_node(shape: TreeShape, tokens: Tensor, ahead: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the deepest accepted node of each tree and its depth, both ``[P]``.

    Args:
        tokens: of the trees ``[P, W]``.
        ahead: tokens of the text after each root ``[P, K + 1]``.
    """
    node = torch.zeros(len(tokens), dtype=torch.int64)
    depth = node.clone()
    for child, parent in enumerate(shape.parents, start=1):
        matches = tokens[:, child] == ahead[:, shape.depths[child] - 1]
        reached = (node == parent) & matches
        node = torch.where(reached, child, node)
        depth = torch.where(reached, shape.depths[child], depth)
    return node, depth


def _nodes(deepest: int, widest: int, beside: Sequence[int]) -> list[int]:
    """Returns the nodes of ``comb(deepest, widest)`` that form ``comb(len(beside), beside)``, in its order."""
    leaves = [deepest + 1 + level * widest + rank for level, count in enumerate(beside) for rank in range(count)]
    return [*range(len(beside) + 1), *leaves]


def _sized(plan: Plan, shape: TreeShape, size: int) -> Plan:
    return with_speculation(plan, lookahead=shape.depth, siblings=list(shape.siblings), budget=size)


def draft_plan(plan: Plan, depth: int, siblings: int | list[int], budget: int) -> Plan:
    """Returns the plan of a draft for replays: one slot, nothing compiled."""
    config = plan.config
    assert config.draft is not None
    draft = config.draft.model_copy(update={"compile": False, "data_parallel": 1})
    plan = replace(plan, config=config.model_copy(update={"draft": draft}))
    return with_speculation(plan, lookahead=depth, siblings=siblings, budget=budget, max_batch=1)


def with_speculation(
    plan: Plan,
    *,
    lookahead: int,
    siblings: int | list[int],
    budget: int,
    shape: str | None = None,
    max_batch: int | None = None,
) -> Plan:
    """Returns the plan with another tree and forecast."""
    config = plan.config
    found = config.speculation.forecast
    forecast = found.model_copy(update={"budget": budget, "shape": shape or found.shape})
    speculation = config.speculation.model_copy(
        update={"lookahead": lookahead, "siblings": siblings, "rows": None, "forecast": forecast}
    )
    engine = config.engine.model_copy(update={"max_batch": max_batch or config.engine.max_batch})
    return replace(plan, config=config.model_copy(update={"speculation": speculation, "engine": engine}))
