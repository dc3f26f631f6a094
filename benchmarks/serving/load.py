"""Measures ``ssd serve`` under load through its public API, like ``vllm bench serve``.

At each concurrency, that many clients stream one completion after another until all requests are done. Methods take
turns within each repetition, so that changes in the machine's speed affect all of them.

    python benchmarks/serving/load.py --json out.json --table out.md

TTFT: time from sending to the first text. TPOT: time after the first text, divided by the tokens after the first.
ITL: time between two chunks with text (a round yields several tokens at once, so this is the time of a round).
Throughput: output tokens of all clients per second of wall time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import platform
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
from server import ROOT, Server

PROMPTS = ROOT / "benchmarks" / "prompts" / "heldout-code.jsonl"


@dataclass(kw_only=True, slots=True)
class Answer:
    """Measurements of one request. Times are in seconds."""

    sent_s: float
    first_s: float | None = None
    last_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Streams one completion."""
    answer = Answer(sent_s=time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.error = f"{response.status_code}: {(await response.aread()).decode()[:200]}"
                return answer
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    answer.error = chunk["error"]["message"]
                    return answer
                now = time.perf_counter()
                if chunk.get("usage"):
                    answer.tokens = chunk["usage"]["completion_tokens"]
                if any(choice["text"] for choice in chunk["choices"]):
                    if answer.first_s is None:
                        answer.first_s = now
                    else:
                        answer.gaps_s.append(now - answer.last_s)
                    answer.last_s = now
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
    if answer.error is None and not answer.tokens:
        answer.error = "no usage at the end of the stream"
    return answer


async def load(url: str, bodies: list[dict[str, Any]], concurrency: int) -> tuple[list[Answer], float]:
    """Sends all bodies, ``concurrency`` at a time. Returns the answers and the seconds it took."""
    left, answers = deque(bodies), list[Answer]()
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600.0, limits=limits) as client:

        async def one() -> None:
            while left:
                answers.append(await ask(client, left.popleft()))

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(concurrency)))
        return answers, time.perf_counter() - began


def spread(values: list[float]) -> dict[str, float] | None:
    """Returns mean and percentiles in ms of values in seconds."""
    if len(values) < 2:
        return {"mean": values[0] * 1e3, **dict.fromkeys(("p50", "p95", "p99"), values[0] * 1e3)} if values else None
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    at = {"mean": statistics.fmean(values), "p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}
    return {name: round(value * 1e3, 3) for name, value in at.items()}


def summary(runs: list[tuple[list[Answer], float]]) -> dict[str, Any]:
    answers = [answer for run, _ in runs for answer in run]
    good = [answer for answer in answers if answer.error is None]
    wall_s = sum(seconds for _, seconds in runs)
    tpot = [(a.last_s - a.first_s) / (a.tokens - 1) for a in good if a.first_s is not None and a.tokens > 1]
    return {
        "requests": len(answers),
        "errors": len(answers) - len(good),
        "first_error": next((answer.error for answer in answers if answer.error), None),
        "output_tokens": sum(answer.tokens for answer in good),
        "tokens_per_s": round(sum(answer.tokens for answer in good) / wall_s, 2),
        "tokens_per_s_of_runs": [round(sum(a.tokens for a in run) / seconds, 2) for run, seconds in runs],
        "requests_per_s": round(len(good) / wall_s, 3),
        "ttft_ms": spread([a.first_s - a.sent_s for a in good if a.first_s is not None]),
        "tpot_ms": spread(tpot),
        "itl_ms": spread([gap for a in good for gap in a.gaps_s]),
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| method | concurrency | tok/s | × none | TTFT p50 / p95 / p99 ms | TPOT p50 / p95 / p99 ms "
        "| ITL p50 / p95 / p99 ms | errors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = {r["concurrency"]: r["tokens_per_s"] for r in results if r["method"] == "none"}

    def cell(times: dict[str, float] | None) -> str:
        return "–" if times is None else " / ".join(f"{times[name]:.1f}" for name in ("p50", "p95", "p99"))

    for r in results:
        base = plain.get(r["concurrency"])
        times = " | ".join(cell(r[name]) for name in ("ttft_ms", "tpot_ms", "itl_ms"))
        ratio = f"{r['tokens_per_s'] / base:.2f}" if base else "–"
        lines.append(
            f"| {r['method']} | {r['concurrency']} | {r['tokens_per_s']:.1f} | {ratio} | {times} | {r['errors']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; by default one is started")
    parser.add_argument("--config", default="embedded")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--batch", type=int, default=16, help="engine.max_batch of the server that is started")
    parser.add_argument("--methods", default="none,sd,ssd")
    parser.add_argument("--concurrency", default="1,4,16,64")
    parser.add_argument("--requests", type=int, default=16, help="per concurrency up to it, in each repetition")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    texts = [json.loads(line)["prompt"] for line in given.prompts.read_text().splitlines() if line.strip()]
    methods, levels = given.methods.split(","), [int(level) for level in given.concurrency.split(",")]

    def bodies(method: str, count: int, repeat: int) -> list[dict[str, Any]]:
        return [
            {
                "model": model,
                "prompt": texts[(repeat * count + i) % len(texts)],
                "max_tokens": given.max_tokens,
                "temperature": given.temperature,
                "seed": repeat * count + i,
                "ignore_eos": True,
                "method": method,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            for i in range(count)
        ]

    with contextlib.ExitStack() as stack:
        url = given.url
        if url is None:
            overrides = [f"engine.max_batch={given.batch}", *given.overrides]
            url = stack.enter_context(Server(given.config, overrides)).url
        model = httpx.get(url + "/v1/models", timeout=60).json()["data"][0]["id"]
        for method in methods:  # warms everything up for every method
            asyncio.run(load(url, bodies(method, 2, 0), 2))
        runs: dict[tuple[str, int], list[tuple[list[Answer], float]]] = {}
        for repeat in range(given.repeats):
            for level in levels:
                count = max(given.requests, 2 * level)
                for method in methods if repeat % 2 == 0 else reversed(methods):
                    runs.setdefault((method, level), []).append(
                        asyncio.run(load(url, bodies(method, count, repeat), level))
                    )
    results = [
        {"method": method, "concurrency": level, **summary(runs[method, level])}
        for level in levels
        for method in methods
    ]
    about = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    host = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load": Path("/proc/loadavg").read_text(),
    }
    given.json.write_text(json.dumps({"asked": about, "host": host, "results": results}, indent=1) + "\n")
    text = table(results)
    if given.table is not None:
        given.table.write_text(text)
    print(text, end="")
    slowest, fastest = (
        next((r for r in results if r["concurrency"] == level and r["method"] == methods[-1]), None)
        for level in (1, 16)
    )
    if slowest and fastest and slowest["tokens_per_s"]:
        print(f"{methods[-1]}: concurrency 16 over 1: {fastest['tokens_per_s'] / slowest['tokens_per_s']:.2f}×")
    for error in (r["first_error"] for r in results if r["errors"]):
        raise SystemExit(f"some requests failed, the first: {error}")


if __name__ == "__main__":
    main()
