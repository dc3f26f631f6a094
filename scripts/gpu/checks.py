"""Correctness on the device: kernels against float64, noise, rows, graphs, and the tokens of all methods."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ssd import LLM, SamplingParams, StructuredOutputsParams
from ssd.decoding.noise import uniform_bits
from ssd.decoding.trees.shape import TreeShape
from ssd.models.attention import tree_attention
from ssd.models.checkpoints.loading import load_model
from ssd.models.cuda.graphs import Graphs
from ssd.models.rows import RowPlan
from ssd.models.runner import Attention, ForwardRunner, RunnerOptions
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.testing.attention import CASES, LARGE_CASES, check

from .bench import Bench

LOOKAHEAD = 4
PROMPT = [10 + 7 * n % 100 for n in range(100)]
DTYPES = ("float32", "bfloat16")


def run(bench: Bench) -> None:
    bench.part("attention", lambda: attention(bench))
    bench.part("noise bits", lambda: {"ok": noise_bits(bench.device)})
    for dtype in DTYPES[: 1 if bench.tiny else None]:
        bench.part(f"rows {dtype}", lambda dtype=dtype: rows(bench, dtype))
        bench.part(f"graphs {dtype}", lambda dtype=dtype: graphs(bench, dtype))
        bench.part(f"tokens {dtype}", lambda dtype=dtype: tokens(bench, dtype, {}))
    bench.part("tokens comb", lambda: tokens(bench, "bfloat16", {"speculation": {"siblings": 2, "lookahead": 3}}))
    bench.part("tokens rejection at T=0", lambda: tokens(bench, "bfloat16", {"speculation": {"verify": "rejection"}}))
    if not bench.tiny:
        bench.part("tokens compiled", lambda: tokens(bench, "bfloat16", {"compile": True}))


def attention(bench: Bench) -> dict[str, Any]:
    cases = check(str(bench.device), CASES if bench.tiny else LARGE_CASES)
    return {"ok": all(case["within"] and case["independent"] for case in cases), "cases": cases}


def noise_bits(device: torch.device) -> bool:
    """Returns whether the random bits equal the CPU's, also for seeds and positions that overflow."""
    seeds = torch.tensor([0, 1, 2**31, 2**63 - 1, 123456789012345678])
    positions = torch.tensor([0, 5, 2**20, 2**31 - 1, 77])
    return torch.equal(
        uniform_bits(seeds.to(device), positions.to(device), 5000).cpu(), uniform_bits(seeds, positions, 5000)
    )


def runner(bench: Bench, dtype: str, *, kind: Attention, graphs: bool = False, batch: int = 3) -> ForwardRunner:
    """Returns a runner of the pair's target with a different prompt in each slot."""
    model = load_model(bench.pair[0], dtype=dtype, device=str(bench.device), max_positions=256)
    options = RunnerOptions(
        batch=batch,
        capacity=256,
        scratch_slots=2 * LOOKAHEAD,
        prefill_chunk=32,
        vocabulary=model.config.vocab_size,
        attention=kind,
    )
    made = ForwardRunner(model, options, graphs=Graphs(model.device) if graphs else None)
    for slot in range(batch):
        made.prefill(slot, PROMPT[slot:])
    return made


def kinds() -> list[Attention]:
    return ["rows", "tree"] if tree_attention.available() or not torch.cuda.is_available() else ["rows"]


def rows(bench: Bench, dtype: str) -> dict[str, Any]:
    """Checks strict numerics: logits are bit-equal in a padded forward of one token (plain decoding), at the token's
    place in a verification, and with other sequences in the batch."""
    found: dict[str, Any] = {"linears that depend on the row's place": linears(bench, dtype)}
    for kind in kinds():
        made, plan = runner(bench, dtype, kind=kind), RowPlan.tree("tree", TreeShape.comb(LOOKAHEAD))
        feed = torch.tensor([[17, 33, 21, 50, 9], [4] * 5, [90, 80, 70, 60, 50]], device=bench.device)
        lengths = torch.tensor([len(PROMPT) - slot for slot in range(3)], device=bench.device)
        whole = made.forward(plan, feed, lengths, longest=len(PROMPT))
        alone = []
        for step in range(LOOKAHEAD + 1):
            single = torch.zeros_like(feed)
            single[:, 0] = feed[:, step]
            alone.append(made.forward(plan, single, lengths + step, longest=len(PROMPT) + step)[:, 0])
        made.forward(plan, feed, lengths, longest=len(PROMPT))  # restores the keys
        others = feed.clone()
        others[1:] = 11
        mates = made.forward(plan, others, lengths, longest=len(PROMPT))
        found[kind] = {
            "plain = verify": torch.equal(torch.stack(alone, dim=1), whole),
            "difference": (torch.stack(alone, dim=1) - whole).abs().max().item(),
            "whatever the mates": torch.equal(mates[0], whole[0]),
        }
    found["ok"] = all(found[kind]["plain = verify"] and found[kind]["whatever the mates"] for kind in kinds())
    return found


