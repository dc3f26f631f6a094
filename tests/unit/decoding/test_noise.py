"""Gumbel noise: it never changes, depends only on (seed, position, token), and is random."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd import SamplingParams
from ssd.decoding.noise import BITS, gumbel, uniform_bits
from ssd.models.cpu import operators
from ssd.pipeline.sampling.selection import Selector
from ssd.pipeline.sampling.slots import SlotSampling

M32, M64 = 2**32 - 1, 2**64 - 1
int63 = st.integers(0, 2**63 - 1)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def many(count: int, value: int) -> torch.Tensor:
    return torch.full((count,), value, dtype=torch.int64)


# ---- what it is: literal values and an independent implementation on Python integers


def test_golden_values():
    """If this fails, every seed has another meaning, and earlier outputs cannot be reproduced."""
    bits = uniform_bits(ints(0, 1, 42, 2**63 - 1), ints(0, 7, 1000, 3), 5)
    assert bits.tolist() == [
        [1646526323, 1986078737, 1551258645, 17185132, 1785113093],
        [1382223162, 822522397, 1485758157, 722643682, 1089811513],
        [1234376752, 179048676, 1848131797, 357551203, 856705628],
        [1861428004, 1620318033, 25641921, 1336471227, 2115324420],
    ]


def mix64(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & M64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & M64
    return z ^ z >> 31


def row_key(seed: int, position: int) -> int:
    return mix64((mix64(seed) + (position + 1) * 0x9E3779B97F4A7C15) & M64)


def reference(seed: int, position: int, token: int) -> int:
    key = row_key(seed, position)
    x = token
    x = (x ^ x >> 17) * 0xED5AD4BB & M32
    x = (x ^ x >> 11) * 0xAC4C1B51 & M32
    x = (x ^ x >> 15) * 0x31848BAB & M32
    x = (x ^ x >> 14) ^ key & M32
    x = (x ^ x >> 16) * 0x21F0AAAD & M32
    x = x + (key >> 32) & M32
    x = (x ^ x >> 15) * 0xD35A2D97 & M32
    return (x ^ x >> 15) >> 1


def test_row_key_is_splitmix64():
    # The published first outputs of SplitMix64 from state 0.
    assert [row_key(0, p) for p in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@settings(deadline=None, max_examples=50)
@given(int63, st.integers(0, 2**31), st.integers(1, 40))
def test_bits_equal_python_integers(seed: int, position: int, vocabulary: int):
    bits = uniform_bits(ints(seed), ints(position), vocabulary)
    assert bits.tolist() == [[reference(seed, position, t) for t in range(vocabulary)]]


# ---- what it depends on


def test_bits_and_noise_do_not_depend_on_batch_shape_or_order():
    seeds = torch.arange(6)[:, None] * 1_000_003
    positions = torch.arange(35).reshape(1, 35) * 3
    vocabulary = 1003  # not a multiple of any vector width
    for function in (uniform_bits, gumbel):
        whole = function(seeds, positions, vocabulary)
        assert whole.shape == (6, 35, vocabulary)
        for b, w in ((0, 0), (3, 17), (5, 34)):
            alone = function(seeds[b], positions[:, w], vocabulary)[0]
            scalar = function(seeds[b, 0], positions[0, w], vocabulary)
            assert torch.equal(alone, whole[b, w]) and torch.equal(scalar, whole[b, w])
        order = torch.randperm(35, generator=torch.Generator().manual_seed(0))
        assert torch.equal(function(seeds, positions[:, order], vocabulary), whole[:, order])
        strided = function(seeds.expand(6, 35).t(), positions.t(), vocabulary)
        assert torch.equal(strided, whole.transpose(0, 1))
        # A smaller vocabulary is the same noise cut off.
        assert torch.equal(function(seeds, positions, 77), whole[..., :77])


def test_bits_are_the_same_in_one_graph():
    seeds, positions = ints(3, 4)[:, None], torch.arange(5)[None]
    compiled = torch.compile(uniform_bits, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(seeds, positions, 100), uniform_bits(seeds, positions, 100))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_bits_are_the_same_on_cuda():
    seeds, positions = torch.arange(9)[:, None] * 2**59 + 5, torch.arange(50)[None]
    cpu = uniform_bits(seeds, positions, 5003)
    assert torch.equal(uniform_bits(seeds.cuda(), positions.cuda(), 5003).cpu(), cpu)
    noise = gumbel(seeds.cuda(), positions.cuda(), 5003).cpu()
    torch.testing.assert_close(noise, gumbel(seeds, positions, 5003), rtol=1e-5, atol=1e-5)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="int64"):
        uniform_bits(ints(1), ints(1).int(), 4)
    for vocabulary in (0, 2**31):
        with pytest.raises(ValueError, match="vocabulary"):
            gumbel(ints(1), ints(1), vocabulary)


# ---- that it is noise; seeds are fixed, so these pass always or never


def deviation(observed: torch.Tensor, expected: torch.Tensor | float) -> float:
    """Chi-square of counts in standard deviations from its mean (normal approximation)."""
    chi2 = float(((observed.double() - expected) ** 2 / expected).sum())
    freedom = observed.numel() - 1
    return (chi2 - freedom) / math.sqrt(2 * freedom)


def flat(samples: torch.Tensor, bins_log2: int, shift: int) -> float:
    bins = 1 << bins_log2
    counts = torch.bincount((samples.flatten() >> shift).long() & (bins - 1), minlength=bins)
    return deviation(counts, samples.numel() / bins)


STREAMS = {
    "tokens": lambda: uniform_bits(ints(5), ints(11), 200_000),
    "positions": lambda: uniform_bits(many(100_000, 5), torch.arange(100_000), 2),
    "seeds": lambda: uniform_bits(torch.arange(100_000), many(100_000, 11), 2),
    "high seeds": lambda: uniform_bits(torch.arange(100_000) << 40, many(100_000, 0), 2),
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("shift", [0, 10, BITS - 8], ids=["low", "middle", "high"])
def test_uniform_along_each_coordinate(stream: str, shift: int):
    samples = STREAMS[stream]()
    assert samples.min() >= 0
    # Two sided: too even is as wrong as too uneven (except along tokens, where a bijection is
    # drawn without replacement; 200 000 of 2**32 do not show that).
    for column in samples.unbind(-1) if stream != "tokens" else (samples,):
        assert abs(flat(column, 8, shift)) < 4


def test_pairs_of_neighbours_are_uniform():
    """Joint distribution of the top 4 bits of neighbours along each coordinate: 256 cells."""
    bits = uniform_bits(torch.arange(60)[:, None], torch.arange(60)[None], 60).long() >> (BITS - 4)
    for dim in range(3):
        n = bits.shape[dim]
        for lag in (1, 2, 16):
            pairs = bits.narrow(dim, 0, n - lag) * 16 + bits.narrow(dim, lag, n - lag)
            assert abs(flat(pairs, 8, 0)) < 4, (dim, lag)


def test_neighbours_do_not_correlate():
    u = uniform_bits(torch.arange(60)[:, None], torch.arange(60)[None], 60).double() / 2**BITS - 0.5
    for dim in range(3):
        for lag in (1, 2, 3, 32):
            n = u.shape[dim]
            product = (u.narrow(dim, 0, n - lag) * u.narrow(dim, lag, n - lag)).flatten()
            correlation = float(product.mean()) * 12  # variance of u is 1/12
            assert abs(correlation) * math.sqrt(product.numel()) < 4, (dim, lag)
    # Along diagonals too: seed + 1 must not be position + 1.
    diagonal = (u[1:, :-1] * u[:-1, 1:]).flatten()
    assert abs(float(diagonal.mean()) * 12) * math.sqrt(diagonal.numel()) < 4


def test_one_bit_of_the_key_flips_half_of_the_bits():
    base = uniform_bits(ints(77), ints(1234), 4096)
    seeds = torch.cat([77 ^ (ints(1) << torch.arange(63)), many(20, 77)])
    positions = torch.cat([many(63, 1234), 1234 ^ (ints(1) << torch.arange(20))])
    flips = uniform_bits(seeds, positions, 4096) ^ base
    for bit in range(BITS):
        share = ((flips >> bit) & 1).double().mean(-1)
        assert (share - 0.5).abs().max() < 5 * 0.5 / math.sqrt(4096), bit


def test_gumbel_moments_and_range():
    noise = gumbel(torch.arange(40)[:, None], torch.arange(50)[None], 500)
    assert noise.dtype == torch.float32 and noise.isfinite().all()
    assert abs(noise.double().mean() - 0.5772156649) < 4 * 1.2825 / 1000
    assert abs(noise.double().var() - math.pi**2 / 6) < 4 * 3.47 / 1000
    assert noise.min() > -2.9 and noise.max() > 12


@pytest.mark.parametrize("bits", [0, 1, 2**30, 2**31 - 65, 2**31 - 2, 2**31 - 1])
def test_open_interval_at_the_extremes(bits: int, monkeypatch: pytest.MonkeyPatch):
    """The extreme bits occur once in 2**31 draws, so they are put in by hand."""
    fixed = torch.tensor([[bits]], dtype=torch.int32)
    monkeypatch.setattr("ssd.decoding.noise.uniform_bits", lambda *_: fixed)
    value = float(gumbel(ints(0), ints(0), 1))
    u = 1 - min((bits + 0.5) / 2**31, 1 - 2**-24)
    assert math.isfinite(value)
    assert value == pytest.approx(-math.log(-math.log1p(u - 1)), rel=1e-5)


# ---- the operator that draws it on CPUs


def exact(bits: torch.Tensor) -> torch.Tensor:
    """What noise of these bits is, in float64."""
    v = ((bits.to(torch.float32) + 0.5) * 2.0**-BITS).clamp(max=1 - 2.0**-24).double()
    return -torch.log(-torch.log1p(-v))


@pytest.mark.parametrize("vocabulary", [1, 7, 16, 512, 1003, 70_001])
def test_operator_draws_the_same_noise(vocabulary: int):
    assert operators.available()
    seeds, positions = torch.arange(4)[:, None] * 2**59 + 5, torch.arange(6)[None] * 2**33
    noise, wanted = torch.ops.ssd.gumbel(seeds, positions, vocabulary), gumbel(seeds, positions, vocabulary)
    assert noise.dtype == torch.float32 and noise.is_contiguous() and noise.shape == wanted.shape
    torch.testing.assert_close(noise.double(), exact(uniform_bits(seeds, positions, vocabulary)), rtol=3e-7, atol=3e-7)
    # The same bits for a token, whatever else is drawn.
    fewer = max(vocabulary - 3, 1)
    assert torch.equal(torch.ops.ssd.gumbel(seeds[2], positions[:, 5], fewer)[0], noise[2, 5, :fewer])


def token_of(bits: int, seed: int, position: int) -> int:
    """The token whose 31 bits these are, the lowest of the 32 being 0: ``reference`` backwards."""

    def shifted(x: int, by: int) -> int:
        y = x
        for _ in range(32 // by):
            y = x ^ y >> by
        return y

    def divided(x: int, factor: int) -> int:
        return x * pow(factor, -1, 2**32) & M32

    key = row_key(seed, position)
    x = shifted(divided(shifted(bits << 1, 15), 0xD35A2D97), 15) - (key >> 32) & M32
    x = shifted(divided(x, 0x21F0AAAD), 16) ^ key & M32
    x = shifted(divided(shifted(x, 14), 0x31848BAB), 15)
    return shifted(divided(shifted(divided(x, 0xAC4C1B51), 11), 0xED5AD4BB), 17)


@pytest.mark.parametrize("bits", [0, 1, 2**30, 2**31 - 129, 2**31 - 65, 2**31 - 2, 2**31 - 1])
def test_operator_at_the_extremes(bits: int):
    """Bits that occur once in 2**31 draws, at a position where their token is one of a vocabulary."""
    assert operators.available()
    token, position = min((token_of(bits, 3, position), position) for position in range(20_000))
    assert reference(3, position, token) == bits and token < 2**22
    drawn = torch.ops.ssd.gumbel(ints(3), ints(position), token + 1)[0, token]
    assert float(drawn) == pytest.approx(float(exact(torch.tensor(bits))), rel=3e-7, abs=3e-7)


def test_operator_checks_its_arguments():
    assert operators.available()
    with pytest.raises(RuntimeError, match="int64"):
        torch.ops.ssd.gumbel(ints(1), ints(1).int(), 4)
    for vocabulary in (0, 2**31):
        with pytest.raises(RuntimeError, match="vocabulary"):
            torch.ops.ssd.gumbel(ints(1), ints(1), vocabulary)


@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_argmax_frequencies_follow_softmax(along: str):
    count, vocabulary = 20_000, 16
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 1.5
    seeds, positions = many(count, 9), torch.arange(count)
    if along == "seeds":
        seeds, positions = positions, seeds
    tokens = (logits + gumbel(seeds, positions, vocabulary)).argmax(-1)
    counts = torch.bincount(tokens, minlength=vocabulary)
    assert abs(deviation(counts, logits.double().softmax(-1) * count)) < 4


def test_same_noise_couples_two_distributions():
    """Samples of two close distributions agree far more often than independent ones would, and
    at least (1 - TV) / (1 + TV) of the time (Daliri, Musco, Suresh 2024)."""
    count, vocabulary = 20_000, 32
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(vocabulary, generator=generator)
    draft = target + 0.3 * torch.randn(vocabulary, generator=generator)
    noise = gumbel(many(count, 4), torch.arange(count), vocabulary)
    agree = ((target + noise).argmax(-1) == (draft + noise).argmax(-1)).double().mean()
    p, q = target.softmax(-1).double(), draft.softmax(-1).double()
    distance = 0.5 * (p - q).abs().sum()
    assert agree > (1 - distance) / (1 + distance) - 0.01
    assert agree > 3 * (p * q).sum()


def test_prepared_noise_equals_the_rounds_noise() -> None:
    """Unless lengths, requests or another caller for noise changed in between."""
    state = SlotSampling(2, 50, "cpu", horizon=3)
    warm = SamplingParams(temperature=1.0, seed=4)
    state.set(0, warm)
    known, lengths = [5, 9], torch.tensor([5, 9])
    wanted = state.noise(lengths)
    assert wanted is not None
    state.prepare(known, lengths)
    made = state._prepared
    assert made is not None and state.prepared(known, lengths) is made[2]
    assert torch.equal(state.prepared(known, lengths), wanted)

    state.prepare(known, lengths)
    other = state.prepared([5, 10], torch.tensor([5, 10]))
    assert torch.equal(other[0], wanted[0]) and not torch.equal(other[1], wanted[1])

    second = Selector(2, (1, 2), torch.device("cpu")).of([1])
    state.set(1, replace(warm, seed=8))
    both = state.noise(lengths)
    assert both is not None
    state.prepare([9], lengths[1:])
    state.select(second)
    assert torch.equal(state.prepared([9], lengths[1:]), both[1:])
    state.select(None)
    state.clear(1)

    state.prepare(known, lengths)
    state.set(0, replace(warm, seed=5))
    assert not torch.equal(state.prepared(known, lengths), wanted)
    state.prepare(known, lengths)
    state.clear(0)
    assert state.prepared(known, lengths) is None

    state.set(0, warm)
    state.prepare(known, lengths)
    state.noise(torch.tensor([1, 1]))  # as graphs do: what was made before is overwritten
    assert state._prepared is None
    assert torch.equal(state.prepared(known, lengths), wanted)
