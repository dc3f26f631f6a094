"""Linear layers and embeddings whose weights stay in the quantised blocks of a GGUF file (``csrc/blocks_linear.cpp``).

The blocks are rearranged when they are loaded and take as much memory as in the file. A forward dequantises them in
registers and multiplies float32 activations, so a result differs from the dequantised layer's by the order of a sum
only. A row's result has the same bits whatever the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

TYPES = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
"""Types that the operators multiply, with their numbers in the file format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """A weight ``[N, K]`` in blocks, arranged for the operators.

    Attributes:
        packed: uint8, the rearranged blocks.
        type: a value of ``TYPES``.
        outputs: N.
        depth: K.
    """

    packed: Tensor
    type: int
    outputs: int
    depth: int

    @classmethod
    def of(cls, rows: Tensor, *, type: int, depth: int, memory: Tensor | None = None) -> Blocks:
        """Arranges blocks as a file has them.

        Args:
            rows: uint8 ``[N, bytes of a row]``.
            type: a value of ``TYPES``.
            depth: K.
            memory: uint8 zeros that receive the result; at least ``packed_size`` bytes. Allocated if None.
        """
        size = torch.ops.ssd.packed_size(type, len(rows), depth)
        packed = torch.zeros(size, dtype=torch.uint8) if memory is None else memory[:size]
        torch.ops.ssd.pack_blocks(rows.contiguous(), type, depth, packed)
        return cls(packed=packed, type=type, outputs=len(rows), depth=depth)


def packed_size(type: int, outputs: int, depth: int) -> int:
    """Returns the bytes of a weight ``[outputs, depth]`` when it is arranged for the operators."""
    return torch.ops.ssd.packed_size(type, outputs, depth)


class BlocksLinear(nn.Module):
    """Replaces an ``nn.Linear`` of a float32 model on the CPU."""

    def __init__(self, blocks: Blocks, bias: nn.Parameter | None):
        super().__init__()
        self.in_features, self.out_features = blocks.depth, blocks.outputs
        self.kind = blocks.type
        self.packed = nn.Parameter(blocks.packed, requires_grad=False)
        self.bias = bias

    def forward(self, rows: Tensor) -> Tensor:
        """Maps ``[..., K]`` to ``[..., N]``, float32."""
        out = torch.ops.ssd.blocks_linear(rows, self.packed, self.kind, self.out_features)
        return out if self.bias is None else out + self.bias


class BlocksEmbedding(nn.Module):
    """Replaces an ``nn.Embedding`` of a float32 model on the CPU. Rows are dequantised when they are looked up.

    Args:
        scale: multiplies every row, where the model's embedding does that.
    """

    def __init__(self, blocks: Blocks, scale: Tensor | None):
        super().__init__()
        self.num_embeddings, self.embedding_dim = blocks.outputs, blocks.depth
        self.kind = blocks.type
        self.packed = nn.Parameter(blocks.packed, requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)

    @property
    def blocks(self) -> Blocks:
        """The weight, for a layer that shares it."""
        return Blocks(packed=self.packed.data, type=self.kind, outputs=self.num_embeddings, depth=self.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Maps ids ``[...]`` int64 to ``[..., K]`` float32."""
        rows = torch.ops.ssd.blocks_rows(ids, self.packed, self.kind, self.num_embeddings, self.embedding_dim)
        return rows if self.scale is None else rows * self.scale


def count_weights(model: nn.Module) -> int:
    """Returns the number of a model's weights, those in blocks included and shared ones once."""
    counts: dict[object, int] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            whole = weight.numel()
            if name == "packed" and isinstance(module, BlocksLinear):
                whole = module.out_features * module.in_features
            elif name == "packed" and isinstance(module, BlocksEmbedding):
                whole = module.num_embeddings * module.embedding_dim
            counts[(weight.data_ptr(), weight.shape) if weight.data_ptr() else weight] = whole
    return sum(counts.values())
