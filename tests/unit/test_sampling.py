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

from ssd.decoding.noise import gumbel
from ssd.decoding.sampling import SamplingTensors, choose, filter_logits, perturbed, scores
from ssd.models.runner import can_compile

PLAIN: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}


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
    """A round's compiled choice and the eager one (filters, processors) meet in one batch: same bits."""

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
