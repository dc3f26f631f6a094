"""Logits to scores: the filters of transformers, rows that do not see each other, exact choices."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ssd.decoding import sampling
from ssd.decoding.noise import gumbel
from ssd.decoding.sampling import (
    LIKELY,
    SamplingTensors,
    choose,
    filter_logits,
    likely,
    perturbed,
    scores,
    sorted_filter,
)
from ssd.models.cpu import operators
from ssd.models.runner import can_compile
from ssd.pipeline.sampling.slots import SlotSampling

PLAIN: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}


@pytest.fixture(autouse=True, params=["operators", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for both."""
    assert operators.available()
    monkeypatch.setattr(sampling, "has_operators", lambda _: request.param == "operators")


def tensors(*rows: dict[str, Any]) -> SamplingTensors:
    params = SamplingTensors.empty(len(rows), "cpu")
    for i, row in enumerate(rows):
        params = params.with_row(i, **(PLAIN | row))
    return params


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def as_transformers(
    logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """What ``generate`` does to [rows, V] with these settings, in its order."""
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    for warper in warpers:
        logits = warper(None, logits)
    return logits


COMBINATIONS = list(itertools.product((0.3, 1.0, 1.7), (0, 1, 7, 500), (1.0, 0.9, 0.3, 1e-6), (0.0, 0.05, 1.0)))


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), COMBINATIONS)
def test_filters_equal_transformers(temperature: float, top_k: int, top_p: float, min_p: float):
    logits = random_logits(2, 5, 120)
    row = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    expected = as_transformers(logits.flatten(0, 1), **row).view_as(logits)
    actual = filter_logits(logits, tensors(row, row))
    assert torch.equal(actual.isinf(), expected.isinf())
    torch.testing.assert_close(actual, expected)


def test_filters_equal_transformers_on_a_large_vocabulary():
    logits = random_logits(1, 3, 50_000)
    for row in ({"top_p": 0.95}, {"top_p": 0.999}, {"top_k": 40, "top_p": 0.95}, {"min_p": 0.01}):
        full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | row
        expected = as_transformers(logits[0], **full)
        actual = filter_logits(logits, tensors(full))[0]
        # A float32 sum of 50 000 probabilities, theirs, may move the edge by a few tokens.
        assert (actual.isinf() != expected.isinf()).sum(-1).max() <= (10 if full["top_p"] < 1 else 0), row


def test_ties():
    logits = torch.tensor([[[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]]])
    top_k = filter_logits(logits, tensors({"temperature": 1.0, "top_k": 2}))
    assert top_k.isfinite().tolist() == [[[False, True, True, True, True, False]]]  # all equal to the 2nd
    top_p = filter_logits(logits.zero_(), tensors({"temperature": 1.0, "top_p": 0.45}))
    assert top_p.isfinite().tolist() == [[[False, False, False, True, True, True]]]  # smallest set: 3 of 6


def test_tokens_already_excluded_stay_excluded():
    logits = random_logits(1, 2, 10)
    logits[..., ::2] = -torch.inf
    for row in ({"top_k": 8}, {"top_p": 0.9999}, {"min_p": 1e-6}, {"top_k": 3, "top_p": 0.5}):
        filtered = filter_logits(logits, tensors({"temperature": 0.5} | row))
        assert filtered[..., ::2].isinf().all() and not filtered.isnan().any()


MIX: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_k": 5, "seed": 4},
    {"temperature": 1.3, "top_p": 0.8, "seed": 2**63 - 1},
    {"temperature": 0.0, "top_k": 2, "top_p": 0.1, "min_p": 0.9},
    {"temperature": 2.0, "min_p": 0.2, "top_k": 20, "top_p": 0.95, "seed": 6},
]


