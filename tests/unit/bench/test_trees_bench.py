"""The replay of candidate trees: what it counts is what rounds accept."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from ssd import SamplingParams
from ssd.bench.drafts.trees import (
    DraftAlong,
    RankTree,
    allotted_combs,
    rank_curve,
    static_accepted,
    static_tree,
    tokens_per_round,
)
from ssd.config.load import load_config, resolve_model_path
from ssd.engine.front import make_plan
from ssd.models.checkpoints.loading import load_model
from ssd.pipeline.runtime.build_draft import build_draft
from ssd.pipeline.runtime.build_verifier import build_verifier
from ssd.testing.twins.rounds import play


def test_rank_trees() -> None:
    tree = RankTree.comb([2, 1, 3])
    assert (tree.rows, tree.depth, tree.widths) == (7, 3, (2, 1, 3))
    assert [tree.accepted(ranks) for ranks in ([2], [1, 0], [0, 0, 2, 0], [0, 1])] == [0, 1, 3, 1]
    assert tokens_per_round([[1, 0, 2], [0]]) == (2 + 3 + 1) / 3  # rounds at 0 and 2 of the first, 0 of the second


def test_static_trees() -> None:
    curve = rank_curve([[0, 0, 1, 0, 0, 1, 0, 2]], widest=3)
    assert curve == (5 / 8, 2 / 8, 1 / 8)
    # .625, .39, .25, .244 (0, 0, 0), .156 (0, 1) and (1, 0)
    assert static_tree(curve, 5, 3).paths == {(0,), (0, 0), (1,), (0, 0, 0)}
    assert static_tree(curve, 7, 3).paths == {(0,), (0, 0), (1,), (0, 0, 0), (0, 1), (1, 0)}
    assert [tree.widths for tree in allotted_combs(curve, 6, 3)] == [(3,), (3, 2), (2, 2, 1)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_counts_are_those_of_rounds(temperature: float, tiny_config: Callable[..., dict[str, Any]]) -> None:
    speculation = {"lookahead": 3, "siblings": [3, 0, 2], "forecast": {"budget": 8}}
    config = load_config(tiny_config(speculation=speculation))
    plan = make_plan(config)[1]
    assert config.draft is not None
    prompt = torch.randint(4, 128, (9,), generator=torch.Generator().manual_seed(3)).tolist()
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=40, ignore_eos=True)
    (history,) = play(build_verifier(plan)[0], build_draft(plan)[0], plan, [prompt], [params])

    draft = load_model(resolve_model_path(config.draft.model), dtype="float32", device="cpu", max_positions=64)
    along = DraftAlong(draft, [*prompt, *history.tokens], len(prompt) - 1, params, plan.vocabulary)
    ranks = along.ranks()
    (accepted,) = static_accepted(RankTree.comb([4, 1, 3]), [ranks], 3)
    position, compared = len(history.rounds[0].tokens), 0
    for now in history.rounds[1:]:
        if position >= len(accepted):
            break
        assert accepted[position] == now.accepted
        position += len(now.tokens)
        compared += 1
    assert compared > 5

    # The dynamic tree: with as many rows as there are tokens at one depth it holds all of them, ..
    whole = along.dynamic_depths(7, 1, 3, 1.0)
    assert whole[-1] == [int(rank < 6) for rank in ranks[:-3]]
    # .. with one it is the draft's first guess; more rows never reach less; and it is not a chain.
    deep = along.dynamic_depths(8, 3, 3, 1.0)
    assert deep[0] == static_accepted(RankTree.comb([1]), [ranks], 3)[0]
    assert all(more >= less for fewer, larger in pairwise(deep) for less, more in zip(fewer, larger, strict=True))
    assert deep == along.dynamic_depths(8, 3, 3, 1.0)


def test_a_sharp_dynamic_tree_is_the_chain(tiny_config: Callable[..., dict[str, Any]]) -> None:
    config = load_config(tiny_config())
    plan, ids = make_plan(config)[1], torch.randint(4, 128, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    assert config.draft is not None
    draft = load_model(resolve_model_path(config.draft.model), dtype="float32", device="cpu", max_positions=64)
    along = DraftAlong(draft, ids, 4, SamplingParams(), plan.vocabulary)
    # The text becomes what the draft itself would say after it, so that there is something to accept.
    expected = static_accepted(RankTree.comb([1, 1, 1]), [along.ranks()], 3)[0]
    assert along.dynamic_depths(4, 3, 3, 1e4)[-1] == expected
