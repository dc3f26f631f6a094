"""Tensor parallelism: every rank keeps its share of a stock model's linear layers, by transformers' own plan.

transformers' loading with ``tp_plan`` wraps each weight in a DTensor, whose dispatch costs more
than a small layer. Here the layers are plain linears of a smaller size, and two kinds of modules
around them gather or sum their outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ModelError
from ..layers import Layers, find_layers, own_attention
from .tensor_group import TensorGroup

# Not divided: norms over single heads, and embeddings, whose division would cost a sum per lookup.
_WHOLE = ("replicated_with_grad_allreduce", "embedding_rowwise")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How a model was divided."""

    group: TensorGroup
    head_shares: int
    """Ranks among which attention heads, and with them keys and values, are divided: all ranks, or 1."""
    layers: Layers
    """What a rank's layers keep."""


class Joined(nn.Module):
    """A linear layer whose output features are divided; every rank gets all of them."""

    def __init__(self, linear: nn.Linear, group: TensorGroup):
        super().__init__()
        self.features, self.group = linear.out_features, group
        self.linear = _outputs(linear, group.rank, group.size)

    def forward(self, rows: Tensor) -> Tensor:
        return self.group.join(self.linear(rows))[..., : self.features]


class Summed(nn.Module):
    """A linear layer whose input features are divided.

    Args:
        linear: the whole layer.
        group: its ranks.
        split: whether the input arrives whole.
    """

    def __init__(self, linear: nn.Linear, group: TensorGroup, *, split: bool):
        super().__init__()
        self.group, self.split, self.bias = group, split, linear.bias
        share = linear.in_features // group.size
        self.start = group.rank * share
        self.linear = _linear(linear.weight[:, self.start : self.start + share], None)

    def forward(self, rows: Tensor) -> Tensor:
        if self.split:
            rows = rows[..., self.start : self.start + self.linear.in_features]
        out = self.group.sum(self.linear(rows))
        return out if self.bias is None else out + self.bias


@torch.no_grad()
def shard(model: PreTrainedModel, group: TensorGroup) -> Sharding:
    """Reduces ``model`` to this rank's share, in place. The model is on the CPU, and neither moved nor packed yet.

    Raises:
        ModelError: the model has no plan, or attends by its own code; its plan has something this engine cannot
            divide; or its heads or features do not divide by the number of ranks.
    """
    layers = find_layers(model)
    kind, plan = model.config.model_type, dict(model.tp_plan or {})
    if not any(style.startswith("colwise") for name, style in plan.items() if "lm_head" not in name):
        raise ModelError(f"{kind}: transformers has no tensor-parallel plan for it; set target.tensor_parallel=1")
    if layers.recurrent is None:
        _check_attention(model)
    divided = [(parent, name, child, plan[path]) for parent, name, child, path in _children(model) if path in plan]
    by_heads = any(style == "colwise" for _, name, _, style in divided if name in ("k_proj", "query_key_value"))
    if by_heads:
        _check_heads(model, group.size)
    for parent, name, child, style in divided:
        if style in _WHOLE:
            continue
        if not isinstance(child, nn.Linear):
            raise ModelError(f"{kind}: {name} ({style}) cannot be divided here; set target.tensor_parallel=1")
        if style == "colwise":
            _check_features(kind, name, child.out_features, group.size)
            setattr(parent, name, _outputs(child, group.rank, group.size))
        elif style == "colwise_gather_output":
            setattr(parent, name, Joined(child, group))
        elif style in ("rowwise", "rowwise_split_input"):
            _check_features(kind, name, child.in_features, group.size)
            setattr(parent, name, Summed(child, group, split=style == "rowwise_split_input"))
        else:
            raise ModelError(f"{kind}: {name} has the unknown division {style}; set target.tensor_parallel=1")
    shares = group.size if by_heads else 1
    return Sharding(group=group, head_shares=shares, layers=layers.divided(shares))


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, str]]:
    """Yields every module as (parent, name, module, path), the path written as in plans."""
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            yield parent, name, child, re.sub(r"\.\d+(?=\.|$)", ".*", f"{path}.{name}" if path else name)


def _check_attention(model: PreTrainedModel) -> None:
    """Tries the whole model, as a runner does at its start. Raises: ModelError: it does not decode right, or attends by
    its own code, which would find a share of the heads only."""
    from ..runner import ForwardRunner, RunnerOptions  # which imports this module

    text = model.config.get_text_config()
    sizes = RunnerOptions(batch=1, capacity=64, scratch_slots=1, prefill_chunk=16, vocabulary=text.vocab_size)
    with own_attention(model):  # and not what the runner leaves
        attention = ForwardRunner(model, sizes).attention
    if attention == "model":
        raise ModelError(f"{text.model_type}: its code attends by itself; set target.tensor_parallel=1")


def _check_heads(model: PreTrainedModel, size: int) -> None:
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    if heads % size or shared % size:
        raise ModelError(
            f"{text.model_type}: {heads} attention and {shared} key-value heads do not divide by "
            f"target.tensor_parallel={size}"
        )


def _check_features(kind: str, name: str, features: int, size: int) -> None:
    if features % size:
        raise ModelError(f"{kind}: {features} features of {name} do not divide by target.tensor_parallel={size}")


def _outputs(linear: nn.Linear, rank: int, size: int) -> nn.Linear:
    """Returns this rank's output features; shares are equal, the last ones padded with zeros."""
    share = -(-linear.out_features // size)

    def own(whole: Tensor) -> Tensor:
        part = whole[rank * share : (rank + 1) * share]
        return torch.cat([part, part.new_zeros(share - len(part), *part.shape[1:])])

    return _linear(own(linear.weight), None if linear.bias is None else own(linear.bias))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    # Copied: a view would keep the whole weight in memory.
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear
