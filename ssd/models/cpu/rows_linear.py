"""Linear layers for a few rows on CPUs (``csrc/rows_linear.cpp``).

A decode forward multiplies one to twenty rows with every weight once; it should take as long as
reading the weights. Measured on 17.7 M float32 weights: on a shared AVX-512 core 2.7 ms with one row, 2.8
with five, where ``torch.mm`` takes 2.7 and 4.5 (1.6 and 2.2 where they are bfloat16 numbers and kept as
such). An AVX2 core multiplies for as long as it reads: there, on a shared Zen 3, such a weight takes 3.2 ms with one
row, 2.8 to 3.4 with five, 5.1 to 5.3 with ten. A row's result is the same bits however many rows there are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ALIGNED = 64
"""Bytes of a cache line."""


class RowsLinear(nn.Module):
    """Stands in for a float32 ``nn.Linear`` on the CPU; its weight ``[N, K]`` is kept packed."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = nn.Parameter(torch.ops.ssd.pack(linear.weight.detach()), requires_grad=False)
        self.bias = linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        """``[.., K]`` to ``[.., N]``."""
        out = torch.ops.ssd.rows_linear(rows, self.packed, self.out_features)
        return out if self.bias is None else out + self.bias

    def move(self, memory: Tensor) -> int:
        """Keep the weight at the start of ``memory`` (bytes); returns how many it takes."""
        packed = self.packed.detach()
        there = memory[: packed.nbytes].view(packed.dtype).view(packed.shape).copy_(packed)
        self.packed = nn.Parameter(there, requires_grad=False)
        return packed.nbytes


def pack_linears(model: nn.Module) -> None:
    """Replace every ``nn.Linear`` of a float32 model. Its own weights go, unless something else (a tied
    embedding) uses them too. The packed ones lie in one piece of memory."""
    places = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear
    ]
    # As much as they can take; memory that is not written is none.
    memory = torch.ops.ssd.reserve(sum(_most(getattr(*place)) for place in places))
    for module, name in places:
        linear = RowsLinear(getattr(module, name))
        memory = memory[-(-linear.move(memory) // ALIGNED) * ALIGNED :]
        setattr(module, name, linear)


def _most(linear: nn.Linear) -> int:
    """Bytes of a weight of which nothing is known: float32, a panel of outputs more."""
    return (linear.out_features + 64) * linear.in_features * 4 + ALIGNED
