"""Parts of the verification rules: streams of noise, distributions and their frames, greedy rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssd import LLM, SamplingParams
from ssd.config.load import load_config
from ssd.decoding.noise import ACCEPT_STREAM, DRAFT_STREAM, derive, gumbel, gumbel_at, uniform
from ssd.decoding.sampling import SamplingTensors
from ssd.decoding.trees.shape import ABSENT, TreeShape
from ssd.decoding.verify.coupled import Outcome
from ssd.decoding.verify.draft_probs import DraftProbs
from ssd.decoding.verify.rejection import verify_rejection
from ssd.errors import ConfigError
from ssd.pipeline.draft.sampler import CandidateSampler, stacked
from ssd.pipeline.draft.worker import DraftWorker
from ssd.pipeline.round.frames import Frames, ProbsLayout, SpeculationSet, probs_layout
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.runtime.plan import Plan
from ssd.pipeline.verifier import judge as judging
from ssd.pipeline.verifier.judge import Judge

Configure = Callable[..., dict[str, Any]]
SEEDS = st.integers(0, 2**63 - 1)


# Noise.


@given(SEEDS, st.integers(0, 2**40), st.lists(st.integers(0, 299), min_size=1, max_size=6))
def test_noise_of_some_tokens_equals_that_of_all(seed: int, position: int, tokens: list[int]) -> None:
    seeds, positions, at = torch.tensor([seed]), torch.tensor([position]), torch.tensor([tokens])
    assert torch.equal(gumbel_at(seeds, positions, at), gumbel(seeds, positions, 300).gather(1, at))


@given(SEEDS, st.integers(-1, 2**40))
def test_streams_differ(seed: int, word: int) -> None:
    seeds = torch.tensor([seed])
    made = [
        seeds,
        derive(seeds, DRAFT_STREAM),
        derive(seeds, ACCEPT_STREAM),
        derive(seeds, DRAFT_STREAM, word),
        derive(seeds, DRAFT_STREAM, word + 1),
        derive(seeds, ACCEPT_STREAM, word),
    ]
    assert len({int(value) for value in made}) == len(made)
    assert torch.equal(derive(seeds, 1, word), derive(seeds, torch.tensor(1), torch.tensor([word])))


def test_streams_are_independent_and_uniform() -> None:
    """Of 40,000 seeds: every pair of streams, and neighbouring words, in 8 × 8 cells (chi-square)."""
    seeds = torch.arange(40_000)
    at = torch.zeros_like(seeds)
    streams = [
        uniform(seeds, at, 1),
        uniform(derive(seeds, DRAFT_STREAM), at, 1),
        uniform(derive(seeds, ACCEPT_STREAM), at, 1),
        uniform(derive(seeds, DRAFT_STREAM, 5), at, 1),
        uniform(derive(seeds, DRAFT_STREAM, 6), at, 1),
        uniform(derive(seeds, DRAFT_STREAM, 5), at + 1, 1),
    ]
    cells = [(stream.squeeze(1) * 8).long() for stream in streams]
    for i, one in enumerate(cells):
        for other in cells[:i]:
            counts = torch.bincount(one * 8 + other, minlength=64).double()
            assert float(((counts - 625) ** 2 / 625).sum()) < 120  # 63 degrees: p = 2e-5


def test_uniforms_lie_inside() -> None:
    numbers = uniform(torch.arange(1000), torch.zeros(1000, dtype=torch.int64), 100)
    assert numbers.dtype == torch.float64
    assert float(numbers.min()) > 0 and float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.005


# Distributions.


def test_draws_are_without_replacement_and_have_the_law() -> None:
    """The first is a sample of the distribution, the second of what is left."""
    draft = DraftProbs(torch.tensor([4, 9, 2, 7]), torch.tensor([0.5, 0.25, 0.25, 0.0]))
    count = 40_000
    noise = gumbel(torch.arange(count), torch.zeros(count, dtype=torch.int64), 4)
    drawn = DraftProbs(draft.tokens.expand(count, 4), draft.probs.expand(count, 4)).draw(noise, 2)
    weights = {4: 0.5, 9: 0.25, 2: 0.25}
    statistic = 0.0
    for a, p in weights.items():
        for b, q in weights.items():
            expected = 0.0 if a == b else count * p * q / (1 - p)
            found = int(((drawn[:, 0] == a) & (drawn[:, 1] == b)).sum())
            assert found == 0 if a == b else True
            statistic += 0.0 if a == b else (found - expected) ** 2 / expected
    assert statistic < 20.5  # 5 degrees: p = 0.001


def test_candidates_without_weight_are_absent() -> None:
    draft = DraftProbs(torch.tensor([[4, 9]]), torch.tensor([[1.0, 0.0]]))
    assert draft.draw(torch.zeros(1, 2), 3).tolist() == [[4, ABSENT, ABSENT]]


def test_the_support_is_the_most_probable_and_renormalised() -> None:
    logits = torch.tensor([[1.0, 3.0, float("-inf"), 2.0]])
    draft = DraftProbs.of_logits(logits, 2)
    assert draft.tokens.tolist() == [[1, 3]]
    assert torch.allclose(draft.probs, torch.tensor([[3.0, 2.0]]).softmax(-1))
    whole = DraftProbs.of_logits(logits, 9)
    assert whole.tokens.tolist() == [[0, 1, 2, 3]]
    assert torch.allclose(whole.dense(4), logits.softmax(-1))


def test_invalid_weights_count_as_zero() -> None:
    nan, inf = float("nan"), float("inf")
    tokens = torch.tensor([[0, 1, 2, -5, 2**31 - 1], [3, 3, 1, 0, 0]])
    probs = torch.tensor([[nan, inf, -1.0, 0.5, 0.5], [0.25, 0.25, 0.5, 0.0, 1e30]])
    assert DraftProbs(tokens, probs).dense(4).tolist() == [[0, 0, 0, 0], [0, 0.5, 0, 0.5]]


@pytest.mark.parametrize("size", [1, 3, 7])
def test_distributions_travel_bit_for_bit(size: int) -> None:
    layout = ProbsLayout(inner=2, size=size, vocabulary=7)
    frames = Frames(batch=3, branches=4, nodes=3, probs=layout)
    generator = torch.Generator().manual_seed(size)
    draft = DraftProbs.of_logits(torch.randn(3, 4, 2, 7, generator=generator), size)
    numbers = np.random.default_rng(size)
    nodes, guesses, trees = (numbers.integers(-1, 7, shape) for shape in ((3, 4), (3, 4), (3, 4, 2)))
    raw = frames.pack_speculation(SpeculationSet(nodes=nodes, guesses=guesses, trees=trees, draft=draft), 5, 17)
    assert (raw.dtype, raw.shape) == (np.int32, (frames.speculation_size,))
    back, spent = frames.unpack_speculation(raw, 5)
    assert back.draft is not None and spent == 17
    assert np.array_equal(back.guesses, guesses) and np.array_equal(back.trees, trees)
    assert torch.equal(back.draft.tokens, draft.tokens) and torch.equal(back.draft.probs, draft.probs)
    raw = frames.pack_trees(trees[:, 0].tolist(), 5, 17, draft[:, 0])
    assert raw.shape == (frames.tree_size,)
    found = frames.unpack_tree_probs(raw)
    assert found is not None and frames.unpack_trees(raw, 5)[0] == trees[:, 0].tolist()
    assert torch.equal(found.tokens, draft.tokens[:, 0]) and torch.equal(found.probs, draft.probs[:, 0])


def test_frames_grow_only_where_needed(tiny_config: Configure) -> None:
    plans = {
        rule: Plan(config=load_config(tiny_config(speculation={"verify": rule, "support": 5})), vocabulary=128, ends=())
        for rule in ("coupled", "rejection", "block")
    }
    bare = Frames(batch=1, branches=12, nodes=4)
    frames = {rule: plan.frames() for rule, plan in plans.items()}
    assert frames["coupled"].speculation_size == bare.speculation_size
    assert frames["coupled"].tree_size == bare.tree_size
    for rule in ("rejection", "block"):
        assert frames[rule].speculation_size == bare.speculation_size + 12 * 3 * 5 * 2
        assert frames[rule].tree_size == bare.tree_size + 3 * 5 * 2
        assert frames[rule].outcome_size == bare.outcome_size


def test_hits_are_drawn_like_misses(tiny_config: Configure) -> None:
    """A tree's candidates depend on its root's position, not on when or for whom they were drawn."""
    plan = Plan(config=load_config(tiny_config(speculation={"verify": "block"})), vocabulary=128, ends=())
    layout = probs_layout("rejection", plan.shape, 8, 128)
    assert layout is not None
    sampler = CandidateSampler(TreeShape.comb(2, siblings=1), plan.forecast("cpu"), layout, scale=0.5)
    params = SamplingTensors.empty(2, "cpu").with_row(1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=4)
    logits = torch.randn(2, 1, 128, generator=torch.Generator().manual_seed(0))
    many, some = logits.expand(2, 3, 128), torch.tensor([[9, 5, 9], [9, 5, 9]])
    tokens, draft = sampler.children(many, params, some, 1)
    alone, _ = sampler.children(logits, params, torch.tensor([[9], [9]]), 1)
    assert torch.equal(tokens[:, 0], tokens[:, 2]) and torch.equal(tokens[:, 0], alone[:, 0])
    assert not torch.equal(tokens[1, 0], tokens[1, 1])
    # Temperature 0: named, not drawn.
    assert tokens[0, 0].tolist() == logits[0, 0].topk(2).indices.tolist()
    assert float(draft.probs[0].sum()) == 0 and float(draft.probs[1].sum()) == pytest.approx(3)
    assert stacked([draft, draft], 2).probs.shape == (2, 3, 2, 8)


def test_candidates_are_independent_of_other_noise(tiny_config: Configure) -> None:
    """Of the noise the bonus token at their position is drawn with, and of the candidates another
    root has at that position: as drawn by the draft, 40,000 seeds (chi-square of independence)."""
    count, vocabulary, root = 40_000, 4, 9
    shape = TreeShape.comb(2)
    layout = probs_layout("block", shape, vocabulary, vocabulary)
    assert layout is not None
    plan = Plan(config=load_config(tiny_config(speculation={"verify": "block"})), vocabulary=vocabulary, ends=())
    sampler = CandidateSampler(shape, plan.forecast("cpu"), layout)
    empty = SamplingTensors.empty(count, "cpu")
    params = replace(empty, temperature=empty.temperature + 1, seed=torch.arange(count), random=True)
    logits = torch.tensor([1.0, 0.5, 0.0, 0.2]).expand(count, 1, vocabulary)

    def candidates(root: int, depth: int) -> Tensor:
        return sampler.children(logits, params, torch.full((count, 1), root), depth)[0][:, 0, 0]

    for depth in (0, 1):
        drawn = candidates(root, depth)
        plain = (logits[:, 0] + gumbel(params.seed, torch.full((count,), root + 1 + depth), vocabulary)).argmax(-1)
        for other in (plain, candidates(root - 1, depth + 1) if depth == 0 else candidates(root + 1, depth - 1)):
            seen = torch.bincount(drawn * vocabulary + other, minlength=vocabulary**2).view(vocabulary, -1).double()
            expected = seen.sum(1, keepdim=True) * seen.sum(0) / count
            assert float(((seen - expected) ** 2 / expected).sum()) < 27.9  # 9 degrees: p = 0.001


def test_uniforms_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those a round compares with, of different nodes and of different rounds: 20,000 seeds."""
    count, vocabulary, shape = 20_000, 3, TreeShape.comb(2)
    layout = probs_layout("rejection", shape, vocabulary, vocabulary)
    assert layout is not None
    judge = Judge("rejection", shape, layout, "cpu")
    empty, logits = SamplingTensors.empty(count, "cpu"), torch.zeros(count, 3, vocabulary)
    params = replace(empty, temperature=empty.temperature + 1, seed=torch.arange(count), random=True)
    tokens = torch.zeros(count, 3, dtype=torch.int64)
    matched, seen = Outcome(tokens[:, 0], tokens[:, 0]), []
    nothing = judge.stacked([None] * count)

    def noting(*given: Any) -> Any:
        seen.append(given[3])
        return verify_rejection(*given)

    monkeypatch.setattr(judging, "verify_rejection", noting)
    for length in (4, 5):
        judge.decide(matched, tokens, tokens, logits, torch.full((count,), length), logits, params, nothing)
    cells = [(uniforms[:, node] * 8).long() for uniforms in seen for node in (1, 2)]
    for i, one in enumerate(cells):
        for other in cells[:i]:
            counts, expected = torch.bincount(one * 8 + other, minlength=64).double(), count / 64
            assert float(((counts - expected) ** 2 / expected).sum()) < 120  # 63 degrees: p = 2e-5


