"""Tool calls in every format, with and without speculation, in chunks of 1 to 9 tokens: identical or not.

    python benchmarks/serving/tool_calls.py --prompts 500 --json FILE

``--pair tiny``, the default, takes random models of one layer with a tokenizer of 1,024 pieces. They are fast and write
any text that the grammar allows. The embedded pair's tokenizer has no special tokens for markers, so formats that need
them are left out with ``--pair embedded``. Formats that FILE holds already are skipped.

The exit code is 1 if anything differs, or if fewer than ``--floor`` of a format's answers hold a call: a table of plain
texts would prove nothing.
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
from tokenizers import AddedToken
from transformers import AutoTokenizer

from ssd import AsyncEngine
from ssd.bench.exactness.tool_calls import MARKERS, SIZES, TOOLS, WAYS, compare
from ssd.bench.measure.compare import versions
from ssd.config.load import resolve_model_path
from ssd.request.methods import Method
from ssd.testing.models.tiny import tiny_model

TEXTS = Path(__file__).resolve().parent.parent / "prompts" / "heldout.jsonl"
METHODS: tuple[Method, ...] = ("none", "sd", "ssd")
LONGEST = 60
"""Characters of a prompt."""
PIECES = 1024
"""Of the tiny pair's tokenizer."""


def prompts(count: int) -> list[str]:
    """Returns different pieces of the held-out texts."""
    texts = [json.loads(line)["prompt"] for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    return [f"{index} {texts[index % len(texts)][index // len(texts) :][:LONGEST]}" for index in range(count)]


def tiny_tokenizer(*, markers: bool) -> Any:
    """Returns a tokenizer of few pieces, learned from the held-out texts.

    Args:
        markers: every marker is a special token.
    """
    embedded: Any = AutoTokenizer.from_pretrained(resolve_model_path("embedded/target"))
    texts = [json.loads(line)["prompt"] for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    tokenizer = embedded.train_new_from_iterator([*texts, *(json.dumps(tool.schema) for tool in TOOLS)], PIECES)
    if markers:
        added = [AddedToken(marker, special=True, normalized=False) for marker in MARKERS]
        tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


def tiny_pair(folder: Path, *, markers: bool) -> dict[str, Any]:
    """Saves a target, and a draft that is the target with noise on its weights. Returns their configuration."""
    tokenizer = tiny_tokenizer(markers=markers)
    for role, noise in (("target", 0.0), ("draft", 0.02)):
        model = tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=1)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator) * weight.std(correction=0), alpha=noise)
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    models = {role: {"model": str(folder / role), "compile": False} for role in ("target", "draft")}
    return {**models, "speculation": {"lookahead": 3, "governor": False, "forecast": {"budget": 3}}}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--pair", choices=["embedded", "tiny"], default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--formats", nargs="+", default=[way.name for way in WAYS], help="names of formats")
    parser.add_argument("--floor", type=float, default=0.5, help="least share of answers with a call, by format")
    parser.add_argument("--json", type=Path, default=Path("build/tool_calls.json"))
    options = parser.parse_args()
    done: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {"by_format": {}}
    overrides = [f"engine.max_batch={options.batch}", "engine.max_model_len=256"]
    left = [way for way in WAYS if way.name in options.formats and way.name not in done["by_format"]]
    for markers in (False, True):
        ways = [way for way in left if way.special is markers]
        if not ways or (markers and options.pair == "embedded"):
            continue
        config = "embedded" if options.pair == "embedded" else tiny_pair(Path(tempfile.mkdtemp()), markers=markers)
        async with AsyncEngine(config, overrides=overrides) as engine:
            ids = [engine.tokenize(prompt) for prompt in prompts(options.prompts)]
            for way in ways:
                began = time.perf_counter()
                told = await compare(
                    engine, ids, METHODS, ways=[way], max_tokens=options.max_tokens, at_once=options.batch
                )
                duration_s = round(time.perf_counter() - began, 1)
                done["by_format"][way.name] = {
                    **told[way.name],
                    "max_tokens": options.max_tokens,
                    "duration_s": duration_s,
                }
                print(f"{way.name}: {duration_s} s", file=sys.stderr, flush=True)
                write(options, done)
    print(table(done["by_format"]))
    sys.exit(not all(good(way, options.floor) for way in done["by_format"].values()))


def table(by_format: dict[str, Any]) -> str:
    """Returns the counts of each format as a Markdown table."""
    columns = ("answers", "with_calls", "calls", "reasoning", "cut", "tokens", "replays")
    lines = [f"| format | {' | '.join(columns)} | different |", "|---|" + "---:|" * (len(columns) + 1)]
    for name, way in by_format.items():
        tallies = tallies_of(way)
        counts = [sum(tally[column] for tally in tallies) for column in columns]
        different = sum(len(tally["different"]) for tally in tallies)
        lines.append(f"| {name} | {' | '.join(map(str, [*counts, different]))} |")
    return "\n".join(lines)


def tallies_of(way: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the counts of a format, one for each temperature."""
    return [tally for key, tally in way.items() if key.startswith("T=")]


def good(way: dict[str, Any], floor: float) -> bool:
    """Whether everything of a format is identical, and enough answers hold a call."""
    tallies = tallies_of(way)
    share = sum(tally["with_calls"] for tally in tallies) / sum(tally["answers"] for tally in tallies)
    return share >= floor and not any(tally["different"] for tally in tallies)


def write(options: argparse.Namespace, done: dict[str, Any]) -> None:
    result = {
        "pair": options.pair,
        "prompts": options.prompts,
        "floor": options.floor,
        "methods": METHODS,
        "tokens_at_once": [*SIZES],
        "by_format": {way.name: done["by_format"][way.name] for way in WAYS if way.name in done["by_format"]},
        "versions": versions(),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main())
