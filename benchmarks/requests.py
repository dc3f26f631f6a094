"""Speed of the methods by kind of request: filters, penalties, biases, grammars. Prints a Markdown table.

python benchmarks/requests.py --json benchmarks/results/requests.json

Methods take turns for every prompt and kind of request, and their order rotates.
The governor is off, as in `ssd bench`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.progress import track

from ssd import LLM, SamplingParams, StructuredOutputsParams
from ssd.bench.measure.prompts import load_prompts
from ssd.config.load import load_config

METHODS = ("none_fast", "sd", "ssd")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "arguments": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 2, "maxItems": 4},
        "doc": {"type": "string", "minLength": 20, "maxLength": 80},
        "returns": {"type": "integer"},
    },
    "required": ["name", "arguments", "doc", "returns"],
    "additionalProperties": False,
}
COMPACT = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
KINDS: dict[str, dict[str, Any]] = {
    "T = 0": {},
    "T = 0, presence_penalty 0.5": {"presence_penalty": 0.5},
    "T = 0, logit_bias of one token": {"logit_bias": {5: -1.0}},
    "T = 0, logprobs 5": {"logprobs": 5},
    "T = 0, regex": {"structured_outputs": StructuredOutputsParams(regex=r"[a-z_ =().:\n0-9]{20,400}")},
    "T = 0, json_object": {"structured_outputs": StructuredOutputsParams(json_object=True)},
    "T = 0, JSON schema": {"structured_outputs": StructuredOutputsParams(json=SCHEMA)},
    "T = 0, JSON schema, no spaces": {"structured_outputs": COMPACT},
    "T = 0.7, JSON schema, no spaces": {"temperature": 0.7, "structured_outputs": COMPACT},
    "T = 1": {"temperature": 1.0},
    "T = 1, top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "T = 1, top_k 50": {"temperature": 1.0, "top_k": 50},
    "T = 1, min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "T = 1, repetition_penalty 1.1": {"temperature": 1.0, "repetition_penalty": 1.1},
    "T = 0.7, top_p 0.8, top_k 20": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
}


def main(
    prompts: Path = Path("benchmarks/prompts/heldout-code.jsonl"),
    config: str = "embedded",
    max_tokens: int = 96,
    repeat: int = 3,
    limit: int = 10,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure all kinds of requests, and check that all methods give the same tokens."""
    asked = load_prompts(prompts)[:limit]
    tokens, seconds = defaultdict[tuple[int, str, str], int](int), defaultdict[tuple[int, str, str], float](float)
    different: list[str] = []
    with LLM(load_config(config, ["speculation.governor=false"])) as llm:
        for given in KINDS.values():
            for method in METHODS:
                params = SamplingParams(**given, method=method, max_tokens=16)  # pyright: ignore[reportArgumentType]
                llm.generate([asked[0].text], params)
        runs = [(again, number, kind) for again in range(repeat) for number in range(len(asked)) for kind in KINDS]
        for turn, (again, number, kind) in enumerate(track(runs)):
            params, found = SamplingParams(**KINDS[kind], seed=number, max_tokens=max_tokens), {}
            for place in range(len(METHODS)):
                method = METHODS[(turn + place) % len(METHODS)]
                (output,) = llm.generate([asked[number].text], replace(params, method=method))
                tokens[again, kind, method] += len(output.token_ids)
                seconds[again, kind, method] += output.decode_s
                found[method] = output.token_ids
            if len(set(found.values())) > 1:
                different.append(f"{kind}: {asked[number].name}")

    def rate(kind: str, method: str) -> float:
        return median(tokens[again, kind, method] / seconds[again, kind, method] for again in range(repeat))

    def speedup(kind: str, method: str) -> float:
        """Returns the speed relative to plain decoding in the same repeat."""
        return median(
            tokens[again, kind, method]
            / seconds[again, kind, method]
            * seconds[again, kind, "none_fast"]
            / tokens[again, kind, "none_fast"]
            for again in range(repeat)
        )

    print("| request | " + " | ".join(f"{method} tok/s (×)" for method in METHODS) + " |")
    print("|---|" + "---|" * len(METHODS))
    for kind in KINDS:
        print(f"| {kind} | " + " | ".join(f"{rate(kind, m):.0f} ({speedup(kind, m):.2f})" for m in METHODS) + " |")
    print("\nidentical:", "yes" if not different else "NO: " + "; ".join(different))
    if json_file is not None:
        figures = {
            kind: {m: {"tokens_per_s": rate(kind, m), "speedup": speedup(kind, m)} for m in METHODS} for kind in KINDS
        }
        json_file.write_text(json.dumps({"kinds": figures, "different": different}, indent=2) + "\n", encoding="utf-8")
    if different:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