def test_every_row_is_judged_by_what_its_own_tree_was_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, vocabulary, seen = TreeShape.comb(1), 4, []
    layout = probs_layout("rejection", shape, vocabulary, vocabulary)
    assert layout is not None
    judge = Judge("rejection", shape, layout, "cpu")
    drawn = torch.rand(3, 2, 1, vocabulary, generator=torch.Generator().manual_seed(4)).softmax(-1)
    all_branches = DraftProbs(torch.arange(vocabulary).expand(drawn.shape).clone(), drawn)
    draft = judge.stacked([all_branches[0, 1], all_branches[1, 0], None])  # the last one is an n-gram

    def noting(*given: Any) -> Any:
        seen.append(given[2])
        return verify_rejection(*given)

    monkeypatch.setattr(judging, "verify_rejection", noting)
    empty, logits = SamplingTensors.empty(3, "cpu"), torch.zeros(3, 2, vocabulary)
    params = replace(empty, temperature=empty.temperature + 1, random=True)
    tokens = torch.tensor([[1, 3], [0, 2], [1, 3]])
    matched = Outcome(tokens[:, 0], tokens[:, 0])
    judge.decide(matched, tokens, tokens, logits, torch.full((3,), 5), logits, params, draft)
    assert torch.equal(seen[0].probs, torch.stack([drawn[0, 1], drawn[1, 0], torch.zeros(1, vocabulary)]))


