"""Triton kernels of ``tree_attention``. Imported only where they run.

The prefix part is flash decoding (Dao et al. 2023, https://pytorch.org/blog/flash-decoding/): slots are
cut into fixed splits. One program per split reads its keys and values once for all rows and all query
heads that share them (packed as the M rows of one product). A second kernel merges the splits by
log-sum-exp, in order, and adds every row's own key and value.

A row's result depends only on its own query, start, limit and slots: slots beyond its limit that other rows need
multiply its sums by exactly 1 and add exactly 0.
"""

# Pyright sees neither how a kernel is launched nor that its constants are numbers.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportReturnType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inputs import AttentionInputs

MERGED_AT_ONCE = 16
PROGRAMS = 1024
"""Programs that fill a GPU several times over: slots are split until there are about as many."""
SHORTEST_SPLIT = 128
LEAST_TILE, LARGEST_TILE = 16, 64
"""Rows and slots of a tile; matrix products need 16."""
SHARED_BYTES = 99 << 10
"""Shared memory that every supported GPU gives a program (compute capability 8.6, 8.9 and 12.0)."""
QUERY_BYTES, SLOT_BYTES = 32 << 10, 16 << 10
"""Most bytes of a tile of queries, and of one of keys or values. Two stages of keys and values are loaded at a time."""


@triton.jit
def _capped(scores, softcap, CAPPED: tl.constexpr):
    if CAPPED:  # softcap · tanh(scores / softcap)
        scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
    return scores


