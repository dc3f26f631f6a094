"""Measures the server's overhead per token: ``ssd serve`` at concurrency 1 against ``LLM`` in this process.

Both decode the same prompts with the same parameters in turn. Both pipelines are up all the time, and the idle one
sleeps. Rates are tokens per second over whole requests, prompt included.

    python benchmarks/serving/overhead.py --json out.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

from load import PROMPTS, load
from server import Server

from ssd import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="embedded")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--methods", default="none,ssd")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    lines = PROMPTS.read_text().splitlines()[: given.prompts]
    texts = [json.loads(line)["prompt"] for line in lines]

    def served(text: str, method: str) -> float:
        """Returns the seconds a request takes."""
        body: dict[str, Any] = {
            "model": model,
            "prompt": text,
            "max_tokens": given.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "method": method,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        [answer], seconds = asyncio.run(load(server.url, [body], 1))
        if answer.error or answer.tokens != given.max_tokens:
            raise SystemExit(f"the server failed: {answer.error or answer.tokens}")
        return seconds

    def inside(text: str, method: str) -> float:
        params = SamplingParams(max_tokens=given.max_tokens, ignore_eos=True, method=method)  # type: ignore[arg-type]
        began = time.perf_counter()
        llm.generate([text], params)
        return time.perf_counter() - began

    results = []
    with Server(given.config, given.overrides) as server, LLM(given.config, overrides=given.overrides) as llm:
        model = json.loads(server.get("/v1/models"))["data"][0]["id"]
        for method in given.methods.split(","):
            spent: dict[str, list[float]] = {"server": [], "llm": []}
            for repeat in range(given.repeats + 1):
                for text in texts:
                    ways = [("server", served), ("llm", inside)]
                    for name, way in ways if repeat % 2 else reversed(ways):
                        seconds = way(text, method)
                        if repeat:  # the first repetition warms both up
                            spent[name].append(seconds)
            # The two of a pair ran one after the other, so changes in the machine's speed affect both.
            ratios = [s / i for s, i in zip(spent["server"], spent["llm"], strict=True)]
            rates = {name: round(given.max_tokens * len(seconds) / sum(seconds), 2) for name, seconds in spent.items()}
            result = {
                "method": method,
                "tokens_per_s": rates,
                "overhead_median": round(statistics.median(ratios) - 1, 4),
                "overhead_of_totals": round(rates["llm"] / rates["server"] - 1, 4),
                "requests": len(ratios),
            }
            results.append(result)
            print(json.dumps(result))
    about = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    given.json.write_text(json.dumps({"asked": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