# Configuration.


@pytest.mark.parametrize(
    ("speculation", "message"),
    [
        ({"verify": "block", "siblings": 1}, "chains only"),
        ({"saguaro_c": 0.5}, "needs speculation.verify=rejection or block"),
        ({"verify": "rejection", "saguaro_c": 0}, "above 0"),
        ({"verify": "rejection", "support": 0}, "support must be"),
        ({"verify": "typical"}, "one of coupled, rejection, block"),
    ],
    ids=str,
)
def test_refused(speculation: dict[str, Any], message: str, tiny_config: Configure) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(tiny_config(speculation=speculation))


# The whole pipeline.

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
HOT = replace(GREEDY, temperature=1.0, seed=3)
ASKED = [[9, 30, 77], [5, 6], [20, 21, 22, 23], [8]]


@pytest.mark.parametrize(
    "speculation",
    [{"verify": "rejection", "siblings": 1, "saguaro_c": 0.5}, {"verify": "block", "support": 8}],
    ids=str,
)
def test_greedy_rows_are_plain_decodings(speculation: dict[str, Any], tiny_config: Configure) -> None:
    """Beside rows that sample, and although the draft lies about its probabilities; and plain
    decoding is that of ``coupled``."""
    config = tiny_config(engine={"max_batch": 4}, speculation=speculation)
    params = [GREEDY, HOT, GREEDY, replace(HOT, top_p=0.9)]
    outputs = {}
    with LLM(config, launch=InprocPipeline) as llm:
        for method in ("none", "sd", "ssd"):
            outputs[method] = llm.generate(ASKED, [replace(p, method=method) for p in params])
        assert llm.degraded is None
    for method in ("sd", "ssd"):
        for place in (0, 2):
            assert outputs[method][place].token_ids == outputs["none"][place].token_ids
        for output in outputs[method]:
            assert len(output.token_ids) == 16
            assert output.speculation.accepted > 0
    with LLM(
        tiny_config(engine={"max_batch": 4}, speculation={"siblings": speculation.get("siblings", 0)}),
        launch=InprocPipeline,
    ) as llm:
        plain = llm.generate(ASKED, [replace(p, method="none") for p in params])
    assert [o.token_ids for o in plain] == [o.token_ids for o in outputs["none"]]


def test_a_lying_draft_cannot_break_it(tiny_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any bits for tokens and probabilities: greedy rows stay right, sampled ones run to their end."""
    speculate, generator = DraftWorker.speculate, torch.Generator().manual_seed(1)

    def lying(self: DraftWorker, bell: Any) -> SpeculationSet:
        honest = speculate(self, bell)
        assert honest.draft is not None
        shape = honest.draft.probs.shape
        bits = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int32).view(torch.float32)
        tokens = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator)
        trees = torch.randint(-1, 128, honest.trees.shape, generator=generator).numpy()
        return replace(honest, trees=trees, draft=DraftProbs(tokens, bits))

    monkeypatch.setattr(DraftWorker, "speculate", lying)
    config = tiny_config(engine={"max_batch": 2}, speculation={"verify": "rejection", "siblings": 1})
    with LLM(config, launch=InprocPipeline) as llm:
        plain, _ = llm.generate(ASKED[:2], [replace(GREEDY, method="none"), HOT])
        greedy, sampled = llm.generate(ASKED[:2], [GREEDY, HOT])
        assert llm.degraded is None
    assert greedy.token_ids == plain.token_ids
    assert len(sampled.token_ids) == 16 and set(sampled.token_ids) <= set(range(128))
