"""Attention of decode rows over the slot cache, as a transformers attention function.

A row attends main slots below a limit, chosen scratch slots, and itself. Its own key and value
are a separate term, not read from a slot. So a candidate in a scratch slot (a sibling)
gets bit for bit the result it would get in place, which ``numerics: strict`` relies on.
Likewise, sums over main slots run block by block in a fixed order: a longer context only adds
exact zeros. Heads that share keys and values (GQA) are rows of one product; keys are not
repeated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ...errors import ModelError
from ..cache import RowStates
from ..rows import BLOCK

NAME = "ssd_rows"
# Arguments that stock models pass and full causal attention may ignore.
_HARMLESS = {
    "dropout",
    "position_ids",
    "use_cache",
    "sliding_window",
    "output_attentions",
    "is_causal",
    "cu_seq_lens_q",
    "output_router_logits",
}


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: RowStates,
    value: RowStates,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Computes softmax attention.

    Args:
        module: ignored.
        query: ``[B, H, R, D]``.
        key: keys the rows may attend.
        value: their values.
        attention_mask: ``[B, 1, R, T + X]`` bool, True where a row attends a slot. A row's own key is not part of
            it: it is always attended.
        scaling: factor on the scores; D^-0.5 by default.
        softcap: scores become ``softcap · tanh(score / softcap)``, as in Gemma 2.
        s_aux: ``[H]``, attention sinks: scores without a value, as in GPT-OSS.

    Returns:
        ``[B, R, H, D]`` and None.

    Raises:
        ModelError: the model passes an argument this function does not know (attention biases of positions):
            ignoring it would give wrong tokens.
    """
    refuse_unknown(kwargs)
    check_window(key, kwargs.get("sliding_window"))
    key, value = key.picked(), value.picked()
    batch, heads, rows, dim = query.shape
    shared = key.own.shape[1]
    group = heads // shared
    scale = dim**-0.5 if scaling is None else scaling
    query = (query * scale).reshape(batch * shared, group * rows, dim)

    # Scores are sums over D, whatever the number of slots; only the sums over values need the fixed order.
    scores = torch.cat([torch.bmm(query, k.flatten(0, 1).transpose(1, 2)) for k in key[:2] if k is not None], dim=-1)
    scores = scores.float()
    own_key = key.own.reshape(batch * shared, 1, rows, dim)
    own = (query.view(batch * shared, group, rows, dim).float() * own_key.float()).sum(-1)
    if softcap is not None:
        scores, own = torch.tanh(scores / softcap) * softcap, torch.tanh(own / softcap) * softcap
    attention_mask = _in_window(attention_mask, key)
    mask = attention_mask[:, :, None].expand(batch, shared, group, rows, -1).reshape(scores.shape)
    scores = scores.masked_fill(~mask, float("-inf"))
    own = own.reshape(batch * shared, group * rows, 1)

    peak = torch.maximum(scores.amax(-1, keepdim=True), own)
    sink = None
    if s_aux is not None:
        sink = s_aux.float().view(1, shared, group, 1).expand(batch, -1, -1, rows).reshape(own.shape)
        peak = torch.maximum(peak, sink)
    weights, own_weight = torch.exp(scores - peak), torch.exp(own - peak)
    total = own_weight if sink is None else own_weight + torch.exp(sink - peak)
    own_value = value.own[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch * shared, group * rows, -1)
    out = own_weight * own_value.float()
    start = 0
    for part in _blocks(value):
        share = weights[..., start : start + part.shape[1]]
        total = total + share.sum(-1, keepdim=True)
        out = out + torch.bmm(share.to(part.dtype), part).float()
        start += part.shape[1]
    out = (out / total).to(query.dtype).view(batch, heads, rows, -1)
    return out.transpose(1, 2), None


def _in_window(mask: Tensor, key: RowStates) -> Tensor:
    """Returns the mask ``[B, 1, R, T + X]`` without what lies before the rows' starts."""
    if key.starts is None:
        return mask
    main = key.main.shape[2]
    slots = torch.arange(main, device=mask.device)
    seen = mask[..., :main] & (slots >= key.starts[..., None])[:, None]
    if key.scratch_mask is None:
        return seen
    return torch.cat([seen, key.scratch_mask.expand(len(seen), -1, -1)[:, None]], dim=-1)


def check_window(key: RowStates, window: int | None) -> None:
    """Checks that the cache knows the window that the model names.

    Raises:
        ModelError: it does not: the layer would attend other tokens than the model's.
    """
    if window is not None and window < key.capacity and (key.attends.reach, key.attends.size) != ("window", window):
        raise ModelError(f"a layer's attention slides over {window} tokens, which its configuration does not say")


def refuse_unknown(arguments: dict[str, Any]) -> None:
    """Checks the further arguments of an attention function.

    Raises:
        ModelError: the model passes one that no attention function here implements.
    """
    for name, given in arguments.items():
        if given is not None and name not in _HARMLESS:
            raise ModelError(f"the model's attention uses {name!r}, which this engine does not support")


def _blocks(states: RowStates) -> list[Tensor]:
    """Returns blocks ``[B · H_kv, n, D]`` in the fixed order of summation: main, then scratch."""
    blocks = list(states.main.flatten(0, 1).split(BLOCK, dim=1))
    if states.scratch is not None:
        blocks.append(states.scratch.flatten(0, 1))
    return blocks


AttentionInterface.register(NAME, row_attention)
