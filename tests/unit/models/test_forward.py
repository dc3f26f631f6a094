"""Forwards over the slot cache: equal to transformers, and a row has the same bits in every place."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from ssd.decoding.trees.shape import TreeShape
from ssd.errors import RequestError
from ssd.models.checkpoints.loading import lay_out_for_cpu
from ssd.models.rows import BLOCK, RowPlan
from ssd.models.runner import ForwardRunner, RunnerOptions, can_compile
from ssd.testing.models.tiny import ARCHITECTURES, tiny_model

VOCABULARY = 128
CHUNK = 16
CHAIN, COMB = TreeShape.comb(4), TreeShape.comb(3, siblings=2)
FP32, BF16 = torch.float32, torch.bfloat16

each_model = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_dtype = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
each_shape = pytest.mark.parametrize("shape", [CHAIN, COMB], ids=["chain", "comb"])


@functools.cache
def reference(architecture: str, dtype: torch.dtype) -> torch.nn.Module:
    return tiny_model(architecture, vocab_size=VOCABULARY, dtype=dtype)


@functools.cache
def unrounded(architecture: str) -> torch.nn.Module:
    """The bfloat16 model's weights, computed in float32."""
    model = tiny_model(architecture, vocab_size=VOCABULARY)
    model.load_state_dict(reference(architecture, BF16).state_dict())
    return model


