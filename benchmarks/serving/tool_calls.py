"""Tool calls in every format, with and without speculation, in chunks of 1 to 9 tokens: identical or not.

    python benchmarks/serving/tool_calls.py --prompts 500 --json FILE

``--pair tiny`` uses random models of one layer with the embedded pair's tokenizer, which are fast and write any text.
Formats that FILE holds already are skipped. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ssd import AsyncEngine
from ssd.bench.exactness.tool_calls import SIZES, WAYS, compare
from ssd.bench.measure.compare import versions
from ssd.config.load import resolve_model_path
from ssd.request.methods import Method
from ssd.testing.models.tiny import tiny_model

TEXTS = Path(__file__).resolve().parent.parent / "prompts" / "heldout.jsonl"
METHODS: tuple[Method, ...] = ("none", "sd", "ssd")
LONGEST = 60
"""Characters of a prompt."""


def prompts(count: int) -> list[str]:
    """Returns different pieces of the held-out texts."""
    texts = [json.loads(line)["prompt"] for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    return [f"{index} {texts[index % len(texts)][index // len(texts) :][:LONGEST]}" for index in range(count)]


def tiny_pair(folder: Path) -> dict[str, Any]:
    """Saves a target, and a draft that is the target with noise on its weights. Returns their configuration."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("embedded/target"))
    for role, noise in (("target", 0.0), ("draft", 0.02)):
        model = tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=1)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator) * weight.std(correction=0), alpha=noise)
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    speculation = {"lookahead": 3, "governor": False}
    models = {role: {"model": str(folder / role), "compile": False} for role in ("target", "draft")}
    return {**models, "speculation": speculation}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--pair", choices=["embedded", "tiny"], default="embedded")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--formats", default=",".join(way.name for way in WAYS), help="separated by commas")
    parser.add_argument("--json", type=Path, default=Path("build/tool_calls.json"))
    options = parser.parse_args()
    done: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {"by_format": {}}
    ways = [way for way in WAYS if way.name in options.formats.split(",") and way.name not in done["by_format"]]
    overrides = [f"engine.max_batch={options.batch}", "engine.max_model_len=256"]
    config = tiny_pair(Path(tempfile.mkdtemp())) if options.pair == "tiny" else "embedded"
    async with AsyncEngine(config, overrides=overrides) as engine:
        ids = [engine.tokenize(prompt) for prompt in prompts(options.prompts)]
        for way in ways:
            began = time.perf_counter()
            told = await compare(engine, ids, METHODS, ways=[way], max_tokens=options.max_tokens, at_once=options.batch)
            done["by_format"][way.name] = {**told[way.name], "duration_s": round(time.perf_counter() - began, 1)}
            print(f"{way.name}: {done['by_format'][way.name]['duration_s']} s", file=sys.stderr, flush=True)
            write(options, done)
    tallies = [tally for way in done["by_format"].values() for name, tally in way.items() if name != "duration_s"]
    sys.exit(any(tally["different"] for tally in tallies))


def write(options: argparse.Namespace, done: dict[str, Any]) -> None:
    result = {
        "pair": options.pair,
        "prompts": options.prompts,
        "max_tokens": options.max_tokens,
        "methods": METHODS,
        "tokens_at_once": [*SIZES],
        "by_format": {way.name: done["by_format"][way.name] for way in WAYS if way.name in done["by_format"]},
        "versions": versions(),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main())