@triton.jit
def _partial(
    query, keys, values, limits, starts, mask, sums, peaks, totals,
    q_b, q_h, q_r, k_b, k_h, k_s, v_b, v_h, v_s, mask_b, mask_r,
    kv_heads, group, rows, slots, splits, first_split, scale, softcap,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DIM: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    split, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pair // kv_heads, pair % kv_heads
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row, live, wide = m % rows, m < group * rows, d < DIM
    start = split * SPLIT
    stop = tl.minimum(start + SPLIT, slots)
    limit = tl.zeros([BLOCK_M], tl.int64)
    if not MASKED:
        limit = tl.load(limits + batch * rows + row, mask=live, other=0)
        stop = tl.minimum(stop, tl.max(limit, 0))
    begin = tl.zeros([BLOCK_M], tl.int64)
    if WINDOWED:
        # Rows without a start, which only fill the tile, must not lower the first slot.
        begin = tl.load(starts + batch * rows + row, mask=live, other=slots)
        # Whole blocks are skipped: their borders stay where they are without a window.
        start = tl.maximum(start, tl.min(begin, 0) // BLOCK_N * BLOCK_N)
    query_head = head * group + m // rows
    q = tl.load(
        query + batch * q_b + query_head[:, None] * q_h + row[:, None] * q_r + d[None, :],
        mask=live[:, None] & wide[None, :],
        other=0.0,
    )
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    keys += batch * k_b + head * k_h
    values += batch * v_b + head * v_h
    for first in range(start, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = n < stop
        place = n.to(tl.int64)
        k = tl.load(keys + place[None, :] * k_s + d[:, None], mask=inside[None, :] & wide[:, None], other=0.0)
        scores = _capped(tl.dot(q, k, input_precision="ieee") * scale, softcap, CAPPED)
        if MASKED:
            at = mask + batch * mask_b + row[:, None] * mask_r + place[None, :]
            seen = tl.load(at, mask=live[:, None] & inside[None, :], other=0) != 0
        else:
            seen = n[None, :] < limit[:, None]
            if WINDOWED:
                seen = seen & (n[None, :] >= begin[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        keep, weights = tl.exp(peak - base), tl.exp(scores - base[:, None])
        total = total * keep + tl.sum(weights, 1)
        v = tl.load(values + place[:, None] * v_s + d[None, :], mask=inside[:, None] & wide[None, :], other=0.0)
        out = out * keep[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = higher
    at = (pair * group * rows + m) * splits + first_split + split
    tl.store(peaks + at, peak, mask=live)
    tl.store(totals + at, total, mask=live)
    if stop > start:
        tl.store(sums + at[:, None] * DIM + d[None, :], out, mask=live[:, None] & wide[None, :])


@triton.jit
def _merge(
    query, own_keys, own_values, sinks, sums, peaks, totals, result,
    q_b, q_h, q_r, k_b, k_h, k_r, v_b, v_h, v_r,
    heads, group, rows, splits, scale, softcap,
    SPLITS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_D: tl.constexpr, DIM: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    pair, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, query_head = pair // heads, pair % heads
    head, d = query_head // group, tl.arange(0, BLOCK_D)
    wide = d < DIM
    q = tl.load(query + batch * q_b + query_head * q_h + row * q_r + d, mask=wide, other=0.0).to(tl.float32)
    k = tl.load(own_keys + batch * k_b + head * k_h + row * k_r + d, mask=wide, other=0.0).to(tl.float32)
    v = tl.load(own_values + batch * v_b + head * v_h + row * v_r + d, mask=wide, other=0.0).to(tl.float32)
    own = _capped(tl.sum(q * k, 0) * scale, softcap, CAPPED)
    base = ((batch * (heads // group) + head) * group * rows + (query_head % group) * rows + row) * splits
    s = tl.arange(0, SPLITS)
    every = tl.load(peaks + base + s, mask=s < splits, other=float("-inf"))
    peak = tl.maximum(tl.max(every, 0), own)
    if SINKS:
        sink = tl.load(sinks + query_head).to(tl.float32)
        peak = tl.maximum(peak, sink)
    mass = tl.load(totals + base + s, mask=s < splits, other=0.0)
    weight = tl.exp(own - peak)
    total = tl.sum(tl.exp(every - peak) * mass, 0) + weight
    if SINKS:
        total += tl.exp(sink - peak)
    out = weight * v
    for first in range(0, splits, AT_ONCE):
        # A name of its own: Triton requires that a variable keeps its shape through a loop.
        some = first + tl.arange(0, AT_ONCE)
        part = tl.load(peaks + base + some, mask=some < splits, other=float("-inf"))
        # Splits without a slot in reach were not written.
        at = sums + (base + some)[:, None] * DIM + d[None, :]
        share = tl.load(at, mask=(part > float("-inf"))[:, None] & wide[None, :], other=0.0)
        out += tl.sum(tl.exp(part - peak)[:, None] * share, 0)
    place = ((batch * rows + row) * heads + query_head) * DIM + d
    tl.store(result + place, (out / total).to(result.dtype.element_ty), mask=wide)


def split_slots(slots: int, programs: int) -> int:
    """Returns the slots of a split: a function of sizes that never change while an engine runs."""
    splits = max(1, PROGRAMS // programs)
    return max(SHORTEST_SPLIT, triton.next_power_of_2(triton.cdiv(slots, splits)))


def tile_sizes(packed: int, row_bytes: int) -> tuple[int, int]:
    """Returns how many query rows and how many slots a program holds at once.

    Args:
        packed: rows that share keys and values, G · R.
        row_bytes: bytes of a row of D numbers, D rounded up to a power of two.

    The tiles of query, keys and values fit the smallest shared memory of the supported GPUs (``SHARED_BYTES``).
    """
    rows = min(max(LEAST_TILE, triton.next_power_of_2(packed)), LARGEST_TILE, QUERY_BYTES // row_bytes)
    slots = min(LARGEST_TILE, SLOT_BYTES // row_bytes)
    return max(LEAST_TILE, rows), max(LEAST_TILE, slots)


def attend(inputs: AttentionInputs) -> Tensor:
    """Returns ``[B, R, H, D]``.

    Last dimensions are dense, ``limits``, ``starts`` and ``mask`` contiguous, ``mask`` uint8.
    """
    query, scale, softcap = inputs.query, inputs.scale, inputs.softcap
    main, own = (inputs.main_keys, inputs.main_values), (inputs.own_keys, inputs.own_values)
    batch, heads, rows, dim = query.shape
    kv_heads = own[0].shape[1]
    group = heads // kv_heads
    packed, width = group * rows, max(LEAST_TILE, triton.next_power_of_2(dim))
    tile, block = tile_sizes(packed, width * query.element_size())
    tiles = triton.cdiv(packed, tile)
    split = split_slots(main[0].shape[2], batch * kv_heads * tiles)
    scratch, mask = (None, None) if inputs.scratch is None else (inputs.scratch[:2], inputs.scratch[2])
    parts = [main] if scratch is None or scratch[0].shape[2] == 0 else [main, scratch]
    counts = [triton.cdiv(keys.shape[2], split) for keys, _ in parts]
    splits = sum(counts)
    sums = query.new_empty((batch * kv_heads * packed * splits, dim), dtype=torch.float32)
    peaks, totals = sums.new_empty(len(sums)), sums.new_empty(len(sums))
    result = query.new_empty((batch, rows, heads, dim))
    windowed, starts = inputs.starts is not None, inputs.limits if inputs.starts is None else inputs.starts
    first_split = 0
    for (keys, values), count in zip(parts, counts, strict=True):
        masked = first_split > 0
        shown = mask if masked and mask is not None else inputs.limits
        steps = (shown.stride(0) if shown.dim() == 3 else 0, shown.stride(-2)) if masked else (0, 0)
        _partial[(count, batch * kv_heads, tiles)](
            query, keys, values, inputs.limits, starts, shown, sums, peaks, totals,
            *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *steps,
            kv_heads, group, rows, keys.shape[2], splits, first_split, scale, softcap,
            SPLIT=split, BLOCK_M=tile, BLOCK_N=block, BLOCK_D=width,
            DIM=dim, MASKED=masked, CAPPED=softcap > 0, WINDOWED=windowed and not masked,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        first_split += count
    _merge[(batch * heads, rows)](
        query, *own, query if inputs.sinks is None else inputs.sinks, sums, peaks, totals, result,
        *query.stride()[:3], *own[0].stride()[:3], *own[1].stride()[:3],
        heads, group, rows, splits, scale, softcap,
        SPLITS=triton.next_power_of_2(splits), AT_ONCE=MERGED_AT_ONCE, BLOCK_D=width, DIM=dim,
        CAPPED=softcap > 0, SINKS=inputs.sinks is not None, num_warps=4,
    )  # fmt: skip
    return result
