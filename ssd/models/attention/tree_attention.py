"""Attention of decode rows in two parts: keys are not repeated, and no mask over the whole context is built.

The prefix part covers the main slots, where a row attends all slots below its limit. The tree part covers the
scratch slots a row may see, and its own key. Each part gives a normalised output and the logarithm of
its sum of weights, and parts are merged by those (log-sum-exp; Milakov, Gimelshein 2018, arXiv 1805.02867).
Heads that share keys and values (GQA) are rows of one product. ``row_attention`` is the reference.

On CUDA the operator ``ssd::tree_attention`` runs the kernels of ``triton_kernels``. On CPUs
``ssd::rows_attention`` is one loop over the keys a row attends (``csrc/rows_attention.cpp``). Everywhere else
the two parts are computed in torch.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from ..cache import RowStates
from ..cpu import operators
from .inputs import SCHEMA, AttentionInputs
from .row_attention import check_window, refuse_unknown

NAME = "ssd_tree"
SPLIT = 128
"""Slots of one part of the prefix in the torch path."""
_TRIAL_SLOTS = 64


def available() -> bool:
    """Returns whether the kernels can be built: triton comes with torch's CUDA wheels."""
    return importlib.util.find_spec("triton") is not None


@torch.no_grad()
def try_kernels(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Builds and runs the operator once, on random keys of the model's heads, in the largest tile there is.

    Raises:
        RuntimeError, or ``triton.errors.TritonError``: the device cannot run it (see ``cuda.graphs.refusals``).
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    rows = max(1, 64 * shared // heads)

    def random(heads: int, count: int) -> Tensor:
        return torch.randn(1, heads, count, dim, dtype=dtype, device=device)

    slots, own = random(shared, _TRIAL_SLOTS), random(shared, rows)
    limits = torch.full((1, rows), _TRIAL_SLOTS, device=device)
    mask = torch.ones(rows, _TRIAL_SLOTS, dtype=torch.bool, device=device)
    inputs = AttentionInputs(random(heads, rows), slots, slots, slots, slots, own, own, limits, mask, dim**-0.5, 0.0)
    result = torch.ops.ssd.tree_attention(*inputs)
    if not result.isfinite().all():
        raise RuntimeError("its results are not finite")


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: RowStates,
    value: RowStates,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Takes and returns what ``row_attention`` does, except that the states' limits replace the mask.

    Raises:
        ModelError: the model passes an argument this function does not know.
    """
    refuse_unknown(kwargs)
    check_window(key, kwargs.get("sliding_window"))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if operators.loaded() and serves(query):
        inputs = _inputs(query, key, value, scale, softcap, s_aux)
        return torch.ops.ssd.rows_attention(*inputs, key.sequences), None
    return torch.ops.ssd.tree_attention(*_inputs(query, key.picked(), value.picked(), scale, softcap, s_aux)), None


def _inputs(
    query: Tensor, key: RowStates, value: RowStates, scale: float, softcap: float | None, sinks: Tensor | None
) -> AttentionInputs:
    parts = key.main, value.main, key.scratch, value.scratch, key.own, value.own
    return AttentionInputs(query, *parts, key.limits, key.scratch_mask, scale, softcap or 0.0, key.starts, sinks)


def serves(query: Tensor) -> bool:
    """Returns whether the CPU operator takes heads of this type and size."""
    return query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16) and query.shape[-1] % 8 == 0


def partial_attention(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """Computes attention over some slots.

    Args:
        query: ``[P, M, D]``, scaled.
        keys: ``[P, n, D]``.
        values: ``[P, n, D]``.
        seen: ``[P, M, n]`` bool.
        softcap: 0 for none.

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
    """Merges parts ``(output [.., D], log-sum-exp [..])`` into attention over all their slots, ``[.., D]``.

    At least one part must see something.
    """
    outs, lses = torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])
    return (outs * torch.softmax(lses, dim=0)[..., None]).sum(0)


def in_torch(inputs: AttentionInputs) -> Tensor:
    """Returns ``[B, R, H, D]`` in the query's dtype; sums in float32 or wider."""
    query, scale, softcap = inputs.query, inputs.scale, inputs.softcap
    batch, heads, rows, dim = query.shape
    kv_heads = inputs.own_keys.shape[1]
    group, wide = heads // kv_heads, torch.promote_types(query.dtype, torch.float32)

    def packed(each: Tensor) -> Tensor:
        """``[B, R, n]`` for the group's heads and pairs: ``[B · H_kv, G · R, n]``."""
        return each[:, None, None].expand(batch, kv_heads, group, rows, -1).reshape(batch * kv_heads, group * rows, -1)

    def flat(states: Tensor) -> Tensor:
        return states.flatten(0, 1).to(wide)

    scaled = (query.to(wide) * scale).reshape(batch * kv_heads, group * rows, dim)
    slots = torch.arange(inputs.main_keys.shape[2], device=query.device)
    within = slots < inputs.limits[..., None]
    if inputs.starts is not None:
        within &= slots >= inputs.starts[..., None]
    seen = packed(within)
    parts = []
    for first in range(0, len(slots), SPLIT):
        part = slice(first, first + SPLIT)
        keys, values = flat(inputs.main_keys[:, :, part]), flat(inputs.main_values[:, :, part])
        parts.append(partial_attention(scaled, keys, values, seen[..., part], softcap))
    if inputs.scratch is not None:
        keys, values, mask = inputs.scratch
        shown = packed(mask.expand(batch, -1, -1))
        parts.append(partial_attention(scaled, flat(keys), flat(values), shown, softcap))
    # Not a matrix product: a row's result must not depend on its place in the block.
    keys, values = (
        own[:, :, None].to(wide).expand(-1, -1, group, -1, -1).reshape(scaled.shape)
        for own in (inputs.own_keys, inputs.own_values)
    )
    score = (scaled * keys).sum(-1)
    parts.append((values, torch.tanh(score / softcap) * softcap if softcap else score))
    if inputs.sinks is not None:
        sink = inputs.sinks.to(wide).view(1, kv_heads, group, 1).expand(batch, -1, -1, rows).reshape(score.shape)
        parts.append((torch.zeros_like(values), sink))
    out = merged(parts).to(query.dtype).view(batch, heads, rows, dim)
    return out.transpose(1, 2).contiguous()


def in_triton(inputs: AttentionInputs) -> Tensor:
    """Returns ``[B, R, H, D]`` in the query's dtype; sums in float32."""
    from .triton_kernels import attend

    def dense(states: Tensor) -> Tensor:
        return states if states.stride(-1) == 1 else states.contiguous()

    mask = None if inputs.scratch is None else inputs.scratch[2].contiguous().view(torch.uint8)
    return attend(
        inputs._replace(
            query=dense(inputs.query),
            own_keys=dense(inputs.own_keys),
            own_values=dense(inputs.own_values),
            limits=inputs.limits.contiguous(),
            starts=None if inputs.starts is None else inputs.starts.contiguous(),
            mask=mask,
        )
    )


def _fake(query: Tensor, *_others: object) -> Tensor:
    batch, heads, rows, dim = query.shape
    return query.new_empty((batch, rows, heads, dim))


def _register() -> None:
    name = "ssd::tree_attention"
    torch.library.custom_op(
        name, lambda *given: in_torch(AttentionInputs(*given)), mutates_args=(), device_types="cpu", schema=SCHEMA
    )
    torch.library.register_kernel(name, "cuda", lambda *given: in_triton(AttentionInputs(*given)))
    torch.library.register_fake(name, _fake)


_register()
AttentionInterface.register(NAME, tree_attention)
