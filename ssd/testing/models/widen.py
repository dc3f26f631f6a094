"""Widen a Llama-architecture model without changing the function it computes.

The widened model gives the same tokens as the original, with the computation and memory traffic of a larger model. So
speed can be measured at realistic cost with realistic acceptance. The method is Net2Net's, with zeros:

residual stream
    Grows from H to H' channels. Embeddings, ``o_proj`` and ``down_proj`` write zero to the
    new ones, which therefore stay exactly zero through every layer.
RMSNorm
    The mean square over H' channels, of which H are not zero, is H/H' of the original; with
    ``eps`` scaled likewise the normalised vector is exactly sqrt(H'/H) times the original,
    which the weight takes back (a power of two, hence exact in bf16, when H'/H is 4 or 16).
heads and MLP
    New heads and units compute random values that are not used: their columns of ``o_proj``
    and ``down_proj`` are zero.
layers
    New layers, at the end, add zero to the residual stream.

All other weights are random, because kernels and power management may be faster on zeros. Sums have more terms, so
logits are equal up to rounding, not bit by bit.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ssd.errors import ModelError

MLP_RATIO = 4.0  # intermediate size over hidden size that sizes_for aims at
MLP_MULTIPLE = 64


def head_places(heads: int, kv_heads: int, new_heads: int, new_kv_heads: int) -> tuple[list[int], list[list[int]]]:
    """Places the original heads among the new ones.

    Query head i reads kv head ``i // (heads // kv_heads)``, before and after. Returns the new
    place of every query head, and the new places of every kv head. If the new groups are smaller than the old ones, a
    kv head has several places, one for each part of its group.
    """
    for what, count, kv_count in (("", heads, kv_heads), ("new ", new_heads, new_kv_heads)):
        if kv_count < 1 or count % kv_count:
            raise ModelError(f"{what}attention heads ({count}) must be a multiple of {what}kv heads ({kv_count})")
    group, new_group = heads // kv_heads, new_heads // new_kv_heads
    copies = math.ceil(group / new_group)
    if kv_heads * copies > new_kv_heads:
        raise ModelError(
            f"{heads} query heads over {kv_heads} kv heads do not fit into {new_heads} over {new_kv_heads}: "
            f"with {new_group} query heads a kv head, at least {kv_heads * copies} kv heads are needed"
        )
    queries = []
    for head in range(heads):
        kv_head, offset = divmod(head, group)
        queries.append((kv_head * copies + offset // new_group) * new_group + offset % new_group)
    return queries, [[kv_head * copies + c for c in range(copies)] for kv_head in range(kv_heads)]


def _new_config(config: Any, **sizes: int) -> LlamaConfig:
    for name, value in sizes.items():
        if value < getattr(config, name):
            raise ModelError(f"widening cannot shrink {name} from {getattr(config, name)} to {value}")
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if hidden % heads:  # transformers refuses it, although the head size is given
        raise ModelError(f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads})")
    values = config.to_dict()
    shrink = config.hidden_size / sizes["hidden_size"]
    values |= sizes | {"head_dim": config.head_dim, "rms_norm_eps": config.rms_norm_eps * shrink}
    new = LlamaConfig.from_dict(values)
    new._attn_implementation = config._attn_implementation
    return new


def _channels(heads: list[int], head_dim: int) -> torch.Tensor:
    """Returns the rows of a projection that belong to ``heads``, in their order: ``[len(heads) · D]``."""
    starts = torch.tensor(heads).unsqueeze(1) * head_dim
    return (starts + torch.arange(head_dim)).flatten()


def _place(new: nn.Linear, old: nn.Linear, rows: torch.Tensor, columns: torch.Tensor | slice) -> None:
    """Writes ``old`` into the given rows (outputs) and columns (inputs) of ``new``."""
    wide = new.weight[rows]
    wide[:, columns] = old.weight.to(new.weight.dtype)
    new.weight[rows] = wide
    if old.bias is not None:
        new.bias[rows] = old.bias.to(new.bias.dtype)


def _zero(linear: nn.Linear) -> None:
    linear.weight.zero_()
    if linear.bias is not None:
        linear.bias.zero_()


@torch.no_grad()
def widen(
    model: LlamaForCausalLM,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    num_hidden_layers: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LlamaForCausalLM:
    """Returns a larger model with the same logits ``[B, M, V]`` up to rounding; the head size stays.

    The new model is built in ``dtype`` on the original's device and filled in place, so the peak of memory is both
    models. The original is not changed.

    Raises:
        ModelError: the sizes would shrink the model, or do not fit its groups of heads.
    """
    original: Any = model  # transformers' types do not describe the parts of a layer
    old_config: Any = model.config
    if old_config.model_type != "llama":
        raise ModelError(f"only Llama-architecture models can be widened, not {old_config.model_type!r}")
    queries, keys = head_places(
        old_config.num_attention_heads, old_config.num_key_value_heads, num_attention_heads, num_key_value_heads
    )
    config = _new_config(
        old_config,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        num_hidden_layers=num_hidden_layers,
    )
    with torch.random.fork_rng(devices=[]), torch.device(model.device):
        torch.manual_seed(seed)
        new: Any = LlamaForCausalLM._from_config(config, dtype=dtype)  # every matrix is random now
    new.generation_config = copy.deepcopy(model.generation_config)

    width, units, head_dim = old_config.hidden_size, old_config.intermediate_size, old_config.head_dim
    norm_scale = math.sqrt(width / hidden_size)
    residual, mlp_rows, inputs = torch.arange(width), torch.arange(units), slice(0, width)
    query_rows = _channels(queries, head_dim)

    def place_norm(wide: Any, narrow: Any) -> None:
        wide.weight[:width] = (narrow.weight.float() * norm_scale).to(dtype)

    new.model.embed_tokens.weight.zero_()
    new.model.embed_tokens.weight[:, :width] = original.model.embed_tokens.weight.to(dtype)
    if not old_config.tie_word_embeddings:
        new.lm_head.weight[:, :width] = original.lm_head.weight.to(dtype)
    place_norm(new.model.norm, original.model.norm)
    for layer in new.model.layers:
        _zero(layer.self_attn.o_proj)
        _zero(layer.mlp.down_proj)
    for wide, narrow in zip(new.model.layers, original.model.layers, strict=False):
        attention, source = wide.self_attn, narrow.self_attn
        _place(attention.q_proj, source.q_proj, query_rows, inputs)
        for copied in zip(*keys, strict=True):  # the first place of every kv head, then the second, …
            kv_rows = _channels(list(copied), head_dim)
            _place(attention.k_proj, source.k_proj, kv_rows, inputs)
            _place(attention.v_proj, source.v_proj, kv_rows, inputs)
        _place(attention.o_proj, source.o_proj, residual, query_rows)
        _place(wide.mlp.gate_proj, narrow.mlp.gate_proj, mlp_rows, inputs)
        _place(wide.mlp.up_proj, narrow.mlp.up_proj, mlp_rows, inputs)
        _place(wide.mlp.down_proj, narrow.mlp.down_proj, residual, slice(0, units))
        place_norm(wide.input_layernorm, narrow.input_layernorm)
        place_norm(wide.post_attention_layernorm, narrow.post_attention_layernorm)
    return new.eval()


def parameter_count(config: LlamaConfig, **sizes: int) -> int:
    """Returns the number of weights of a bias-free Llama with ``sizes`` replaced; a tied matrix counts once."""
    size = {**config.to_dict(), **sizes}
    hidden, dim = size["hidden_size"], config.head_dim
    attention = 2 * hidden * dim * (size["num_attention_heads"] + size["num_key_value_heads"])
    layer = attention + 3 * hidden * size["intermediate_size"] + 2 * hidden
    vocabularies = 1 if size["tie_word_embeddings"] else 2
    return vocabularies * size["vocab_size"] * hidden + size["num_hidden_layers"] * layer + hidden


def _heads_for(config: Any, hidden_size: int) -> tuple[int, int]:
    """Returns query heads that fill the hidden size, and kv heads in about the original ratio."""
    group = config.num_attention_heads // config.num_key_value_heads
    most = max(config.num_attention_heads, hidden_size // config.head_dim)
    for heads in range(most, config.num_attention_heads - 1, -1):
        for kv_heads in range(heads // group, config.num_key_value_heads - 1, -1):
            if hidden_size % heads == 0 and heads % kv_heads == 0:
                return heads, kv_heads
    raise ModelError(f"no head count of at least {config.num_attention_heads} divides hidden_size {hidden_size}")


def sizes_for(
    config: LlamaConfig, parameters: float, *, hidden_size: int | None = None, num_hidden_layers: int | None = None
) -> dict[str, Any]:
    """Returns sizes for :func:`widen` that give about ``parameters`` weights (within a few percent).

    The hidden size grows by a power of four, which keeps norms exact in bf16, the depth in proportion to it, and the
    MLP to about :data:`MLP_RATIO`. ``hidden_size`` and ``num_hidden_layers`` fix these sizes (a draft's latency
    depends on its depth).
    """
    hiddens = [hidden_size] if hidden_size else [config.hidden_size * 4**k for k in range(5)]
    depths = [num_hidden_layers] if num_hidden_layers else range(config.num_hidden_layers, 129)
    best: tuple[float, dict[str, Any]] | None = None
    for hidden in hiddens:
        heads, kv_heads = _heads_for(config, hidden)
        for depth in depths:
            sizes = dict(
                hidden_size=hidden,
                num_hidden_layers=depth,
                num_key_value_heads=kv_heads,
                num_attention_heads=heads,
                intermediate_size=0,
            )
            room = (parameters - parameter_count(config, **sizes)) / (3 * hidden * depth)
            units = round(room / MLP_MULTIPLE) * MLP_MULTIPLE
            if units < config.intermediate_size:
                continue
            shape = math.log((hidden / depth) / (config.hidden_size / config.num_hidden_layers))
            score = abs(shape) + abs(math.log(units / hidden / MLP_RATIO))
            if best is None or score < best[0]:
                best = score, sizes | {"intermediate_size": units}
    if best is None:
        raise ModelError(
            f"no widening of this model has about {parameters:.3g} parameters; it has "
            f"{parameter_count(config):,} to start from, and is never made smaller"
        )
    return best[1]
