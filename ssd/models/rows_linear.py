"""Linear layers for a few rows on CPUs (``csrc/rows_linear.cpp``).

A decode forward multiplies one to twenty rows with every weight once; it should take as long as
reading the weights. Measured on 17.7 M float32 weights: on a shared AVX-512 core 2.7 ms with one row, 2.8
with five, where ``torch.mm`` takes 2.7 and 4.5 (1.6 and 2.2 where they are bfloat16 numbers and kept as
such); on a shared AVX2 core (Zen 3) 5.6 and 5.8 against 6.3 and 15.7 (2.9 and 3.3). A row's result is the
same bits however many rows there are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


def pack_linears(model: nn.Module) -> None:
    """Replace every ``nn.Linear`` of a float32 model. Its own weights go, unless something else (a tied
    embedding) uses them too."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, RowsLinear(child))


def _fake(input: Tensor, packed: Tensor, outputs: int) -> Tensor:
    return input.new_empty((*input.shape[:-1], outputs))
