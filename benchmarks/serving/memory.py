"""Measures memory over thousands of requests, and checks that a stopped server leaves nothing behind.

    python benchmarks/serving/memory.py --requests 2000 --json out.json

Streams of every method go through the public API, and some clients disconnect early. The resident memory of the
front and its workers is sampled throughout. It is flat if no process grows by more than ``--growth-mib`` between
the first quarter and the end. Then the server gets SIGTERM, and a second server gets SIGINT (Ctrl-C) in the middle
of streams. No process, listening socket, or file in /dev/shm or in the server's folder may be left.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import psutil
from load import ask
from pairs import options, report, uncompiled
from server import Server

SHARED = Path("/dev/shm")


def body(model: str, n: int) -> dict[str, Any]:
    prompt = f"request {n % 211} " * (1 + n % 5)
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": 4 + n % 13,
        "temperature": 0.7 * (n % 3),
        "seed": n,
        "method": ("ssd", "none", "sd", "ssd")[n % 4],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def broken_off(client: httpx.AsyncClient, wanted: dict[str, Any]) -> None:
    """A client that disconnects after the first line."""
    async with client.stream("POST", "/v1/completions", json={**wanted, "max_tokens": 60}) as response:
        async for _ in response.aiter_lines():
            return


async def traffic(server: Server, model: str, first: int, count: int, clients: int) -> int:
    """Sends requests ``first`` to ``first + count - 1``. Returns the number of errors."""
    numbers, errors = iter(range(first, first + count)), 0
    async with httpx.AsyncClient(base_url=server.url, timeout=600.0) as client:

        async def one() -> None:
            nonlocal errors
            for n in numbers:
                if n % 10 == 9:
                    await broken_off(client, body(model, n))
                else:
                    errors += (await ask(client, body(model, n))).error is not None

        await asyncio.gather(*(one() for _ in range(clients)))
    return errors


def resident(server: Server) -> dict[str, float]:
    """Returns the resident memory of each process in MiB."""
    return {name: round(p.memory_info().rss / 2**20, 2) for name, p in server.processes().items()}


def left_behind(server: Server, shared_before: set[str], processes: list[psutil.Process], stop: signal.Signals) -> Any:
    """Sends a signal. Returns what remains of the server."""
    port = urlsplit(server.url).port
    code = server.stop(stop)
    _, alive = psutil.wait_procs(processes, timeout=60)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))  # raises if anybody still listens
    ours = [p.pid for p in psutil.process_iter(["environ"]) if _of(p, server.folder.name)]
    return {
        "signal": stop.name,
        "exit_code": code,
        "processes": [*[p.pid for p in alive], *ours],
        "shared_memory": sorted({p.name for p in SHARED.iterdir()} - shared_before),
        "files": sorted(p.name for p in Path(server.folder.name).iterdir() if p.name != "log"),
    }


def _of(process: psutil.Process, folder: str) -> bool:
    try:
        return process.environ().get("TMPDIR") == folder
    except psutil.Error:
        return False


def main() -> None:
    parser = options(__doc__, batch=8)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--growth-mib", type=float, default=16.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ssd-memory-") as name:
        config = str(uncompiled(given.pair, Path(name), given.batch))
        shared, left, samples, errors = {p.name for p in SHARED.iterdir()}, [], [], 0
        with Server(config, []) as server:
            model = json.loads(server.get("/v1/models"))["data"][0]["id"]
            step = max(1, given.requests // 20)
            for first in range(0, given.requests, step):
                errors += asyncio.run(traffic(server, model, first, step, given.clients))
                samples.append({"requests": first + step, **resident(server)})
            left.append(left_behind(server, shared, list(server.processes().values()), signal.SIGTERM))
        with Server(config, []) as server:
            processes = list(server.processes().values())

            async def interrupted() -> Any:
                async with httpx.AsyncClient(base_url=server.url, timeout=120.0) as client:
                    streams = [
                        asyncio.create_task(ask(client, {**body(model, n), "max_tokens": 60}))
                        for n in range(given.clients)
                    ]
                    await asyncio.sleep(0.5)
                    found = await asyncio.to_thread(left_behind, server, shared, processes, signal.SIGINT)
                    await asyncio.gather(*streams)
                    return found

            left.append(asyncio.run(interrupted()))
    early = samples[len(samples) // 4]
    growth = {name: round(samples[-1][name] - early[name], 2) for name in early if name != "requests"}
    result = {
        "pair": given.pair,
        "requests": given.requests,
        "errors": errors,
        "growth_mib_after_first_quarter": growth,
        "flat": max(growth.values()) <= given.growth_mib,
        "left_behind": left,
        "clean": not any(found["processes"] or found["shared_memory"] or found["files"] for found in left),
        "resident_mib": samples,
    }
    report(result, given.json, good=not errors and result["flat"] and result["clean"])


if __name__ == "__main__":
    main()