@torch.no_grad()
def linears(bench: Bench, dtype: str) -> list[str]:
    """Finds linear layers whose result for a row depends on its place in the block, or on the other rows."""
    model = load_model(bench.pair[0], dtype=dtype, device=str(bench.device), max_positions=64)
    broken, seen = [], set()
    for name, module in model.named_modules():
        shape = tuple(getattr(module, "weight", torch.empty(0)).shape)
        if not isinstance(module, torch.nn.Linear) or shape in seen:
            continue
        seen.add(shape)
        block = torch.randn(3 * (LOOKAHEAD + 1), shape[1], device=bench.device).to(module.weight.dtype)
        order = torch.randperm(len(block), device=bench.device)
        if not torch.equal(module(block)[order], module(block[order])):
            broken.append(f"{name} {shape}")
    return broken


def graphs(bench: Bench, dtype: str) -> dict[str, Any]:
    """Checks that replayed forwards are bit-equal to eager ones, with new arguments in every call."""
    found: dict[str, Any] = {}
    for kind in kinds():
        plan, logits = RowPlan.tree("tree", TreeShape.comb(LOOKAHEAD)), []
        for captured in (False, bench.device.type == "cuda"):
            made = runner(bench, dtype, kind=kind, graphs=captured)
            given: list[Tensor] = []
            for step in range(3):
                fed = torch.full((3, LOOKAHEAD + 1), 20 + step, device=bench.device)
                lengths = torch.tensor([len(PROMPT) - slot + step for slot in range(3)], device=bench.device)
                given.append(made.forward(plan, fed, lengths, longest=len(PROMPT) + step).clone())
            logits.append(torch.stack(given))
        found[kind] = torch.equal(*logits)
    return {"ok": all(found.values()), **found}


def tokens(bench: Bench, dtype: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Checks that ``none``, ``sd`` and ``ssd`` give the same tokens with draft and target on one device: at T = 0 and
    1, with filters, penalties and a grammar, alone and in a batch."""
    speculation = {"lookahead": LOOKAHEAD, "governor": False, **changes.get("speculation", {})}
    worker = {"dtype": dtype, "device": str(bench.device), "compile": changes.get("compile", False)}
    config = {
        "target": {"model": str(bench.pair[0]), **worker},
        "draft": {"model": str(bench.pair[1]), **worker, "priority": "high"},
        "speculation": speculation,
        "engine": {"max_batch": 3, "max_model_len": 256, "prefill_chunk": 32},
    }
    count = 8 if bench.tiny else 48
    cold = SamplingParams(max_tokens=count, ignore_eos=True)
    asked = {"T=0": cold}
    if not speculation.get("verify"):
        asked["T=1"] = hot = replace(cold, temperature=1.0, seed=7)
        asked["filters"] = replace(hot, top_p=0.9, top_k=50)
        asked["penalty"] = replace(cold, presence_penalty=0.5)
        asked["grammar"] = replace(hot, structured_outputs=StructuredOutputsParams(json_object=True))
    found: dict[str, Any] = {"ok": True}
    with LLM(config, launch=InprocPipeline) as llm:
        for prompts in ([PROMPT], [PROMPT, PROMPT[:30], PROMPT[50:]])[bench.tiny :]:
            for name, params in asked.items():
                outputs = {
                    method: llm.generate(prompts, [replace(params, method=method)] * len(prompts))
                    for method in ("none", "sd", "ssd")
                }
                same = {
                    method: [one.token_ids for one in outputs[method]] == [one.token_ids for one in outputs["none"]]
                    for method in ("sd", "ssd")
                }
                hits = sum(one.speculation.hits for one in outputs["ssd"])
                found[f"batch {len(prompts)}, {name}"] = {**same, "hits": hits}
                found["ok"] &= all(same.values())
        assert llm.degraded is None, llm.degraded
    return found
