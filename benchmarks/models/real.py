"""Real models through the whole engine: tokens beside transformers' greedy output, and methods beside each other.

    PYTHONPATH=SITE python benchmarks/models/real.py smollm2 --json real-smollm2.json

SITE is what ``ssd.testing.real.installed`` returns. Every prompt is completed by every method. Then transformers' own
model (dequantised float32, no cache) reads prompt and output at once: where its likeliest token is ours at every
position, its greedy output is ours. Where it is not, the gap between its two likeliest tokens is recorded, which
rounding explains if it is within ``BAND``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from ssd.bench.measure.prompts import load_prompts
from ssd.config.load import load_config, resolve_model_path
from ssd.engine.llm import LLM
from ssd.models.checkpoints.loading import load_model
from ssd.request.sampling_params import SamplingParams
from ssd.testing.real import PACKAGED

PROMPTS = Path(__file__).parents[1] / "prompts" / "real.jsonl"
BAND = 1e-3
"""Logits that rounding in float32 may exchange."""
METHODS = ("none", "sd", "ssd", "self")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=PACKAGED)
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--count", type=int, default=30, help="prompts to complete")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--weights", choices=("packed", "dequantised"), default="packed")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--length", type=int, default=512, help="engine.max_model_len")
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="do not compile: slower, and starts at once")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    methods = args.methods.split(",")
    prompts = load_prompts(args.prompts)[: args.count]
    name = PACKAGED[args.model]
    model = {"model": name, "dtype": args.dtype, "weights": args.weights if args.dtype == "float32" else "auto"}
    model |= {"compile": False} if args.eager else {}
    tree: dict[str, Any] = {
        "target": model,
        "speculation": {"method": "none", "governor": False, "self": {}, "lookahead": 3},
        "engine": {"max_model_len": args.length, "max_batch": args.batch},
    }
    if {"sd", "ssd"} & {*methods}:
        tree |= {"draft": model, "speculation": {**tree["speculation"], "method": "ssd", "forecast": {"budget": 2}}}
    outputs: dict[str, list[Any]] = {}
    seconds = {}
    with LLM(load_config(tree)) as llm:
        for method in methods:
            began = time.perf_counter()
            params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True, method=method)  # type: ignore[arg-type]
            outputs[method] = llm.generate([prompt.text for prompt in prompts], params)
            seconds[method] = time.perf_counter() - began
            print(f"{args.model} {method}: {seconds[method]:.0f} s", flush=True)
    first = outputs[methods[0]]
    equal = {
        method: sum(one.token_ids == other.token_ids for one, other in zip(found, first, strict=True))
        for method, found in outputs.items()
    }
    data: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "weights": args.weights,
        "prompts": len(prompts),
        "tokens": args.tokens,
        "prompt_tokens": [len(one.prompt_token_ids) for one in first],
        "equal_to_first_method": equal,
        "seconds": seconds,
    }
    if args.dtype == "float32":
        reference = load_model(
            resolve_model_path(name), dtype="float32", device="cpu", max_positions=args.length, weights="dequantised"
        )
        data |= beside_transformers(reference, first)
    print(json.dumps(data, indent=2))
    if args.json:
        args.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def beside_transformers(model: Any, outputs: list[Any]) -> dict[str, Any]:
    """Returns how many outputs are transformers' greedy ones, and where the others part from it first."""
    partings = []
    for index, output in enumerate(outputs):
        ids = torch.tensor([[*output.prompt_token_ids, *output.token_ids[:-1]]])
        logits = model(input_ids=ids, logits_to_keep=len(output.token_ids), use_cache=False).logits[0]
        best = logits.topk(2)
        apart = (best.indices[:, 0] != torch.tensor(output.token_ids)).nonzero()
        if len(apart):
            at = int(apart[0])
            gap = float(best.values[at, 0] - logits[at, output.token_ids[at]])
            partings.append({"prompt": index, "token": at, "gap": gap, "within_band": gap <= BAND})
    return {
        "equal_to_transformers": len(outputs) - len(partings),
        "partings": partings,
        "largest_gap": max((one["gap"] for one in partings), default=0.0),
    }


if __name__ == "__main__":
    main()
