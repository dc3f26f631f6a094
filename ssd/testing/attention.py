"""Tree attention against float64: cases, a reference, and errors.

``python -m ssd.testing.attention DEVICE`` checks the kernels; with ``TRITON_INTERPRET=1`` in the environment, on a CPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.attention.inputs import AttentionInputs
from ..models.attention.tree_attention import in_triton

Attention = Callable[[dict[str, Any]], Tensor]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Largest relative error (of norms) against float64 on the same inputs: a few units in the last place."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention problem; sizes B, H, H_kv, R, D, T and X in this order."""

    batch: int = 2
    heads: int = 6
    kv_heads: int = 2
    rows: int = 5
    dim: int = 32
    slots: int = 300
    scratch: int = 0
    softcap: float = 0.0
    window: int = 0
    """Slots a row may attend before itself; 0: all."""
    sinks: bool = False
    dtype: str = "bfloat16"
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        """Returns arguments of ``ssd::tree_attention``; slots that no row attends hold large numbers."""
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, self.torch_dtype)

        limits = torch.randint(0, self.slots + 1, (self.batch, self.rows), generator=generator)
        limits[0, 0], limits[-1, -1] = 0, self.slots  # attends only itself; attends everything
        main = [random(self.batch, self.kv_heads, self.slots + 9, self.dim) for _ in range(2)]
        for states in main:
            states[:, :, self.slots :] = 100.0
        scratch, mask = [None, None], None
        if self.scratch:
            scratch = [random(self.batch, self.kv_heads, self.scratch, self.dim) for _ in range(2)]
            mask = (torch.rand(self.batch, self.rows, self.scratch, generator=generator) < 0.4).to(device)
            mask[0, 0] = False
        # Laid out as a model does: [B, R, H, D] in memory.
        query, *own = (
            random(self.batch, self.rows, n, self.dim).transpose(1, 2)
            for n in (self.heads, self.kv_heads, self.kv_heads)
        )
        return dict(
            query=query, main_keys=main[0], main_values=main[1], scratch_keys=scratch[0], scratch_values=scratch[1],
            own_keys=own[0], own_values=own[1], limits=limits.to(device), mask=mask, scale=self.dim**-0.5,
            softcap=self.softcap,
            starts=(limits - self.window).clamp(min=0).to(device) if self.window else None,
            sinks=random(self.heads) if self.sinks else None,
        )  # fmt: skip


CASES = (
    Case(heads=4, rows=3, slots=150, dtype="float16"),
    Case(batch=1, heads=3, kv_heads=1, rows=2, dim=64, slots=130, dtype="float32"),
    Case(batch=1, heads=2, kv_heads=2, rows=3, dim=16, slots=40, scratch=7, softcap=5.0, dtype="float32"),
    Case(batch=1, heads=4, kv_heads=1, rows=5, dim=80, slots=70, scratch=135, dtype="float16", seed=2),
    Case(heads=4, rows=3, slots=300, window=50, scratch=6, sinks=True, dtype="float32", seed=9),
)
"""Small enough for Triton's interpreter. None is bfloat16, of which the interpreter multiplies the raw bits."""
LARGE_CASES = (
    *CASES,
    Case(),
    Case(rows=8, scratch=70, seed=1),
    Case(dim=128, rows=3, slots=128, dtype="float16", seed=3),
    Case(batch=3, heads=32, kv_heads=8, rows=8, dim=128, slots=5000, seed=4),
    Case(batch=1, heads=32, kv_heads=8, rows=24, dim=128, slots=1000, scratch=90, seed=5),
    Case(batch=1, heads=8, kv_heads=2, rows=512, dim=64, slots=2048, seed=6),
    Case(batch=2, heads=8, kv_heads=8, rows=4, dim=256, slots=700, softcap=50.0, seed=7),
    Case(batch=1, heads=8, kv_heads=1, rows=5, dim=128, slots=40000, dtype="float32", seed=8),
    Case(batch=2, heads=8, kv_heads=2, rows=8, dim=64, slots=5000, window=700, sinks=True, seed=10),
)


