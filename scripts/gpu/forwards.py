"""Times of forwards, compared with the time of reading their weights and keys from memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssd.decoding.forecast.base import ConfidenceForecast
from ssd.decoding.text.copying import CopyBias
from ssd.decoding.trees.shape import TreeShape
from ssd.models.attention import tree_attention
from ssd.models.cuda.graphs import Graphs
from ssd.models.rows import RowPlan
from ssd.models.runner import Attention, ForwardRunner, RunnerOptions
from ssd.pipeline.draft.branches import scratch_slots
from ssd.pipeline.draft.drafting import Drafting
from ssd.pipeline.draft.executors import DraftBatch, DraftModel
from ssd.pipeline.sampling.slots import SlotSampling
from ssd.testing.attention import Case

from .bench import Bench, Size

LOOKAHEAD, BUDGET = 7, 16
ROWS = (1, 8)
"""Rows of plain decoding, and of a verification with K = 7."""


def kernels(bench: Bench) -> None:
    """Measures tree attention, and SDPA with repeated and with grouped heads, by context and batch."""
    bench.part("bandwidth", lambda: {"bytes_per_s": bench.bandwidth()})
    for batch in (1, 8, 64):
        for slots in (64, 256) if bench.tiny else (1024, 4096, 8192, 32768):
            if batch * slots <= 1 << 19:
                bench.part(
                    f"attention batch {batch}, context {slots}", lambda b=batch, s=slots: _attention(bench, b, s)
                )


def _attention(bench: Bench, batch: int, slots: int) -> dict[str, Any]:
    heads, kv_heads, dim = (4, 2, 16) if bench.tiny else (32, 8, 128)
    inputs = Case(batch=batch, heads=heads, kv_heads=kv_heads, rows=8, dim=dim, slots=slots).inputs(str(bench.device))
    inputs["limits"].fill_(slots)
    query, keys, values = inputs["query"], inputs["main_keys"][:, :, :slots], inputs["main_values"][:, :, :slots]
    mask = torch.ones(batch, 1, 8, slots, dtype=torch.bool, device=bench.device)
    group, sdpa = heads // kv_heads, torch.nn.functional.scaled_dot_product_attention

    def repeated() -> Tensor:  # as transformers computes attention with a mask on CUDA
        return sdpa(query, keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1), mask)

    ways: dict[str, Callable[[], Tensor]] = {
        "tree": lambda: torch.ops.ssd.tree_attention(**inputs),
        "sdpa repeated": repeated,
        "sdpa grouped": lambda: sdpa(query, keys, values, mask, enable_gqa=True),
    }
    bytes_read = 2 * keys.numel() * keys.element_size()
    found: dict[str, Any] = {"bytes": bytes_read}
    for way, run in ways.items():
        captured = _captured(bench, run)
        found[f"{way}_ms"] = bench.seconds(captured) * 1e3
    return found


def _captured(bench: Bench, run: Callable[[], Any]) -> Callable[[], Any]:
    """Returns the call as a graph: without it, launches take longer than the kernel."""
    return Graphs(bench.device).of(run, "attention") if bench.device.type == "cuda" else run


def run(bench: Bench, *names: str) -> None:
    """Measures targets and drafts of the named sizes."""
    bench.part("bandwidth", lambda: {"bytes_per_s": bench.bandwidth()})
    for size in bench.sizes(*names):
        loaded: dict[str, PreTrainedModel] = {}

        def target(size: Size = size, loaded: dict[str, PreTrainedModel] = loaded) -> PreTrainedModel:
            return loaded.setdefault("target", bench.target(size)) if "target" not in loaded else loaded["target"]

        for batch, slots, way in _grid(bench, size):
            bench.part(
                f"{size.name} target {way}, batch {batch}, context {slots}",
                lambda b=batch, s=slots, w=way, t=target: _target(bench, t(), b, s, w),
            )
        loaded.clear()
        bench.clear()
        for way in _ways(bench):
            bench.part(f"{size.name} draft {way}", lambda z=size, w=way: _draft(bench, z, w))
            bench.clear()


def _ways(bench: Bench) -> list[str]:
    """Returns combinations of attention and execution; on CUDA all but one are captured in graphs."""
    if bench.device.type != "cuda":
        return ["rows eager", "tree eager"]
    best = "tree" if tree_attention.available() else "rows"
    return [f"{best} graphs", f"{best} compiled graphs", f"{best} eager", "rows graphs"]


def _grid(bench: Bench, size: Size) -> Iterator[tuple[int, int, str]]:
    ways = _ways(bench)
    if bench.tiny:
        yield from ((1, 64, ways[0]), (2, 64, ways[1]))
        return
    for way in ways:
        yield 1, 1024, way
    for batch, slots in ((1, 8192), (8, 1024), (8, 8192), (64, 1024), *([(64, 8192)] if size.name == "1b" else [])):
        yield batch, slots, ways[0]


def _made(bench: Bench, model: PreTrainedModel, way: str, *, batch: int, capacity: int, scratch: int) -> ForwardRunner:
    kind: Attention = "tree" if way.startswith("tree") else "rows"
    options = RunnerOptions(
        batch=batch,
        capacity=capacity,
        scratch_slots=scratch,
        prefill_chunk=64,
        vocabulary=model.config.vocab_size,
        compile="compiled" in way,
        attention=kind,
    )
    runner = ForwardRunner(model, options, graphs=Graphs(bench.device) if "graphs" in way else None)
    for part in (*runner.cache.main, *runner.cache.scratch):
        for states in part:
            states.normal_()
    return runner


def _target(bench: Bench, model: PreTrainedModel, batch: int, slots: int, way: str) -> dict[str, Any]:
    runner = _made(bench, model, way, batch=batch, capacity=slots + 64, scratch=0)
    lengths = torch.full((batch,), slots, device=bench.device)
    weights = sum(w.nbytes for w in model.parameters())
    used = runner.cache.nbytes * slots // runner.cache.main_slots
    found: dict[str, Any] = {"parameters": runner.parameters, "weight_bytes": weights, "kv_bytes": used}
    found["floor_ms"] = (weights + used) / bench.results["bandwidth"]["bytes_per_s"] * 1e3
    for rows in ROWS:
        plan = RowPlan.sequential(f"{rows} rows", rows)
        tokens = torch.randint(4, runner.vocabulary, (batch, rows), device=bench.device)
        seconds = bench.seconds(lambda p=plan, t=tokens: runner.forward(p, t, lengths, longest=slots))
        found[f"rows_{rows}_ms"] = seconds * 1e3
    found["floor_share"] = found["floor_ms"] / found["rows_1_ms"]
    found["verify_over_plain"] = found["rows_8_ms"] / found["rows_1_ms"]
    return found


def _draft(bench: Bench, size: Size, way: str) -> dict[str, Any]:
    """Measures a step of all branches, and the whole tree of K = 7 as one call."""
    model, shape = bench.draft(size), TreeShape.comb(2 if bench.tiny else LOOKAHEAD)
    slots = 64 if bench.tiny else 1024
    runner = _made(bench, model, way, batch=1, capacity=slots + 64, scratch=scratch_slots(shape, BUDGET))
    draft = DraftModel(
        runner=runner,
        shape=shape,
        forecast=ConfidenceForecast(shape, BUDGET, 1.4, bench.device),
        sampling=SlotSampling(
            1, runner.vocabulary, runner.device, horizon=2 * shape.depth + 1, compiled=runner.compiled
        ),
        copying=CopyBias((), shape, batch=1, capacity=0, device=runner.device),
    )
    drafting = Drafting(draft, lookaheads=(shape.depth,), anytime=False)
    lengths = torch.full((1,), slots, device=bench.device)
    tree = torch.randint(4, runner.vocabulary, (1, shape.nodes), device=bench.device)
    nodes = torch.zeros(1, BUDGET, dtype=torch.int64, device=bench.device)
    guesses = torch.randint(4, runner.vocabulary, (1, BUDGET), device=bench.device)
    rows, batch = drafting.branches.rows(0, nodes), DraftBatch(tree, lengths)
    step = bench.seconds(lambda: runner.forward(rows.plan, guesses, lengths, longest=slots, layout=rows.layout))
    whole = bench.seconds(lambda: drafting.fused.grow(batch, slots, shape.depth))
    floor = sum(w.nbytes for w in model.parameters()) / bench.results["bandwidth"]["bytes_per_s"]
    return {
        "parameters": runner.parameters,
        "layers": model.config.num_hidden_layers,
        "step_ms": step * 1e3,
        "step_floor_ms": floor * 1e3,
        "tree_ms": whole * 1e3,
        "lookahead": shape.depth,
        "branches": BUDGET,
    }
