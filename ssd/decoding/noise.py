"""Counter-based Gumbel noise: all randomness of a request is a function of (seed, position, token).

Gumbel-max trick: if ``g`` is independent standard Gumbel noise per token, then
``argmax(logits + g)`` is a sample of ``softmax(logits)``. When draft and target add the *same*
noise at the same position, their samples agree nearly as often as their distributions allow,
and no probabilities need to be exchanged (Gumbel coupling; Daliri, Musco, Suresh 2024, arXiv
2408.07978). So the noise must not depend on who computes it, in which batch, or when.

*position* is the index in the sequence (prompt included, counted from 0) of the token being
chosen: the logits after a sequence of length n choose position n. All nodes of a candidate tree
at one depth choose the same position and share their noise.

Rules that compare probabilities (``rejection``, ``block``) need more than one independent source:
:func:`derive` makes the seed of another stream. What each stream is for, and why its noise is
independent of all that is known when it is used, stands in ``docs/verification.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Values of ``uniform_bits`` are below this: 31 bits, the non-negative half of int32.
BITS = 31


def _wrap(value: int, width: int) -> int:
    """The unsigned constant as the signed integer with the same bits (torch has no unsigned multiply)."""
    return value - (1 << width) if value >> (width - 1) else value


# SplitMix64 (Steele, Lea, Flood 2014): counter increment and finalizer.
_STEP = _wrap(0x9E3779B97F4A7C15, 64)
_MIX64_A = _wrap(0xBF58476D1CE4E5B9, 64)
_MIX64_B = _wrap(0x94D049BB133111EB, 64)
# 32-bit finalizers with low avalanche bias (github.com/skeeto/hash-prospector: 16-15-15 and triple32).
_MIX32_A = _wrap(0x21F0AAAD, 32)
_MIX32_B = _wrap(0xD35A2D97, 32)
_TOKEN_A = _wrap(0xED5AD4BB, 32)
_TOKEN_B = _wrap(0xAC4C1B51, 32)
_TOKEN_C = _wrap(0x31848BAB, 32)
# Another odd counter increment, so that derived seeds are no outputs of the seed's own SplitMix64.
_DERIVE = _wrap(0xD1342543DE82EF95, 64)

DRAFT_STREAM = 1
"""The draft's own samples, under rules that need them independent of everything else."""
ACCEPT_STREAM = 2
"""The uniforms a candidate's acceptance is decided with."""


def _shift(x: Tensor, by: int, width: int) -> Tensor:
    """Logical right shift: ``>>`` on signed tensors copies the sign bit, the mask takes it off again."""
    shifted = x >> by
    shifted &= (1 << (width - by)) - 1  # in place: for [*R, V] a temporary costs as much as the work
    return shifted


def _mix64(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30, 64)) * _MIX64_A
    z = (z ^ _shift(z, 27, 64)) * _MIX64_B
    return z ^ _shift(z, 31, 64)


def _low_word(z: Tensor) -> Tensor:
    """The low 32 bits of int64 as int32. Brought into range first: what a cast does with a value
    out of range is the device's business."""
    low = z & 0xFFFFFFFF
    return (low - ((low >> 31) << 32)).to(torch.int32)


def _mix_tokens(x: Tensor) -> Tensor:
    """One well mixed int32 per token (int32, any shape)."""
    x = (x ^ _shift(x, 17, 32)) * _TOKEN_A
    x = (x ^ _shift(x, 11, 32)) * _TOKEN_B
    x = (x ^ _shift(x, 15, 32)) * _TOKEN_C
    return x ^ _shift(x, 14, 32)


