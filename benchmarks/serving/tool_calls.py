"""Tool calls in every format, with and without speculation, in chunks of 1 to 9 tokens: identical or not.

    python benchmarks/serving/tool_calls.py --prompts 500 --json build/tool_calls.json

Uses the embedded pair. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

from ssd import AsyncEngine
from ssd.bench.exactness.tool_calls import SIZES, WAYS, compare
from ssd.bench.measure.compare import versions
from ssd.request.methods import Method

TEXTS = Path(__file__).resolve().parent.parent / "prompts" / "heldout.jsonl"
METHODS: tuple[Method, ...] = ("none", "sd", "ssd")
LONGEST = 60
"""Characters of a prompt."""


def prompts(count: int) -> list[str]:
    """Returns different pieces of the held-out texts."""
    texts = [json.loads(line)["prompt"] for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    return [f"{index} {texts[index % len(texts)][index // len(texts) :][:LONGEST]}" for index in range(count)]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    async with AsyncEngine("embedded", overrides=[f"engine.max_batch={options.batch}"]) as engine:
        ids = [engine.tokenize(prompt) for prompt in prompts(options.prompts)]
        told = await compare(
            engine, ids, METHODS, max_tokens=options.max_tokens, at_once=options.batch, progress=print_progress
        )
    tallies = [tally for by_temperature in told.values() for tally in by_temperature.values()]
    result = {
        "prompts": options.prompts,
        "methods": METHODS,
        "formats": [way.name for way in WAYS],
        "tokens_at_once": [*SIZES],
        "duration_s": round(time.perf_counter() - began, 1),
        "different": sum(len(tally["different"]) for tally in tallies),
        "by_format": told,
        "versions": versions(),
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text)
    print(text)
    sys.exit(bool(result["different"]))


def print_progress(way: str, done: int) -> None:
    print(f"{way}: {done}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
