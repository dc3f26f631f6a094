"""Packed GGUF weights beside llama.cpp on the same file and cores: tokens per second, floor, and memory.

    PYTHONPATH=SITE python benchmarks/models/packed.py smollm2 --llama VENV/bin/python --json out.json

SITE is what ``ssd.testing.real.installed`` returns; VENV has llama-cpp-python. The floor is the time of reading the
file's weights once from memory with both cores, measured in the same process between the runs. All arms take turns;
figures are medians over the repeats, and ratios are formed within a repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from ssd.bench.measure.interleave import Arm, MethodArm, Runs, interleave
from ssd.bench.measure.prompts import DEMO_PROMPTS
from ssd.bench.peers.adapters import Peer
from ssd.config.load import load_config, resolve_model_path
from ssd.engine.llm import LLM
from ssd.testing.real import PACKAGED

SKIPPED = {"smollm2": list(range(10, 22)), "gemma3": list(range(6, 12))}
"""Layers that method self leaves out while it drafts."""


def reading_s(nbytes: int) -> float:
    """Returns the seconds in which the cores read ``nbytes`` from memory: the best of five passes over 512 MB."""
    block = torch.zeros(2**27, dtype=torch.float32)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - began)
    return min(times) / block.nbytes * nbytes


def memory_bytes() -> int:
    """Returns the resident bytes of this process and its children."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_info().rss for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=PACKAGED)
    parser.add_argument("--llama", metavar="PYTHON", help="Python of an environment with llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--dequantised", action="store_true", help="dequantised weights take turns too")
    parser.add_argument("--plain", action="store_true", help="leave out method self, whose compilation takes minutes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.sched_setaffinity(0, args.cores)
    torch.set_num_threads(len(args.cores))
    name = PACKAGED[args.model]
    path = resolve_model_path(name)
    skipped = SKIPPED[args.model]
    config = load_config(
        {
            "target": {"model": name, "cores": args.cores},
            "speculation": {
                "method": "none" if args.plain else "self",
                "self": None if args.plain else {"skip_attention": skipped, "skip_mlp": skipped},
                "governor": False,
            },
            "engine": {"max_model_len": 512, "workers": "processes"},
        }
    )
    other = config.model_copy(update={"target": config.target.model_copy(update={"weights": "dequantised"})})
    floor = [reading_s(path.stat().st_size)]
    before = memory_bytes()
    with LLM(config) as llm:
        ours = memory_bytes() - before
        pipelines = [("none_fast", "packed"), ("none", "packed, strict"), ("self", "packed, self")]
        arms: list[Arm] = [
            MethodArm(llm, method, label)  # type: ignore[arg-type]
            for method, label in pipelines[: 2 if args.plain else 3]
        ]
        closing: list[Any] = []
        try:
            if args.llama:
                from ssd.engine.front import make_plan

                tokenizer = make_plan(config)[0]
                for peer in ("llama.cpp", "llama.cpp-lookup"):
                    closing.append(Peer(peer, config, tokenizer, 1, args.llama))
                    arms.append(closing[-1])
            if args.dequantised:
                second = LLM(other)
                closing.append(second)
                arms.append(MethodArm(second, "none_fast", "dequantised"))
            found = interleave(arms, DEMO_PROMPTS, Runs(max_tokens=args.tokens, repeat=args.repeat), progress=_say)
        finally:
            for one in closing:
                one.close()
    floor.append(reading_s(path.stat().st_size))
    rates: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for turn in range(args.repeat):
        for arm in rates:
            tallies = [tally[turn] for (one, _), tally in found.tallies.items() if one == arm]
            rates[arm].append(sum(t.tokens for t in tallies) / sum(t.decode_s for t in tallies))
    base = rates.get("llama.cpp")
    data = {
        "model": args.model,
        "file_bytes": path.stat().st_size,
        "floor_ms": statistics.median(floor) * 1e3,
        "load_average": os.getloadavg(),
        "memory_bytes": ours,
        "tokens_per_second": {arm: statistics.median(values) for arm, values in rates.items()},
        "ratio_to_llama_cpp": {
            arm: statistics.median(ours / theirs for ours, theirs in zip(values, base, strict=True))
            for arm, values in rates.items()
        }
        if base
        else {},
    }
    print(json.dumps(data, indent=2))
    if args.json:
        args.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _say(done: int, total: int, label: str) -> None:
    print(f"{done}/{total} {label}", flush=True)


if __name__ == "__main__":
    main()