def test_a_row_in_a_mixed_batch_equals_the_row_alone():
    logits = random_logits(len(MIX), 4, 97)
    together = tensors(*MIX)
    positions = torch.arange(4)[None] + torch.arange(len(MIX))[:, None] * 10
    noise = gumbel(together.seed[:, None], positions, 97)
    expected = scores(logits, together, noise)
    for b, row in enumerate(MIX):
        alone = tensors(row)
        one = slice(b, b + 1)
        alone_noise = gumbel(alone.seed[:, None], positions[one], 97)
        assert torch.equal(scores(logits[one], alone, alone_noise), expected[one])
        assert torch.equal(choose(logits[one], alone, alone_noise), expected[one].argmax(-1))


def test_temperature_zero_is_argmax_and_ignores_filters_and_noise():
    logits = random_logits(2, 3, 50)
    greedy = tensors({"top_k": 1, "top_p": 0.1, "min_p": 0.5}, {})
    assert not greedy.random and not greedy.filtered
    assert scores(logits, greedy, None) is logits
    assert torch.equal(choose(logits, greedy, None), logits.argmax(-1))
    assert torch.equal(filter_logits(logits, greedy), logits)
    # Beside a random, filtered row it stays itself.
    mixed = tensors({"top_k": 1}, {"temperature": 1.0, "top_k": 3})
    assert torch.equal(scores(logits, mixed, torch.full_like(logits, 5.0))[0], logits[0])
    # A temperature too small to divide by is 0.
    assert float(tensors({"temperature": 1e-30}).temperature) == 0.0


def test_bfloat16_logits_are_scored_in_float32():
    logits = random_logits(1, 1, 9).bfloat16()
    for row in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}):
        assert scores(logits, tensors(row), torch.zeros(1, 1, 9)).dtype == torch.float32


def same_but_at_the_edge(ours: Tensor, theirs: Tensor, probs: Tensor, top_p: float) -> None:
    """Two sets of kept tokens ``[.., V]``: equal, but for some whose being kept is a matter of rounding."""
    for a, b, p in zip(ours.flatten(0, -2), theirs.flatten(0, -2), probs.flatten(0, -2), strict=True):
        if torch.equal(a, b):
            continue
        assert abs(float(p[a & b].double().sum()) - top_p) < 1e-5 or abs(float(p[a | b].double().sum()) - top_p) < 1e-5
        assert (a != b).sum() <= 2


@pytest.mark.parametrize("way", ["operators"], indirect=True)
@pytest.mark.parametrize("vocabulary", [1, 5, 8, 1003, 20_000])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 30.0])
def test_the_operator_keeps_the_same_tokens_as_sorting(vocabulary: int, spread: float):
    """Flat, steep and usual rows; edges in any bucket, on ties (bfloat16 logits have many), with excluded tokens."""
    logits = random_logits(2, 3, vocabulary, seed=vocabulary) * spread
    logits[1] = logits[1].bfloat16().float()
    logits[0, 1, 1::3] = -torch.inf
    for temperature, top_k, top_p, min_p in COMBINATIONS:
        row = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        params = tensors(row, row)
        ours, theirs = filter_logits(logits, params), sorted_filter(logits, params)
        same = ours == theirs
        if not same.all():
            counted = sorted_filter(logits, tensors(*[row | {"top_p": 1.0, "min_p": 0.0}] * 2)).softmax(-1)
            same_but_at_the_edge(ours.isfinite(), theirs.isfinite(), counted, top_p)


