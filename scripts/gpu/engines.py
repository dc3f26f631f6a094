"""Whole engines on one GPU: methods, stream priorities, batches; transformers on the same weights."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ssd import LLM, SamplingParams
from ssd.bench.measure.prompts import load_prompts
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.runtime.plan import Plan

from .bench import Bench, Size

PROMPTS = "benchmarks/prompts/heldout-code.jsonl"
METHODS = ("none_fast", "none", "sd", "ssd")
LOOKAHEAD, BUDGET = 7, 16
VARIANTS: dict[str, dict[str, Any]] = {
    "draft first": {},
    "compiled": {"compile": True},
    "equal priority": {"priority": "normal"},
}
"""Settings on one GPU: which worker's kernels have priority, and whether graphs hold compiled forwards."""


def run(bench: Bench, *names: str) -> None:
    """Measures one request at a time, all methods in turns, at T = 0 and 1; then transformers."""
    for size in bench.sizes(*names):
        pair: dict[str, PreTrainedModel] = {}
        for variant, changes in list(VARIANTS.items())[: 1 if bench.tiny else None]:
            bench.part(
                f"{size.name} {variant}", lambda c=changes, z=size, m=pair: _compare(bench, _pair(bench, z, m), **c)
            )
            bench.clear()
        bench.part(f"{size.name} transformers", lambda z=size, m=pair: _peers(bench, _pair(bench, z, m)))
        pair.clear()
        bench.clear()


def batches(bench: Bench, *names: str) -> None:
    """Measures throughput by batch, each method on all prompts at once."""
    for size in bench.sizes(*names):
        pair: dict[str, PreTrainedModel] = {}
        for batch in (2,) if bench.tiny else (1, 4, 16, 64):
            part = f"{size.name} batch {batch}"
            bench.part(part, lambda b=batch, z=size, m=pair: _compare(bench, _pair(bench, z, m), batch=b))
            bench.clear()
        pair.clear()


def _pair(bench: Bench, size: Size, made: dict[str, PreTrainedModel]) -> dict[str, PreTrainedModel]:
    """Returns the models, which are widened when the first part needs them."""
    if not made:
        made |= {"verifier": bench.target(size), "draft": bench.draft(size)}
    return made


def _config(bench: Bench, priority: str, compile: bool, batch: int) -> dict[str, Any]:
    worker = {"dtype": "bfloat16", "device": str(bench.device), "compile": compile}
    return {
        "target": {"model": str(bench.pair[0]), **worker},
        "draft": {"model": str(bench.pair[1]), **worker, "priority": priority},
        "speculation": {"lookahead": 2 if bench.tiny else LOOKAHEAD, "forecast": {"budget": BUDGET}},
        "engine": {"max_batch": batch, "max_model_len": 256 if bench.tiny else 1024, "prefill_chunk": 64},
    }


def _prompts(llm: LLM, bench: Bench, count: int) -> list[list[int]]:
    """Returns prompts of code. If more are needed than exist, they repeat with a different beginning."""
    texts = [prompt.text for prompt in load_prompts(PROMPTS)]
    ids = [llm.tokenizer.encode(text)[: 40 if bench.tiny else 256] for text in texts]
    return [ids[n % len(ids)][n // len(ids) :] for n in range(count)]


def _compare(
    bench: Bench,
    models: dict[str, PreTrainedModel],
    *,
    priority: str = "high",
    compile: bool = False,
    batch: int = 1,
) -> dict[str, Any]:
    tokens = 6 if bench.tiny else 128
    found: dict[str, Any] = {"batch": batch, "tokens": tokens, "lookahead": LOOKAHEAD, "governor": True}

    def launch(plan: Plan) -> InprocPipeline:
        return InprocPipeline(plan, models)

    with LLM(_config(bench, priority, compile, batch), launch=launch) as llm:
        prompts = _prompts(llm, bench, max(batch, 2 if bench.tiny else 5))
        groups = [prompts[n : n + batch] for n in range(0, len(prompts), batch)] if batch < len(prompts) else [prompts]
        for temperature in (0.0, 1.0):
            params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=temperature, seed=5)
            outputs: dict[str, list[list[int]]] = {}
            for method in METHODS:
                asked = replace(params, method=method)
                llm.generate(groups[0], asked)  # captures the graphs of this method
                llm.timings(reset=True)
                given, seconds, hits, lookups, rounds = [], 0.0, 0, 0, 0
                for group in groups:
                    began = time.perf_counter()
                    made = llm.generate(group, asked)
                    seconds += time.perf_counter() - began
                    given += [one.token_ids for one in made]
                    hits += sum(one.speculation.hits for one in made)
                    lookups += sum(one.speculation.lookups for one in made)
                    rounds += sum(one.speculation.rounds for one in made)
                count = sum(len(one) for one in given)
                outputs[method] = given
                found[f"{method} T={temperature:g}"] = {
                    "tokens_per_s": count / seconds,
                    "tokens_per_round": count / rounds,
                    "hit_rate": hits / lookups if lookups else None,
                    "identical": given == outputs["none"] if "none" in outputs else None,
                    **{name: value for name, value in llm.timings(reset=True).items() if value is not None},
                }
        assert llm.degraded is None, llm.degraded
    found["ok"] = all(
        found[f"{method} T={temperature}"]["identical"] for method in ("sd", "ssd") for temperature in (0, 1)
    )
    return found


def _peers(bench: Bench, models: dict[str, PreTrainedModel]) -> dict[str, Any]:
    """Measures transformers' ``generate`` and assisted generation: greedy, one request at a time, with SDPA."""
    from transformers import AutoTokenizer

    tokenizer, tokens = AutoTokenizer.from_pretrained(bench.pair[0]), 8 if bench.tiny else 128
    texts = [prompt.text for prompt in load_prompts(PROMPTS)][: 2 if bench.tiny else 5]
    ids = [torch.tensor([tokenizer.encode(text)[: 40 if bench.tiny else 256]], device=bench.device) for text in texts]
    target, draft = models["verifier"], models["draft"]
    for model in (target, draft):
        model.set_attn_implementation("sdpa")
        model.generation_config.eos_token_id = model.config.eos_token_id = None
    found: dict[str, Any] = {}
    for name, more in (("generate", {}), ("assisted", {"assistant_model": draft})):
        seconds = 0.0
        for turn, prompt in enumerate([ids[0], *ids]):  # the first run warms up
            began = time.perf_counter()
            made = target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=tokens,
                pad_token_id=0,
                **more,
            )
            if made.shape[1] != prompt.shape[1] + tokens:
                raise RuntimeError(f"{name} gave {made.shape[1] - prompt.shape[1]} tokens of {tokens}")
            made.cpu()
            seconds += (time.perf_counter() - began) * (turn > 0)
        found[f"{name}_tokens_per_s"] = tokens * len(ids) / seconds
    return found