def reference(inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns ``[B, R, H, D]`` by one softmax over all keys a row attends, with keys repeated, in ``dtype``."""
    query = inputs["query"].to(dtype)
    batch, heads, rows, _ = query.shape

    def repeated(name: str) -> Tensor:
        states = inputs[name].to(dtype)
        return states.repeat_interleave(heads // states.shape[1], dim=1)

    keys, values = repeated("main_keys"), repeated("main_values")
    slots = torch.arange(keys.shape[2], device=query.device)
    seen = slots < inputs["limits"][..., None]
    if inputs["starts"] is not None:
        seen &= slots >= inputs["starts"][..., None]
    if inputs["mask"] is not None:
        keys = torch.cat([keys, repeated("scratch_keys")], dim=2)
        values = torch.cat([values, repeated("scratch_values")], dim=2)
        seen = torch.cat([seen, inputs["mask"].expand(batch, -1, -1)], dim=-1)
    keys = torch.cat([keys, repeated("own_keys")], dim=2)
    values = torch.cat([values, repeated("own_values")], dim=2)
    seen = torch.cat([seen, torch.eye(rows, dtype=torch.bool, device=query.device).expand(batch, -1, -1)], dim=-1)
    scores = query @ keys.transpose(2, 3) * inputs["scale"]
    if inputs["softcap"]:
        scores = torch.tanh(scores / inputs["softcap"]) * inputs["softcap"]
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    if inputs["sinks"] is not None:
        sinks = inputs["sinks"].to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ values).transpose(1, 2)


def error(got: Tensor, inputs: dict[str, Any]) -> float:
    """Returns ‖got - reference‖ / ‖reference‖; infinite if a result is not finite."""
    truth = reference({k: v.cpu() if isinstance(v, Tensor) else v for k, v in inputs.items()})
    difference = (got.cpu().double() - truth).norm() / truth.norm()
    return difference.item() if torch.isfinite(difference) else float("inf")


def kernel(inputs: dict[str, Any]) -> Tensor:
    """Runs the Triton kernels, on any device."""
    return in_triton(AttentionInputs(**inputs))


def operator(inputs: dict[str, Any]) -> Tensor:
    """Runs the operator that models call: the kernels on CUDA, elsewhere the same algorithm in torch."""
    return torch.ops.ssd.tree_attention(**inputs)


def independent(case: Case, device: str, run: Attention = operator) -> bool:
    """Returns whether a row keeps its bits when all other rows' queries, limits and own keys change."""
    inputs, others = case.inputs(device), Case(**{**asdict(case), "seed": case.seed + 100}).inputs(device)
    fixed = case.rows // 2
    for name in ("query", "own_keys", "own_values"):
        others[name][:, :, fixed] = inputs[name][:, :, fixed]
    others["limits"][:, fixed] = inputs["limits"][:, fixed]
    others["sinks"] = inputs["sinks"]
    if inputs["starts"] is not None:
        others["starts"][:, fixed] = inputs["starts"][:, fixed]
    if inputs["mask"] is not None:
        others["mask"][:, fixed] = inputs["mask"][:, fixed]
    for name in ("main_keys", "main_values", "scratch_keys", "scratch_values"):
        others[name] = inputs[name]
    return torch.equal(run(inputs)[:, fixed], run(others)[:, fixed])


def check(device: str, cases: Sequence[Case] = CASES, run: Attention = operator) -> list[dict[str, Any]]:
    """Returns one record per case: its sizes, the error, whether that is within tolerance, and whether
    rows are independent."""
    records = []
    for case in cases:
        inputs = case.inputs(device)
        found = error(run(inputs), inputs)
        records.append(
            {
                **asdict(case),
                "error": found,
                "within": found < TOLERANCE[case.torch_dtype],
                "independent": independent(case, device, run),
            }
        )
    return records


if __name__ == "__main__":
    sys.stdout.write(json.dumps(check(sys.argv[1], run=kernel)))