@pytest.mark.parametrize("way", ["torch"], indirect=True)
@pytest.mark.parametrize("vocabulary", [1, 5, LIKELY, 1003])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_a_draft_keeps_nearly_the_same_tokens_as_sorting(vocabulary: int, spread: float):
    """The same where that is no more than it looks at; else more."""
    logits = random_logits(2, 3, vocabulary, seed=vocabulary) * spread
    alike = 0
    for temperature, top_k, top_p, min_p in [*COMBINATIONS, (0.0, 1, 0.1, 0.9)]:
        row = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        params = tensors(row, {"temperature": 0.5})
        found, exact = likely(logits, params.packed()), sorted_filter(logits, params)
        ours, theirs = found.isfinite(), exact.isfinite()
        assert torch.equal(found[ours], logits[ours]) and ours[1].all()
        few = (theirs.sum(-1) < min(LIKELY, vocabulary)) & (top_k <= LIKELY or top_k >= vocabulary)
        alike += int(few[0].sum())
        if not torch.equal(ours[few], theirs[few]):
            counted = sorted_filter(logits, tensors(row | {"top_p": 1.0, "min_p": 0.0}, {"temperature": 0.5}))
            same_but_at_the_edge(ours[few], theirs[few], counted.softmax(-1)[few], top_p)
        assert (theirs <= ours)[~few].all()
    assert alike > 100 or vocabulary == 1


@pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")
def test_a_rounds_scores_are_those_of_scores():
    """Compiled as a round's bodies are, and with the rows of noise they take."""
    state, logits = SlotSampling(len(MIX), 1003, "cpu", horizon=5), random_logits(len(MIX), 3, 1003)
    assert state.filters
    params = tensors(*MIX)
    noise = gumbel(params.seed[:, None], torch.arange(5)[None], 1003)
    ahead = torch.randint(0, 5, (len(MIX), 3), generator=torch.Generator().manual_seed(4))
    expected = scores(logits, params, noise[torch.arange(len(MIX))[:, None], ahead])
    options = {"cpp_wrapper": True}
    compiled = torch.compile(lambda *given: state.score(*given) + 0.0, fullgraph=True, dynamic=False, options=options)
    for body in (state.score, compiled):
        # Neighbours of 1,003 tokens do not start on a vector's bounds; a slice of a wider head does not follow on.
        for given in (logits, torch.cat([logits, logits], dim=-1)[..., :1003]):
            assert torch.equal(body(given, noise, ahead, params.packed()), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_operators_survive_logits_that_are_not_numbers(value: float):
    """A broken model decodes nonsense, but crashes no process."""
    for spoilt in (slice(None), slice(0, 90), slice(5, 6)):
        logits = random_logits(1, 2, 100)
        logits[..., spoilt] = value
        for row in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 60, "top_p": 0.999, "min_p": 1e-3}):
            packed = tensors({"temperature": 1.0} | row).packed()
            assert torch.ops.ssd.filter_logits(logits, packed).shape == logits.shape


def test_operators_check_their_arguments():
    logits, noise, packed = random_logits(2, 3, 8), torch.zeros(2, 4, 8), tensors({}, {}).packed()
    ahead = torch.zeros(2, 3, dtype=torch.int64)
    operator = torch.ops.ssd.scores
    for given in (
        (logits.double(), noise, ahead, packed),
        (logits, noise, ahead, packed[:1]),
        (logits, noise[:1], ahead, packed),
        (logits, noise, ahead[:, :2], packed),
        (logits, noise, ahead + 4, packed),
    ):
        with pytest.raises(RuntimeError, match=r"must be|no row"):
            operator(*given, None, None)
    with pytest.raises(RuntimeError, match="fixed processing"):
        operator(logits, noise, ahead, packed, torch.zeros(2, 3, 7), None)
    with pytest.raises(RuntimeError, match="what is allowed"):
        operator(logits, noise, ahead, packed, torch.zeros(2, 3, 8), torch.ones(2, 1, 8, dtype=torch.bool))


def test_no_sort_without_filters(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "sort", lambda *_, **__: pytest.fail("sorted"))
    logits = random_logits(2, 3, 50)
    noise = torch.ones_like(logits)
    # The greedy row's filters are not in use.
    result = scores(logits, tensors({"temperature": 0.5}, {"top_k": 3}), noise)
    assert torch.equal(result, torch.stack([logits[0] + 0.5, logits[1]]))


