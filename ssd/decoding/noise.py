"""Counter-based Gumbel noise: all randomness of a request is a function of (seed, position, token).

Gumbel-max trick: if ``g`` is independent standard Gumbel noise per token, then
``argmax(logits + g)`` is a sample of ``softmax(logits)``. When draft and target add the *same*
noise at the same position, their samples agree nearly as often as their distributions allow,
and no probabilities need to be exchanged (Gumbel coupling; Daliri, Musco, Suresh 2024, arXiv
2408.07978). So the noise must not depend on the side, the batch or the time it is computed.

*position* is the index in the sequence (prompt included, counted from 0) of the token being
chosen: the logits after a sequence of length n choose position n. All nodes of a candidate tree
at one depth choose the same position and share their noise.

Rules that compare probabilities (``rejection``, ``block``) need more than one independent source:
:func:`derive` makes the seed of another stream. ``docs/verification.md`` says what each stream is for, and
why its noise is independent of everything known when it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Values of ``uniform_bits`` are below this: 31 bits, the non-negative half of int32.
BITS = 31


def _wrap(value: int, width: int) -> int:
    """Returns the signed integer with the bits of an unsigned constant (torch has no unsigned multiplication)."""
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
# Another odd counter increment, so that derived seeds are not outputs of the seed's own SplitMix64.
_DERIVE = _wrap(0xD1342543DE82EF95, 64)

DRAFT_STREAM = 1
"""Stream of the draft's samples, under rules that need them independent of everything else."""
ACCEPT_STREAM = 2
"""Stream of the uniform numbers that decide acceptance."""


def _shift(x: Tensor, by: int, width: int) -> Tensor:
    """Logical right shift: ``>>`` on signed tensors copies the sign bit, and the mask removes it."""
    shifted = x >> by
    shifted &= (1 << (width - by)) - 1  # in place: for [*R, V] a temporary would double the time
    return shifted


def _mix64(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30, 64)) * _MIX64_A
    z = (z ^ _shift(z, 27, 64)) * _MIX64_B
    return z ^ _shift(z, 31, 64)


def _low_word(z: Tensor) -> Tensor:
    """Returns the low 32 bits of int64 as int32. They are brought into range first, since casts of other values
    depend on the device."""
    low = z & 0xFFFFFFFF
    return (low - ((low >> 31) << 32)).to(torch.int32)


def _mix_tokens(x: Tensor) -> Tensor:
    """Returns a well mixed int32 per token (int32, any shape)."""
    x = (x ^ _shift(x, 17, 32)) * _TOKEN_A
    x = (x ^ _shift(x, 11, 32)) * _TOKEN_B
    x = (x ^ _shift(x, 15, 32)) * _TOKEN_C
    return x ^ _shift(x, 14, 32)


def uniform_bits(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Returns 31 uniform bits per (seed, position, token): the same on every device and for any batch shape.

    Args:
        seeds: int64 [...], one per row.
        positions: int64 [...], index in the sequence of the token being chosen. Broadcast with
            ``seeds`` to a common shape R; both on one device.
        vocabulary: V >= 1; tokens are 0 to V - 1. A token's bits do not depend on V.

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
    # The tokens' words are the same for every row, so they are computed once per call.
    return _bits(seeds, positions, torch.arange(vocabulary, dtype=torch.int32, device=seeds.device))


def _bits(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Returns ``uniform_bits`` of the given tokens (int32, broadcast with ``[*R, 1]``)."""
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
    """Returns standard Gumbel noise per (seed, position, token): ``argmax(logits + gumbel)`` samples softmax(logits).

    Args:
        seeds: as for :func:`uniform_bits`.
        positions: likewise.
        vocabulary: likewise.

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
    """Returns :func:`gumbel` of some tokens only: for a draft that samples from few of them.

    Args:
        seeds: as for :func:`uniform_bits`, of common shape R with ``positions``.
        positions: likewise.
        tokens: int64 [*R, m], ids in [0, 2**31).

    Returns:
        float32 [*R, m].
    """
    return _gumbel(_bits(seeds, positions, tokens.to(torch.int32)))


def uniform(seeds: Tensor, positions: Tensor, count: int) -> Tensor:
    """Returns ``count`` uniform numbers per (seed, position), in the open interval (0, 1).

    Args:
        seeds: as for :func:`uniform_bits`.
        positions: likewise.
        count: numbers per row, >= 1.

    Returns:
        float64 [*R, count]; never 0, so that ``uniform < ratio`` is never true at ratio 0, and
        never 1, so that it is always true at ratio 1.

    Raises:
        ValueError: as :func:`uniform_bits`.
    """
    return (uniform_bits(seeds, positions, count).to(torch.float64) + 0.5) * 2.0**-BITS


def derive(seeds: Tensor, *words: int | Tensor) -> Tensor:
    """Returns seeds of another stream: a function of seed and words, unrelated to the seed's own noise.

    Args:
        seeds: int64 [...].
        words: numbers, or int64 tensors that broadcast with ``seeds``; their order matters.

    Returns:
        int64, of the common shape; any 64 bits.
    """
    for word in words:
        # Products of tensors wrap around; a product of Python integers is reduced by hand.
        step = _wrap((word + 1) * _DERIVE % 2**64, 64) if isinstance(word, int) else (word + 1) * _DERIVE
        seeds = _mix64(_mix64(seeds) + step)
    return seeds


def _gumbel(bits: Tensor) -> Tensor:
    # The bits give v = 1 - u, not u: the large noise that decides an argmax comes from u
    # near 1, where float32 has steps of 2**-24 (ties between tokens at large V), while near v = 0 the
    # steps are as fine as the bits. The half keeps v > 0. Rounding would turn the top 64
    # values of the bits into v = 1; the clamp keeps v < 1.
    v = (bits.to(torch.float32) + 0.5) * 2.0**-BITS
    v.clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()
