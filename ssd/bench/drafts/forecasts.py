"""Hit rates of forecasts, from rounds replayed along known texts.

As in ``replay``, under coupled verification trees and outcomes depend on the text alone. Forecasts that learn need
the outcomes of earlier rounds, so rounds are replayed in order, one text after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...decoding.forecast.base import Forecast
from ...decoding.trees.shape import ABSENT
from ...pipeline.runtime.build_draft import build_draft
from ...pipeline.runtime.plan import Plan
from ...request.sampling_params import SamplingParams
from ..simulate.replay import DraftAlongText, deepest_node, draft_plan, with_speculation


def hit_rates(
    plan: Plan,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    params: SamplingParams,
    *,
    shapes: Sequence[str],
    budgets: Sequence[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[int, float]]:
    """Returns the share of rounds whose outcome was prepared, by shape and budget of the forecast.

    Args:
        plan: of the pair; its tree is used.
        texts: token ids of each prompt and of the target's answer to it under ``params``. The last K + 1 tokens of an
            answer serve only as outcomes of the rounds before.
        progress: called with the number of texts done and the total.
    """
    tree = plan.shape
    siblings = list(tree.siblings)
    worker = build_draft(draft_plan(plan, tree.depth, siblings, max(budgets)))[0]
    forecasts = {
        (shape, budget): with_speculation(
            plan, lookahead=tree.depth, siblings=siblings, budget=budget, shape=shape, max_batch=1
        ).forecast("cpu")
        for shape in shapes
        for budget in budgets
    }
    hits, rounds = dict.fromkeys(forecasts, 0), 0
    for number, (prompt, answer) in enumerate(texts):
        text = DraftAlongText(worker, [*prompt, *answer], params)
        for forecast in forecasts.values():
            forecast.admit(0, params.temperature)
        root, last, first = len(prompt) - 1, len(prompt) + len(answer) - tree.depth - 2, True
        while root < last:
            tokens, scores = text.at(root)
            tokens = tokens[None].clone()
            if first:  # the first round of a sequence has no candidates
                tokens[:, 1:], first = ABSENT, False
            ahead = torch.tensor([text.ids[root + 1 : root + tree.depth + 2]])
            node, depth = deepest_node(tree, tokens, ahead)
            bonus = ahead.gather(1, depth[:, None])[:, 0]
            for key, forecast in forecasts.items():
                hits[key] += _hit(forecast, scores[None], tokens, node, bonus)
            rounds += 1
            root += int(depth) + 1
        progress(number + 1, len(texts))
    return {shape: {budget: hits[shape, budget] / rounds for budget in budgets} for shape in shapes}


def _hit(forecast: Forecast, scores: Tensor, tokens: Tensor, node: Tensor, bonus: Tensor) -> bool:
    """Plays one round of one text; returns whether the forecast holds its outcome."""
    forecast.prepare(tokens.tolist())
    nodes, guesses = forecast.outcomes(scores, tokens)
    outcome, outcomes = (int(node), int(bonus)), zip(nodes[0].tolist(), guesses[0].tolist(), strict=True)
    branch = next((n for n, prepared in enumerate(outcomes) if prepared == outcome), None)
    forecast.learn([True], node.tolist(), [branch])
    return branch is not None