@pytest.mark.parametrize("row", [r for r in MIX if r["temperature"] > 0])
def test_choices_are_distributed_as_the_filtered_softmax(row: dict[str, Any]):
    count, vocabulary = 20_000, 24
    logits = random_logits(1, 1, vocabulary, seed=5) * 0.5
    params = tensors(row)
    noise = gumbel(params.seed[:, None], torch.arange(count)[None], vocabulary)
    tokens = choose(logits.expand(1, count, vocabulary), params, noise)
    counts = torch.bincount(tokens.flatten(), minlength=vocabulary).double()
    settings = {k: v for k, v in (PLAIN | row).items() if k != "seed"}
    expected = as_transformers(logits[0].double(), **settings)[0].softmax(-1) * count
    assert counts[expected == 0].sum() == 0
    common = expected > 5
    chi2 = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    freedom = int(common.sum()) - 1
    assert freedom >= 3 and abs(chi2 - freedom) / math.sqrt(2 * freedom) < 4


def test_with_row_copies_and_sets_flags():
    empty = SamplingTensors.empty(3, "cpu")
    random = empty.with_row(1, **(PLAIN | {"temperature": 0.8, "seed": 2**63 - 1}))
    filtered = random.with_row(2, **(PLAIN | {"temperature": 1.0, "min_p": 0.1}))
    assert (empty.random, empty.filtered) == (False, False)
    assert (random.random, random.filtered) == (True, False)
    assert (filtered.random, filtered.filtered) == (True, True)
    assert empty.temperature.tolist() == [0, 0, 0] and random.min_p.tolist() == [0, 0, 0]
    assert filtered.seed.tolist() == [0, 2**63 - 1, 0]
    back = filtered.with_row(2, **PLAIN)
    assert (back.random, back.filtered) == (True, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("row", 1), ("row", -1), ("temperature", -0.1), ("temperature", math.inf), ("temperature", math.nan),
        ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.1), ("seed", -1), ("seed", 2**63),
    ],
)  # fmt: skip
def test_with_row_names_what_is_out_of_range(name: str, value: float):
    arguments = {"row": 0} | PLAIN | {name: value}
    with pytest.raises(ValueError, match=name):
        SamplingTensors.empty(1, "cpu").with_row(**arguments)


def test_shapes_are_checked():
    logits, params = random_logits(2, 3, 8), tensors({"temperature": 1.0}, {})
    with pytest.raises(ValueError, match="noise is needed"):
        scores(logits, params, None)
    with pytest.raises(ValueError, match="shape of the logits"):
        scores(logits, params, torch.zeros(2, 3, 9))
    with pytest.raises(ValueError, match="B = 2"):
        scores(logits[:1], params, torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="W, V"):
        filter_logits(logits[0], params)


@pytest.mark.parametrize("rows", [MIX, [{"temperature": 1.0}], [{}]], ids=["filtered", "random", "greedy"])
def test_one_graph(rows: list[dict[str, Any]]):
    logits, params = random_logits(len(rows), 2, 30), tensors(*rows)
    noise = gumbel(params.seed[:, None], torch.arange(2)[None], 30)
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, params, noise), choose(logits, params, noise))


@pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")
def test_perturbed_is_the_same_compiled() -> None:
    """One batch may mix a compiled choice and an eager one (filters, processors): they need the same bits."""

    def body(logits: Tensor, noise: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        scores = perturbed(logits, noise, temperature)
        return scores, scores.argmax(-1)

    generator = torch.Generator().manual_seed(3)
    logits = 7 * torch.randn(3, 5, 1003, generator=generator)
    noise = gumbel(torch.tensor([[1], [2], [3]]), torch.arange(5).expand(3, 5), 1003)
    temperature = torch.tensor([0.0, 0.7, 1.3])
    compiled = torch.compile(body, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})
    for eager, got in zip(body(logits, noise, temperature), compiled(logits, noise, temperature), strict=True):
        assert torch.equal(eager, got)
    assert torch.equal(body(logits, noise, temperature)[0][0], logits[0])
