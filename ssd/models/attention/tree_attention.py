"""Attention of decode rows in two parts: nothing is repeated, no mask of the whole context is built.

The prefix part covers the main slots, where a row attends all below its limit; the tree part the
scratch slots a row may see, and its own key. Each part gives a normalised output and the logarithm of
its weights' sum, and parts merge by those (log-sum-exp; Milakov, Gimelshein 2018, arXiv 1805.02867). Heads that
share keys and values (GQA) are rows of one product. ``row_attention`` is the reference.

On CUDA the operator ``ssd::tree_attention`` runs the kernels of ``triton_kernels``; on CPUs
``ssd::rows_attention`` is one loop over what a row attends (``csrc/rows_attention.cpp``); elsewhere the
two parts in torch.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..cache import RowStates
from ..cpu import operators
from .row_attention import refuse_unknown

NAME = "ssd_tree"
SPLIT = 128
"""Slots of a part of the prefix in the torch path."""
_SCHEMA = (
    "(Tensor query, Tensor main_keys, Tensor main_values, Tensor? scratch_keys, Tensor? scratch_values, "
    "Tensor own_keys, Tensor own_values, Tensor limits, Tensor? mask, float scale, float softcap) -> Tensor"
)


def available() -> bool:
    """Whether the kernels can be built: triton comes with torch's CUDA wheels."""
    return importlib.util.find_spec("triton") is not None


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: RowStates,
    value: RowStates,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """``row_attention``'s arguments and results, but the mask, which the states' limits replace.

    Raises:
        ModelError: the model passes an argument this function does not know.
    """
    refuse_unknown(kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if operators.loaded() and serves(query):
        arguments = _arguments(query, key, value)
        return torch.ops.ssd.rows_attention(*arguments, scale, softcap or 0.0, key.sequences), None
    arguments = _arguments(query, key.picked(), value.picked())
    return torch.ops.ssd.tree_attention(*arguments, scale, softcap or 0.0), None


def _arguments(query: Tensor, key: RowStates, value: RowStates) -> tuple[Tensor | None, ...]:
    parts = key.main, value.main, key.scratch, value.scratch, key.own, value.own
    return query, *parts, key.limits, key.scratch_mask


def serves(query: Tensor) -> bool:
    """Whether the CPU's operator takes such heads."""
    return query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16) and query.shape[-1] % 8 == 0


def partial_attention(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """Attention over some slots.

    Args:
        query: ``[P, M, D]``, scaled. keys, values: ``[P, n, D]``. seen: ``[P, M, n]`` bool.

    Returns:
        output ``[P, M, D]`` and log-sum-exp ``[P, M]`` of the scores: 0 and -inf where nothing is seen.
    """
    scores = query @ keys.transpose(1, 2)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None])
    return weights @ values, lse


def merged(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over all slots of ``(output [.., D], log-sum-exp [..])``; at least one part sees something."""
    outs, lses = torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])
    return (outs * torch.softmax(lses, dim=0)[..., None]).sum(0)


def in_torch(
    query: Tensor,
    main_keys: Tensor,
    main_values: Tensor,
    scratch_keys: Tensor | None,
    scratch_values: Tensor | None,
    own_keys: Tensor,
    own_values: Tensor,
    limits: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    batch, heads, rows, dim = query.shape
    kv_heads = own_keys.shape[1]
    group, wide = heads // kv_heads, torch.promote_types(query.dtype, torch.float32)

    def packed(each: Tensor) -> Tensor:
        """``[B, R, n]`` for the group's heads and pairs: ``[B · H_kv, G · R, n]``."""
        return each[:, None, None].expand(batch, kv_heads, group, rows, -1).reshape(batch * kv_heads, group * rows, -1)

    def flat(states: Tensor) -> Tensor:
        return states.flatten(0, 1).to(wide)

    scaled = (query.to(wide) * scale).reshape(batch * kv_heads, group * rows, dim)
    slots = torch.arange(main_keys.shape[2], device=query.device)
    seen = packed(slots < limits[..., None])
    parts = []
    for first in range(0, len(slots), SPLIT):
        part = slice(first, first + SPLIT)
        keys, values = flat(main_keys[:, :, part]), flat(main_values[:, :, part])
        parts.append(partial_attention(scaled, keys, values, seen[..., part], softcap))
    if scratch_keys is not None and scratch_values is not None and mask is not None:
        shown = packed(mask.expand(batch, -1, -1))
        parts.append(partial_attention(scaled, flat(scratch_keys), flat(scratch_values), shown, softcap))
    # Not a product of matrices: where in the block a row stands must not matter.
    keys, values = (
        own[:, :, None].to(wide).expand(-1, -1, group, -1, -1).reshape(scaled.shape) for own in (own_keys, own_values)
    )
    score = (scaled * keys).sum(-1)
    parts.append((values, torch.tanh(score / softcap) * softcap if softcap else score))
    out = merged(parts).to(query.dtype).view(batch, heads, rows, dim)
    return out.transpose(1, 2).contiguous()


def in_triton(
    query: Tensor,
    main_keys: Tensor,
    main_values: Tensor,
    scratch_keys: Tensor | None,
    scratch_values: Tensor | None,
    own_keys: Tensor,
    own_values: Tensor,
    limits: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    from .triton_kernels import attend

    def dense(states: Tensor) -> Tensor:
        return states if states.stride(-1) == 1 else states.contiguous()

    scratch = None
    if scratch_keys is not None and scratch_values is not None and mask is not None:
        scratch = scratch_keys, scratch_values
        mask = mask.contiguous().view(torch.uint8)
    return attend(
        dense(query),
        (main_keys, main_values),
        scratch,
        (dense(own_keys), dense(own_values)),
        limits.contiguous(),
        mask,
        scale,
        softcap,
    )


def _fake(query: Tensor, *_others: object) -> Tensor:
    batch, heads, rows, dim = query.shape
    return query.new_empty((batch, rows, heads, dim))


torch.library.custom_op("ssd::tree_attention", in_torch, mutates_args=(), device_types="cpu", schema=_SCHEMA)
torch.library.register_kernel("ssd::tree_attention", "cuda", in_triton)
torch.library.register_fake("ssd::tree_attention", _fake)
AttentionInterface.register(NAME, tree_attention)
