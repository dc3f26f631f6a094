"""Linear layers for a few rows on CPUs (``csrc/rows_linear.cpp``).

A decode forward multiplies one to twenty rows with every weight once, which should take as long as
reading the weights. Measured with 17.7 M float32 weights on a shared AVX-512 core: 2.7 ms for one row and 2.8 for
five, where ``torch.mm`` takes 2.7 and 4.5; 1.6 and 2.2 if the weights are bfloat16 numbers, which are stored as
such. On a shared Zen 3 core (AVX2), where arithmetic takes as long as reading: 3.2 ms for one row, 2.8 to 3.4 for
five, 5.1 to 5.3 for ten. A row's result has the same bits whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

ALIGNED = 64
"""Bytes of a cache line."""


class RowsLinear(nn.Module):
    """Replaces a float32 ``nn.Linear`` on the CPU; its weight ``[N, K]`` is stored packed."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = nn.Parameter(torch.ops.ssd.pack(linear.weight.detach()), requires_grad=False)
        self.bias = linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        """Maps ``[..., K]`` to ``[..., N]``, float32."""
        out = torch.ops.ssd.rows_linear(rows, self.packed, self.out_features)
        return out if self.bias is None else out + self.bias

    def move(self, memory: Tensor) -> int:
        """Moves the weight to the start of ``memory`` (uint8); returns the number of bytes it takes."""
        packed = self.packed.detach()
        there = memory[: packed.nbytes].view(packed.dtype).view(packed.shape).copy_(packed)
        self.packed = nn.Parameter(there, requires_grad=False)
        return packed.nbytes


def pack_linears(model: nn.Module, only: Collection[nn.Module] | None = None) -> None:
    """Replaces every ``nn.Linear`` of a float32 model, in place; or ``only`` some.

    The packed weights share one block of memory. The original ones are freed, unless something else (a tied
    embedding) uses them.
    """
    places = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear and (only is None or child in only)
    ]
    # An upper bound: pages that are never written take no memory.
    memory = torch.ops.ssd.reserve(sum(_most(getattr(*place)) for place in places))
    for module, name in places:
        linear = RowsLinear(getattr(module, name))
        memory = memory[-(-linear.move(memory) // ALIGNED) * ALIGNED :]
        setattr(module, name, linear)


def _most(linear: nn.Linear) -> int:
    """Returns an upper bound on a packed weight's size in bytes: float32 plus one padding panel."""
    return (linear.out_features + 64) * linear.in_features * 4 + ALIGNED
