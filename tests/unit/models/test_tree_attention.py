"""Prefix and tree part merged by log-sum-exp: against float64, and Triton's kernels in its interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssd.decoding.trees.shape import TreeShape
from ssd.models.attention import tree_attention
from ssd.models.checkpoints.loading import lay_out_for_cpu
from ssd.models.cpu import operators
from ssd.models.rows import RowPlan
from ssd.models.runner import ForwardRunner, RunnerOptions, can_compile
from ssd.testing.attention import CASES, TOLERANCE, Case, error
from ssd.testing.models.tiny import ARCHITECTURES, tiny_model

needs_compiler = pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [Case(rows=8, scratch=70), *CASES], ids=lambda case: f"{case.slots}+{case.scratch}")
def test_against_float64(case: Case, dtype: str) -> None:
    case = replace(case, dtype=dtype)
    inputs = case.inputs()
    assert error(torch.ops.ssd.tree_attention(**inputs), inputs) < TOLERANCE[case.torch_dtype]


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [Case(rows=8, scratch=70), *CASES], ids=lambda case: f"{case.slots}+{case.scratch}")
def test_the_cpu_operator_against_float64(case: Case, dtype: str) -> None:
    assert operators.available()
    case = replace(case, dtype=dtype)
    inputs = case.inputs()
    assert error(torch.ops.ssd.rows_attention(**inputs, sequences=None), inputs) < TOLERANCE[case.torch_dtype]


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cpu_operator_gives_a_row_the_same_bits_in_place_and_in_scratch(dtype: str) -> None:
    """Alone or beside other rows; the last slots it attends in place or in scratch."""
    assert operators.available()
    inputs = Case(batch=1, rows=6, slots=100, scratch=5, dtype=dtype).inputs()
    inputs["limits"], inputs["mask"][:] = torch.tensor([[40, 90, 17, 100, 64, 1]]), False
    inputs["mask"][0, 1, 1:4] = True
    together = torch.ops.ssd.rows_attention(**inputs, sequences=None)
    for row in range(6):
        at = slice(row, row + 1)
        own = {name: inputs[name][:, :, at] for name in ("query", "own_keys", "own_values")}
        alone = {**inputs, **own, "limits": inputs["limits"][:, at], "mask": inputs["mask"][:, at]}
        assert torch.equal(torch.ops.ssd.rows_attention(**alone, sequences=None)[:, 0], together[:, row])
    for part in ("keys", "values"):
        inputs[f"main_{part}"][:, :, 90:93] = inputs[f"scratch_{part}"][:, :, 1:4]
    inputs["limits"][0, 1], inputs["mask"][0, 1] = 93, False
    assert torch.equal(torch.ops.ssd.rows_attention(**inputs, sequences=None)[:, 1], together[:, 1])


def test_parts_merge_to_the_whole_for_all_cuts() -> None:
    generator = torch.Generator().manual_seed(3)
    query, keys, values = (torch.randn(2, n, 16, generator=generator, dtype=torch.float64) for n in (3, 50, 50))
    seen = torch.rand(2, 3, 50, generator=generator) < 0.5
    seen[0, 0, :20] = False  # a part without anything in it
    seen[..., 49] = True
    whole, lse = tree_attention.partial_attention(query, keys, values, seen, 0.0)
    for cuts in ([20, 30], [1, 49], [10] * 5):
        parts = [
            tree_attention.partial_attention(query, k, v, s, 0.0)
            for k, v, s in zip(keys.split(cuts, 1), values.split(cuts, 1), seen.split(cuts, 2), strict=True)
        ]
        assert (tree_attention.merged(parts) - whole).abs().max() < 1e-14
        assert (torch.stack([part[1] for part in parts]).logsumexp(0) - lse).abs().max() < 1e-14


def test_the_check_detects_a_wrong_mask() -> None:
    inputs = Case(dtype="float32").inputs()
    assert error(torch.ops.ssd.tree_attention(**{**inputs, "limits": inputs["limits"] + 1}), inputs) > 1e-3  # pyright: ignore


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.timeout(280)
def test_kernels_in_the_interpreter() -> None:
    """In a separate process: triton decides at import whether it interprets."""
    ran = subprocess.run(
        [sys.executable, "-m", "ssd.testing.attention", "cpu"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=270,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    records = json.loads(ran.stdout)
    assert len(records) == len(CASES)
    assert all(record["within"] and record["independent"] for record in records), records


@pytest.mark.parametrize("operator", ["torch", pytest.param("cpu", marks=needs_compiler)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_gives_the_same_logits_with_either_attention(
    architecture: str, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert operators.available() or operator == "torch"
    monkeypatch.setattr(operators, "loaded", lambda: operator == "cpu")
    shape = TreeShape.comb(3, siblings=2)
    plan, tokens = RowPlan.tree("tree", shape), torch.arange(2 * shape.nodes).view(2, -1) + 5
    logits: list[Tensor] = []
    for attention in ("rows", "tree"):
        model = tiny_model(architecture, vocab_size=128)
        lay_out_for_cpu(model)
        options = RunnerOptions(
            batch=2, capacity=300, scratch_slots=6, prefill_chunk=16, vocabulary=128, attention=attention
        )
        runner = ForwardRunner(model, options)
        runner.prefill(0, list(range(4, 44)))
        runner.prefill(1, list(range(40, 120)) * 3)
        logits.append(runner.forward(plan, tokens, torch.tensor([40, 240]), longest=240))
    assert (logits[0] - logits[1]).abs().max() / logits[0].abs().max() < 1e-5
