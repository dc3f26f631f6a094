"""On a CUDA device: the checks of ``scripts/gpu_check.py --stage 1``, one test each, and tests of what only
CUDA can break."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from scripts.gpu import checks
from scripts.gpu.bench import Bench, embedded_pair
from ssd.decoding.trees.shape import TreeShape
from ssd.models.attention.tree_attention import try_kernels
from ssd.models.cuda.graphs import CudaCapture, Graphs
from ssd.models.device import Courier, Priority, Written, free_bytes, own_stream
from ssd.models.rows import RowPlan
from ssd.testing.attention import LARGE_CASES, Case, check

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    device = torch.device("cuda:0")
    return Bench(device=device, out=tmp_path, tiny=False, budget_s=1e9, pair=embedded_pair())


@pytest.mark.parametrize("case", LARGE_CASES, ids=lambda case: f"{case.batch}x{case.rows}x{case.slots}-{case.dtype}")
def test_tree_attention_against_float64(case: Case) -> None:
    (record,) = check("cuda:0", [case])
    assert record["within"] and record["independent"], record


def test_noise_bits_are_those_of_the_cpu() -> None:
    assert checks.noise_bits(torch.device("cuda:0"))


@DTYPES
def test_a_row_has_the_same_bits_in_plain_and_verifying_forwards(bench: Bench, dtype: str) -> None:
    found = checks.rows(bench, dtype)
    assert found["ok"], found


@DTYPES
def test_graphs_replay_the_bits_of_eager_forwards(bench: Bench, dtype: str) -> None:
    found = checks.graphs(bench, dtype)
    assert found["ok"], found


@DTYPES
@pytest.mark.parametrize(
    "speculation", [{}, {"siblings": 2, "lookahead": 3}, {"verify": "rejection"}], ids=["chain", "comb", "rejection"]
)
def test_methods_emit_the_same_tokens(bench: Bench, dtype: str, speculation: dict[str, Any]) -> None:
    found = checks.tokens(bench, dtype, {"speculation": speculation})
    assert found["ok"], found


def test_a_body_that_waits_is_not_captured_and_still_correct(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda:0")
    made = Graphs(device)
    run = made.of(lambda x: x * x.sum().item(), "waiting")
    with caplog.at_level(logging.WARNING):
        for value in (2.0, 3.0):
            assert run(torch.full((2,), value, device=device)).tolist() == [2 * value**2] * 2
    assert "waiting runs without a CUDA graph" in caplog.text
    # A failed capture spares the later ones of the same worker, and its stream.
    stream, after = torch.cuda.current_stream(), made.of(lambda x: x + 1, "plus one")
    assert [int(after(torch.full((), n, device=device))) for n in (1, 5)] == [2, 6]
    assert "plus one" not in caplog.text and torch.cuda.current_stream() == stream


@pytest.mark.parametrize("priority", ["normal", "high"])
def test_graphs_are_captured_and_replayed_on_a_workers_stream(priority: Priority) -> None:
    device = torch.device("cuda:0")
    with own_stream(device, priority):
        capture, seen = CudaCapture(device), []
        run = Graphs(device, capture).of(lambda x: (seen.append(torch.cuda.current_stream().priority), x + 1)[1], "add")
        assert [int(run(torch.full((), n, device=device))) for n in (1, 5)] == [2, 6]
        assert set(seen) == {torch.cuda.current_stream().priority} == {-1 if priority == "high" else 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_trial_of_the_kernels_passes(dim: int, dtype: torch.dtype) -> None:
    config = LlamaConfig(hidden_size=8 * dim, num_attention_heads=8, num_key_value_heads=2, head_dim=dim)
    try_kernels(config, dtype, torch.device("cuda:0"))


def test_a_courier_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device, waits = torch.device("cuda:0"), []
    wait: Callable[..., None] = torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: (waits.append(event), wait(event))[1])
    courier = Courier(device)
    for offset in range(3):
        nodes, trees = torch.arange(3, device=device) + offset, torch.arange(12, device=device).view(3, 2, 2) * offset
        fetched = courier.fetch(nodes, trees)
        assert [part.tolist() for part in fetched] == [nodes.tolist(), trees.tolist()]
        assert len(waits) == offset + 1


def test_a_hit_round_waits_for_its_outcome_only(bench: Bench) -> None:
    """Captured forwards and the courier pass CUDA's own check for hidden synchronisation."""
    runner = checks.runner(bench, "bfloat16", kind="tree", graphs=True)
    plan, courier = RowPlan.tree("tree", TreeShape.comb(checks.LOOKAHEAD)), Courier(bench.device)
    fed, lengths = Written(3, plan.rows, device=bench.device), Written(3, device=bench.device)
    for strict in (False, True):
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            logits = runner.forward(plan, fed.write([[9] * plan.rows] * 3), lengths.write([90] * 3), longest=90)
            (chosen,) = courier.fetch(logits.argmax(-1))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert chosen.shape == (3, plan.rows)


def test_free_memory_counts_what_torch_could_reuse() -> None:
    device = torch.device("cuda:0")
    before = free_bytes(device)
    held = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    assert free_bytes(device) <= before - (1 << 28) + (1 << 25)
    del held
    assert free_bytes(device) >= before - (1 << 25)