def uniform_bits(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """31 uniform bits per (seed, position, token); the same on every device and for any batch shape.

    Args:
        seeds: int64 [...], one per row.
        positions: int64 [...], index in the sequence of the token being chosen. Broadcast with
            ``seeds`` to a common shape R; both on one device.
        vocabulary: V >= 1; tokens are 0 .. V-1. A token's bits do not depend on V.

    Returns:
        int32 [*R, V], values in [0, 2**31). Contiguous.

    Raises:
        ValueError: ``seeds`` or ``positions`` is not int64, or V is out of [1, 2**31).

    The row key is the (position + 1)-th output of SplitMix64 started at mix64(seed). Its two
    halves key a 32-bit hash of the token: one before the multiplications (so rows differ), one
    between them (so no row is a permutation of another). Only the [*R] keys are 64-bit, the work
    per token is 32-bit.
    """
    if seeds.dtype != torch.int64 or positions.dtype != torch.int64:
        raise ValueError(f"seeds and positions must be int64, not {seeds.dtype} and {positions.dtype}")
    if not 1 <= vocabulary < 2**31:
        raise ValueError(f"vocabulary must be in [1, 2**31), not {vocabulary}")
    # The tokens' words are the same for every row: paid once per call, not per row.
    return _bits(seeds, positions, torch.arange(vocabulary, dtype=torch.int32, device=seeds.device))


def _bits(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """``uniform_bits`` of the tokens given (int32, broadcast with ``[*R, 1]``)."""
    key = _mix64(_mix64(seeds) + (positions + 1) * _STEP).unsqueeze(-1)
    x = _mix_tokens(tokens) ^ _low_word(key)
    # In place: outside a compiled graph every line is a pass over [*R, V].
    x ^= _shift(x, 16, 32)
    x *= _MIX32_A
    x += _low_word(key >> 32)
    x ^= _shift(x, 15, 32)
    x *= _MIX32_B
    x ^= _shift(x, 15, 32)
    return _shift(x, 32 - BITS, 32)


def gumbel(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise per (seed, position, token): ``argmax(logits + gumbel)`` samples softmax(logits).

    Args:
        seeds, positions, vocabulary: as for :func:`uniform_bits`.

    Returns:
        float32 [*R, V]: ``-log(-log(u))`` with u in the open interval (0, 1), so always finite
        (within [-2.9, 22.2]). The uniform bits are the same everywhere; the logarithms may round
        differently on another device or in a compiled graph.

    Raises:
        ValueError: as :func:`uniform_bits`.

    Source: Gumbel-max trick; used as a coupling by Daliri, Musco, Suresh 2024, arXiv 2408.07978.
    """
    return _gumbel(uniform_bits(seeds, positions, vocabulary))


def gumbel_at(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """:func:`gumbel` of some tokens only: for a draft that samples from few of them.

    Args:
        seeds, positions: as for :func:`uniform_bits`, of common shape R.
        tokens: int64 [*R, m], ids in [0, 2**31).

    Returns:
        float32 [*R, m].
    """
    return _gumbel(_bits(seeds, positions, tokens.to(torch.int32)))


def uniform(seeds: Tensor, positions: Tensor, count: int) -> Tensor:
    """``count`` uniform numbers per (seed, position), in the open interval (0, 1).

    Args:
        seeds, positions: as for :func:`uniform_bits`. count: how many, >= 1.

    Returns:
        float64 [*R, count]; never 0, so that ``uniform < ratio`` never accepts at ratio 0, and
        never 1, so that it always does at ratio 1.

    Raises:
        ValueError: as :func:`uniform_bits`.
    """
    return (uniform_bits(seeds, positions, count).to(torch.float64) + 0.5) * 2.0**-BITS


def derive(seeds: Tensor, *words: int | Tensor) -> Tensor:
    """Seeds of another stream: a function of the seed and the words, unrelated to the seed's own noise.

    Args:
        seeds: int64 [...]. words: numbers, or int64 tensors that broadcast with ``seeds``; their
            order counts.

    Returns:
        int64, of the common shape; any 64 bits.
    """
    for word in words:
        # A Python product must be brought into 64 bits by hand; a tensor's wraps.
        step = _wrap((word + 1) * _DERIVE % 2**64, 64) if isinstance(word, int) else (word + 1) * _DERIVE
        seeds = _mix64(_mix64(seeds) + step)
    return seeds


def _gumbel(bits: Tensor) -> Tensor:
    # We take v = 1 - u, not u, from the bits: the large noise that decides an argmax comes from u
    # near 1, where float32 has steps of 2**-24 (ties between tokens at large V); near v = 0 the
    # steps are as fine as the bits. The half keeps v > 0. Float rounding would make the top 64
    # values of the bits v = 1; the clamp keeps v < 1.
    v = (bits.to(torch.float32) + 0.5) * 2.0**-BITS
    v.clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()
