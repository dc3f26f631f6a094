"""Combs with siblings where they are most likely accepted: the allocation, and equality with plain decoding."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ssd import LLM, SamplingParams
from ssd.config.load import load_config
from ssd.decoding.trees.shape import TreeShape
from ssd.decoding.trees.widths import RANKS, siblings_within
from ssd.engine.front import make_plan
from ssd.errors import ConfigError
from ssd.pipeline.runtime.build_draft import build_draft
from ssd.pipeline.runtime.build_verifier import build_verifier
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.testing.twins.rounds import play

Configure = Callable[..., dict[str, Any]]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
WARM = replace(GREEDY, temperature=0.8, seed=11)
ASKED = [[9, 30, 77], [5, 6, 5, 6], [20, 21, 22, 23, 24]]


@pytest.mark.parametrize(("rows", "depth"), [(4, 3), (6, 3), (8, 3), (9, 4), (12, 2), (7, 5)])
def test_no_other_comb_accepts_more(rows: int, depth: int) -> None:
    def expected(siblings: tuple[int, ...]) -> float:
        return sum(RANKS[0] ** above * sum(RANKS[: 1 + count]) for above, count in enumerate(siblings))

    chosen = siblings_within(rows, depth)
    assert 1 + depth + sum(chosen) == rows
    spread = (some for some in itertools.product(range(9), repeat=depth) if sum(some) == rows - 1 - depth)
    assert expected(chosen) == pytest.approx(max(map(expected, spread)))


def test_what_cannot_be_spent_is_left() -> None:
    assert siblings_within(100, 2) == (8, 8)
    with pytest.raises(ValueError, match="needs 4 rows"):
        siblings_within(3, 3)


def test_the_shape() -> None:
    shape = TreeShape.comb(3, [2, 0, 1])
    assert shape.parents == (0, 1, 2, 0, 0, 2)
    assert shape.is_comb and shape.siblings == (2, 0, 1) and shape.chain == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="zip"):
        TreeShape.comb(3, [2, 0])


# K, siblings, rows, batch, fallback, forecast, dtype.
COVER = [
    (3, [2, 1], None, 1, "jit", "confidence", "float32"),
    (4, [0, 0, 3], None, 3, "none", "geometric", "bfloat16"),
    (3, 0, 8, 3, "auto", "measured", "float32"),
    (2, 0, 9, 1, "ngram", "confidence", "bfloat16"),
    ("auto", 0, 10, 3, "jit", "confidence", "float32"),
]


@pytest.mark.parametrize(("lookahead", "siblings", "rows", "batch", "fallback", "forecast", "dtype"), COVER)
def test_the_same_tokens(
    lookahead: int | str,
    siblings: int | list[int],
    rows: int | None,
    batch: int,
    fallback: str,
    forecast: str,
    dtype: str,
    tiny_config: Configure,
) -> None:
    speculation = {
        "lookahead": lookahead,
        "siblings": siblings,
        "rows": rows,
        "fallback": fallback,
        "forecast": {"budget": 12, "shape": forecast},
    }
    config = tiny_config(dtype=dtype, engine={"max_batch": batch}, speculation=speculation)
    params = [GREEDY, WARM, replace(WARM, seed=3, top_k=9)]
    with LLM(config, launch=InprocPipeline) as llm:
        found = {
            method: llm.generate(ASKED, [replace(each, method=method) for each in params])
            for method in ("none", "sd", "ssd")
        }
        assert llm.degraded is None
    plain = [output.token_ids for output in found["none"]]
    for method in ("sd", "ssd"):
        assert [output.token_ids for output in found[method]] == plain
        assert sum(output.speculation.accepted for output in found[method]) > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_siblings_are_accepted_and_keep_their_keys(temperature: float, tiny_config: Configure) -> None:
    """In fewer rounds than the chain alone, with the same tokens, also after accepted siblings."""
    params = [replace(GREEDY, temperature=temperature, seed=seed, max_tokens=40) for seed in range(3)]
    taken, tokens = {}, {}
    for name, tree in {"chain": {}, "comb": {"siblings": [4, 1, 2]}, "rows": {"rows": 11}}.items():
        speculation = {"lookahead": 3, "forecast": {"budget": 10}, **tree}
        plan = make_plan(load_config(tiny_config(engine={"max_batch": 3}, speculation=speculation)))[1]
        histories = play(build_verifier(plan)[0], build_draft(plan)[0], plan, ASKED, params)
        taken[name] = sum(len(history.rounds) for history in histories)
        tokens[name] = [history.tokens for history in histories]
    assert tokens["comb"] == tokens["rows"] == tokens["chain"]
    assert taken["comb"] < taken["chain"] and taken["rows"] < taken["chain"]


def test_rejection_takes_them(tiny_config: Configure) -> None:
    """At temperature 0 with plain decoding's tokens; sampled, to the end (its laws: test_laws.py, of any tree)."""
    speculation = {"lookahead": 3, "siblings": [2, 0, 1], "verify": "rejection", "forecast": {"budget": 8}}
    with LLM(tiny_config(engine={"max_batch": 3}, speculation=speculation), launch=InprocPipeline) as llm:
        params = [GREEDY, replace(GREEDY, max_tokens=15), WARM]
        plain = llm.generate(ASKED, [replace(each, method="none") for each in params])
        found = llm.generate(ASKED, params)
    assert [output.token_ids for output in found[:2]] == [output.token_ids for output in plain[:2]]
    assert len(found[2].token_ids) == 24 and found[2].speculation.accepted > 0


@pytest.mark.parametrize(
    ("speculation", "message"),
    [
        ({"lookahead": 2, "siblings": [1, 1, 1]}, "lists 3 depths; list at most speculation.lookahead=2"),
        ({"lookahead": 4, "rows": 4}, "must be from 5 .* to 37"),
        ({"lookahead": 2, "rows": 30}, "must be from 3 .* to 19"),
        ({"lookahead": "auto", "rows": 5}, "lookahead_max=5"),
        ({"rows": 8, "siblings": 1}, "leave speculation.siblings at 0"),
        ({"verify": "block", "rows": 8}, "chains only"),
        ({"verify": "block", "siblings": [0, 1]}, "chains only"),
        ({"siblings": [9]}, "from 0 to 8"),
    ],
    ids=str,
)
def test_refused(speculation: dict[str, Any], message: str, tiny_config: Configure) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(tiny_config(speculation={"lookahead": 4, **speculation}))