@functools.cache
def plan_of(shape: TreeShape) -> RowPlan:
    return RowPlan.tree("tree", shape)


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(4, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


class Slots:
    """A runner, and rounds made by hand."""

    def __init__(
        self, architecture: str, dtype: torch.dtype, *, batch: int = 2, capacity: int = 200, scratch: int = 6, **more
    ):
        model = tiny_model(architecture, vocab_size=VOCABULARY, dtype=dtype)
        lay_out_for_cpu(model)
        options = RunnerOptions(
            batch=batch,
            capacity=capacity,
            scratch_slots=scratch,
            prefill_chunk=CHUNK,
            vocabulary=VOCABULARY,
            **more,
        )
        self.runner = ForwardRunner(model, options)
        self.batch = batch

    def forward(self, shape: TreeShape, trees: dict[int, tuple[int, list[int]]], longest: int | None = None) -> Tensor:
        """Logits ``[B, W, V]`` of trees ``slot: (length, tokens)``; shorter trees are padded."""
        tokens = torch.zeros(self.batch, shape.nodes, dtype=torch.int64)
        lengths = torch.zeros(self.batch, dtype=torch.int64)
        for slot, (length, nodes) in trees.items():
            tokens[slot, : len(nodes)], lengths[slot] = torch.tensor(nodes), length
        return self.runner.forward(plan_of(shape), tokens, lengths, longest=longest or int(lengths.max()))

    def feed(self, shape: TreeShape, sequence: list[int], start: int, cuts: list[int], slot: int = 0) -> Tensor:
        """Logits of a sequence fed from ``start`` in blocks of the given lengths (all accepted)."""
        given, at = [], start
        for cut in cuts:
            given.append(self.forward(shape, {slot: (at, sequence[at : at + cut])})[slot, :cut])
            at += cut
        assert at == len(sequence)
        return torch.cat(given)


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@each_dtype
@each_shape
@each_model
@pytest.mark.parametrize("length", [37, BLOCK - 2])
def test_equals_transformers(architecture: str, dtype: torch.dtype, shape: TreeShape, length: int) -> None:
    """Prefill in chunks (the last one padded), then a tree: every root-to-leaf path as one full forward.
    From the second length the tree lies over the border of two attention blocks."""
    prompt, nodes = random_tokens(length), random_tokens(shape.nodes, seed=1)
    slots = Slots(architecture, dtype, capacity=BLOCK + 60)
    slots.runner.prefill(1, prompt)
    slots.runner.prefill(0, random_tokens(20, seed=2))
    logits = slots.forward(shape, {0: (20, nodes), 1: (length, nodes)})[1]
    for leaf in (node for node in range(shape.nodes) if not shape.children(node)):
        path = (0, *shape.path(leaf))
        ids = torch.tensor([prompt + [nodes[node] for node in path]])

        def full(model: torch.nn.Module, ids: Tensor = ids, rows: int = len(path)) -> Tensor:
            with torch.no_grad():
                return model(ids).logits[0, -rows:].float()

        expected, got = full(reference(architecture, dtype)), logits[list(path)]
        if dtype is FP32:
            assert relative(got, expected) < 1e-4
            assert torch.equal(got.argmax(-1), expected.argmax(-1))
        else:  # about as near to the truth as transformers itself (measured: up to 1.7 times as far)
            truth = full(unrounded(architecture))
            assert (got - truth).norm() < 2.5 * (expected - truth).norm()
            assert relative(got, expected) < 0.1


@each_dtype
@each_model
def test_a_sibling_has_the_bits_it_would_have_in_place(architecture: str, dtype: torch.dtype) -> None:
    prompt, nodes = random_tokens(30), random_tokens(COMB.nodes, seed=1)
    slots = Slots(architecture, dtype)
    slots.runner.prefill(0, prompt)
    aside = slots.forward(COMB, {0: (30, nodes)})[0]
    for leaf in range(COMB.depth + 1, COMB.nodes):
        path = (0, *COMB.path(leaf))
        in_place = slots.forward(COMB, {0: (30, [nodes[node] for node in path])})[0]
        assert torch.equal(aside[list(path)], in_place[: len(path)])


@each_dtype
@each_shape
@each_model
def test_same_bits_from_every_start_of_a_block(architecture: str, dtype: torch.dtype, shape: TreeShape) -> None:
    """One token a round (plain decoding, padded) against blocks of every length, over a block border."""
    start = BLOCK - 18
    sequence = random_tokens(start + 24)
    cuttings = [[1] * 24, [shape.depth + 1] * (24 // (shape.depth + 1)), [3, 1, 2, 4, 1, 3, 2, 2, 1, 1, 4]]
    for cuts in cuttings:
        if sum(cuts) < 24:
            cuts.append(24 - sum(cuts))
    given = []
    for cuts in cuttings:
        slots = Slots(architecture, dtype, capacity=BLOCK + 60)
        slots.runner.prefill(0, sequence[:start])
        given.append(slots.feed(shape, sequence, start, cuts))
    assert torch.equal(given[0], given[1])
    assert torch.equal(given[0], given[2])


@each_dtype
@each_model
def test_same_bits_beside_other_sequences(architecture: str, dtype: torch.dtype) -> None:
    """Other rows absent, or long and changing; another slot; other padding in the row's block."""
    start, sequence = 30, random_tokens(30 + 10)
    alone, crowded = Slots(architecture, dtype, batch=3), Slots(architecture, dtype, batch=3)
    alone.runner.prefill(0, sequence[:start])
    crowded.runner.prefill(1, random_tokens(150, seed=4))
    crowded.runner.prefill(2, sequence[:start])
    for at in range(start, len(sequence)):
        one = alone.forward(COMB, {0: (at, sequence[at : at + 1])})[0, 0]
        noise = random_tokens(COMB.nodes, seed=at)
        two = crowded.forward(COMB, {1: (150 + at - start, noise), 2: (at, [sequence[at], *noise[1:]])})[2, 0]
        assert torch.equal(one, two)


@each_dtype
@each_model
def test_same_bits_at_every_context(architecture: str, dtype: torch.dtype) -> None:
    """A longer context only adds exact zeros, whatever the further slots hold."""
    prompt, nodes = random_tokens(40), random_tokens(COMB.nodes, seed=1)
    small = Slots(architecture, dtype)
    small.runner.prefill(0, prompt)
    expected = small.forward(COMB, {0: (40, nodes)})[0]
    large = Slots(architecture, dtype, capacity=1000)
    assert (small.runner.contexts, large.runner.contexts) == ([256], [256, 1024])
    large.runner.prefill(0, random_tokens(300, seed=3))  # what a former request left
    large.runner.prefill(0, prompt)
    for longest in (40, 300, 900):
        assert torch.equal(large.forward(COMB, {0: (40, nodes)}, longest=longest)[0], expected)


@each_dtype
@each_model
def test_rejected_rows_leave_no_trace(architecture: str, dtype: torch.dtype) -> None:
    start, sequence = 30, random_tokens(30 + 6)
    never, rejected = Slots(architecture, dtype), Slots(architecture, dtype)
    never.runner.prefill(0, sequence[:start])
    rejected.runner.prefill(0, sequence[:start])
    for at in range(start, len(sequence)):
        expected = never.forward(COMB, {0: (at, sequence[at : at + 1])})[0, 0]
        guesses = random_tokens(COMB.nodes - 1, seed=at)
        assert torch.equal(rejected.forward(COMB, {0: (at, [sequence[at], *guesses])})[0, 0], expected)


@each_dtype
@each_model
def test_a_kept_leaf_continues_like_a_chain(architecture: str, dtype: torch.dtype) -> None:
    prompt, nodes = random_tokens(30), random_tokens(COMB.nodes, seed=1)
    after = random_tokens(2, seed=5)
    leaf = 6  # beside node 2, scratch slot 2
    assert COMB.path(leaf) == (1, 6)
    kept, chain = Slots(architecture, dtype), Slots(architecture, dtype)
    for slots in (kept, chain):
        slots.runner.prefill(1, prompt)
    kept.forward(COMB, {1: (30, nodes)})
    before = kept.forward(COMB, {1: (33, after)})[1]  # without keeping it: the chain's node 2
    kept.forward(COMB, {1: (30, nodes)})
    kept.runner.cache.keep(torch.tensor([1]), torch.tensor([leaf - COMB.depth - 1]), torch.tensor([32]))
    chain.forward(COMB, {1: (30, [nodes[0], nodes[1], nodes[leaf]])})
    got = kept.forward(COMB, {1: (33, after)})[1, :2]
    assert torch.equal(got, chain.forward(COMB, {1: (33, after)})[1, :2])
    assert not torch.equal(got, before[:2])


@each_model
def test_padding_of_the_head_is_cut_off(architecture: str) -> None:
    model = tiny_model(architecture, vocab_size=VOCABULARY)
    options = RunnerOptions(batch=1, capacity=50, scratch_slots=0, prefill_chunk=CHUNK, vocabulary=100)
    runner = ForwardRunner(model, options)
    logits = runner.forward(plan_of(CHAIN), torch.full((1, 5), 7), torch.zeros(1, dtype=torch.int64), longest=0)
    assert logits.shape == (1, 5, 100)
    whole = Slots(architecture, FP32, batch=1).forward(CHAIN, {0: (0, [7] * 5)})
    assert relative(logits, whole[..., :100]) < 1e-5


def test_prefill_in_two_parts_is_one() -> None:
    """As a draft that catches up: from any length, however it divides into chunks."""
    prompt, nodes = random_tokens(60), random_tokens(CHAIN.nodes, seed=1)
    once, parts = Slots("llama", FP32), Slots("llama", FP32)
    once.runner.prefill(0, prompt)
    for start, end in ((0, 5), (5, 6), (6, 50), (50, 60)):
        parts.runner.prefill(0, prompt[start:end], start=start)
    assert relative(parts.forward(CHAIN, {0: (60, nodes)})[0], once.forward(CHAIN, {0: (60, nodes)})[0]) < 1e-5


def test_sizes_that_do_not_fit_are_refused() -> None:
    slots = Slots("llama", FP32, capacity=100)
    with pytest.raises(RequestError, match="do not fit"):
        slots.runner.prefill(0, [5] * 1000)


@pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")
def test_a_compiled_forward_takes_strided_tokens() -> None:
    """The first tokens of a comb's candidates are strided, and compiled code does not check strides."""
    slots = Slots("llama", FP32, compile=True)
    plan, tokens = RowPlan.sequential("jit", 1), torch.tensor([[[7, 8]], [[9, 10]]])
    lengths = torch.zeros(2, dtype=torch.int64)
    first, apart = tokens[..., 0].contiguous(), tokens[..., 0]
    assert not apart.is_contiguous()
    right = slots.runner.forward(plan, first, lengths, longest=0)
    assert torch.equal(slots.runner.forward(plan, apart, lengths, longest=0), right)
