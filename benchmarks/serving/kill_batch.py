"""Checks that a batch run killed (SIGKILL) at random moments and resumed gives the results of an uninterrupted run.

    python benchmarks/serving/kill_batch.py --lines 10000 --kills 5 --json out.json

Each kill comes a random fraction of a second after a random number of results; some kills take the workers too.
Every id must be in the output once, with the text, finish reason and token counts of the uninterrupted run.
Timing and speculation may differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from pairs import options, report, uncompiled
from server import ROOT


def write_requests(path: Path, lines: int) -> None:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    with path.open("w") as file:
        for n in range(lines):
            request = {"id": f"r{n}", "prompt": f"{words[n % 10]} {n % 97}", "max_tokens": 2 + n % 4}
            file.write(json.dumps({**request, "temperature": 0.8 if n % 2 else 0.0}) + "\n")


def start(config: Path, source: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ssd.cli", "batch", "--config", str(config), str(source), str(out)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)


def done(out: Path) -> int:
    """Returns the number of results on disk."""
    return sum(shard.read_bytes().count(b"\n") for shard in out.with_name(out.name + ".parts").glob("shard-*.jsonl"))


def results(out: Path) -> list[dict[str, Any]]:
    """Returns what must not depend on kills, in order."""
    records = [json.loads(line) for line in out.read_text().splitlines()]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    return [
        {**{name: r[name] for name in ("id", "text", "finish_reason")}, **{name: r["usage"][name] for name in counts}}
        for r in records
    ]


def kill_at(process: subprocess.Popen[bytes], out: Path, lines: int, rng: random.Random) -> dict[str, Any]:
    """Waits for ``lines`` results and up to a second longer, then kills. Raises: RuntimeError: the run ended first."""
    while done(out) < lines:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before {lines} results were there")
        time.sleep(0.05)
    time.sleep(rng.random())
    workers = psutil.Process(process.pid).children(recursive=True)
    with_workers = rng.random() < 0.5
    process.send_signal(signal.SIGKILL)
    if with_workers:
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
    process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=120)
    return {
        "asked_at": lines,
        "workers_killed": with_workers,
        "on_disk": done(out),
        "workers_left": len(alive),
        "workers": len(gone) + len(alive),
    }


def check(lines: int, kills: int, config: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Makes both runs and compares them. ``equal``, ``complete`` and ``unique`` must be true."""
    rng = random.Random(seed)
    source, whole, killed = (folder / name for name in ("in.jsonl", "whole.jsonl", "killed.jsonl"))
    write_requests(source, lines)
    began = time.monotonic()
    if start(config, source, whole).wait():
        raise RuntimeError("the uninterrupted run failed")
    unkilled_s = time.monotonic() - began
    moments = sorted(rng.sample(range(lines // 50, lines * 9 // 10), kills))
    log = [kill_at(start(config, source, killed), killed, moment, rng) for moment in moments]
    resumed = done(killed)
    if start(config, source, killed).wait():
        raise RuntimeError("the resumed run failed")
    expected, got = results(whole), results(killed)
    ids = [r["id"] for r in got]
    return {
        "lines": lines,
        "kills": log,
        "results_before_last_run": resumed,
        "complete": sorted(ids) == sorted(f"r{n}" for n in range(lines)),
        "unique": len(set(ids)) == len(ids),
        "equal": expected == got,
        "unkilled_s": round(unkilled_s, 1),
        "left_behind": sorted(p.name for p in folder.iterdir() if p.name.endswith((".parts", ".errors"))),
    }


def main() -> None:
    parser = options(__doc__, batch=16)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ssd-kill-") as name:
        folder = Path(name)
        config = uncompiled(given.pair, folder, given.batch)
        result = {
            "pair": given.pair,
            "batch": given.batch,
            **check(given.lines, given.kills, config, folder, given.seed),
        }
    report(result, given.json, good=result["complete"] and result["unique"] and result["equal"])


if __name__ == "__main__":
    main()
