"""Many clients with every feature at once, and beside them requests that are heavy to prepare.

    python benchmarks/serving/soak.py --pair embedded --minutes 10 --json soak.json

64 clients send one request after another: chat and completions, streamed and whole, with log-probabilities, structured
output, several choices, stop strings and lists of prompts. Calm and heavy phases take turns: in the heavy ones, four
fifths of the time, one more client sends prompts of a megabyte, large enums, deep schemas and heavy regular
expressions. The run is good if

* no request of the 64 fails, and the heavy ones are answered with 200 or 400;
* the server's event loop was never kept busy for more than 100 ms (``ssd:event_loop_stall_seconds``, which leaves out
  the time in which other processes had the cores);
* memory is flat: from the end of the second heavy phase to the end of the last one, and so between the calm ones, no
  process grows by more than ``--growth-mib``. The first phases fill caches and the allocator's pools.

Times between chunks and of ``/health`` are reported for the calm and the heavy phase. They contain the models' work
and, where clients, server and workers share few cores, waiting for a core.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
from pairs import options, report, uncompiled
from server import Server

MAX_STALL_S = 0.1
PROBE_S = 0.05
CALM_SHARE = 0.2
"""Of each cycle of a calm and a heavy phase."""
CYCLES = 4
HEAVY_PAUSE_S = 0.5
STALLS = "ssd:event_loop_stall_seconds"
SETTINGS = ["server.model_name=soaked", "server.chat_template=embedded/chat_template.jinja"]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def schema_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


LIGHT: dict[str, Callable[[int], tuple[str, dict[str, Any]]]] = {
    "completion": lambda n: (COMPLETIONS, {"prompt": f"def f{n}(x):"}),
    "chat": lambda n: (CHAT, {"messages": [{"role": "user", "content": f"hello {n}"}]}),
    "logprobs": lambda n: (COMPLETIONS, {"prompt": f"x{n} = ", "logprobs": 3}),
    "chat logprobs": lambda n: (
        CHAT,
        {"messages": [{"role": "user", "content": f"{n}"}], "logprobs": True, "top_logprobs": 2},
    ),
    "choice": lambda n: (COMPLETIONS, {"prompt": "x", "structured_outputs": {"choice": ["ab", "cd", f"e{n % 7}"]}}),
    "regex": lambda n: (COMPLETIONS, {"prompt": "x", "structured_outputs": {"regex": "[a-d]{3,9}"}}),
    "schema": lambda n: (COMPLETIONS, {"prompt": "x", **schema_of({"type": "array", "items": {"enum": [1, 2]}})}),
    "choices": lambda n: (COMPLETIONS, {"prompt": f"y{n}", "n": 3}),
    "stop": lambda n: (COMPLETIONS, {"prompt": f"z{n}", "stop": ["e", "\n", "qqqq"]}),
    "prompts": lambda n: (COMPLETIONS, {"prompt": [f"a{n}", f"b{n}", "c"]}),
    "plain": lambda n: (COMPLETIONS, {"prompt": f"k{n}", "method": "none"}),
}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema, "b": {"type": "integer"}}, "required": ["a"]}
    return schema


def heavy_requests(model: str) -> dict[str, tuple[str, bytes]]:
    """Returns paths and bodies by name."""
    chance = random.Random(1)
    words = " ".join(f"w{chance.randrange(10**6)}" for _ in range(160_000))[:950_000]
    names = [f"name-{number:05}" for number in range(5000)]
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "prompt of 1 MB": (COMPLETIONS, {"prompt": words}),
        "chat of 1 MB": (CHAT, {"messages": [{"role": "user", "content": words}]}),
        "20,000 messages": (CHAT, {"messages": [{"role": "user", "content": "hi"}] * 20_000}),
        "300,000 ids": (COMPLETIONS, {"prompt": [7] * 300_000}),
        "120 prompts": (COMPLETIONS, {"prompt": [words[7000 * i : 7000 * (i + 1)] for i in range(120)]}),
        "enum of 5,000": (COMPLETIONS, {"prompt": "x", **schema_of({"enum": names})}),
        "choice of 5,000": (COMPLETIONS, {"prompt": "x", "structured_outputs": {"choice": names}}),
        "40 levels": (COMPLETIONS, {"prompt": "x", **schema_of(deep(40))}),
        "regex": (COMPLETIONS, {"prompt": "x", "structured_outputs": {"regex": "([a-z]{1,50}[0-9]{1,50}){1,50}"}}),
        "4,000 bad words": (COMPLETIONS, {"prompt": "x", "bad_words": [f"w{i}" for i in range(4000)]}),
    }
    common = {"model": model, "max_tokens": 4}
    return {name: (path, json.dumps({**common, **body}).encode()) for name, (path, body) in asked.items()}


@dataclass(kw_only=True, slots=True)
class Seen:
    """Measurements of a phase. Times are in seconds."""

    gaps_s: list[float] = field(default_factory=list)
    """Between two chunks of a stream."""
    health_s: list[float] = field(default_factory=list)
    stalls: Counter[float] = field(default_factory=Counter)
    """Looks at the event loop, by the upper bound of the stall they saw."""

    def summary(self) -> dict[str, Any]:
        return {
            "chunk_gaps_ms": _spread(self.gaps_s),
            "health_ms": _spread(self.health_s),
            "loop_stalls": {f"<= {bound:g} s": count for bound, count in sorted(self.stalls.items()) if count},
        }


class Soak:
    """The clients of one run.

    Args:
        minutes: of the whole run, which has ``CYCLES`` calm and as many heavy phases.
    """

    def __init__(self, server: Server, model: str, *, clients: int, minutes: float):
        self._server, self._model, self._clients = server, model, clients
        self._began_s = time.monotonic()
        self._cycle_s = 60 * minutes / CYCLES
        self._end_s = self._began_s + 60 * minutes
        self.phases = {"calm": Seen(), "heavy": Seen()}
        self.errors: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.memory: list[tuple[tuple[int, str], dict[str, float]]] = []
        """Resident MiB by process, with the number and kind of the phase."""

    @property
    def _at(self) -> tuple[int, str]:
        """Number of the cycle, and kind of the phase."""
        cycle, within_s = divmod(time.monotonic() - self._began_s, self._cycle_s)
        return min(int(cycle), CYCLES - 1), "calm" if within_s < CALM_SHARE * self._cycle_s else "heavy"

    @property
    def _phase(self) -> Seen:
        return self.phases[self._at[1]]

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=self._clients + 8, max_keepalive_connections=self._clients + 8)
        async with httpx.AsyncClient(base_url=self._server.url, timeout=600.0, limits=limits) as client:
            numbers = itertools.count()
            jobs = [self._client(client, numbers) for _ in range(self._clients)]
            others = (self._heavy(client), self._probe(client), self._weigh(), self._count_stalls())
            beside = [asyncio.ensure_future(job) for job in others]
            await asyncio.gather(*jobs)
            await asyncio.gather(*beside)

    async def _count_stalls(self) -> None:
        before = await asyncio.to_thread(self._stalls)
        for cycle in range(CYCLES):
            for kind, share in (("calm", CALM_SHARE), ("heavy", 1.0)):
                await asyncio.sleep(max(0.0, self._began_s + (cycle + share) * self._cycle_s - time.monotonic()))
                after = await asyncio.to_thread(self._stalls)
                self.phases[kind].stalls += after - before
                before = after

    async def _client(self, client: httpx.AsyncClient, numbers: Iterator[int]) -> None:
        while time.monotonic() < self._end_s:
            n = next(numbers)
            name = list(LIGHT)[n % len(LIGHT)]
            path, asked = LIGHT[name](n)
            body = {"model": self._model, "max_tokens": 8 + n % 24, "seed": n, "temperature": 0.7 * (n % 2), **asked}
            try:
                if n % 3:
                    await self._stream(client, path, body)
                else:
                    response = await client.post(path, json=body)
                    if response.status_code != 200:
                        raise ValueError(f"{response.status_code}: {response.text[:200]}")
                self.answered[name] += 1
            except (httpx.HTTPError, ValueError) as error:
                self.errors[f"{name}: {type(error).__name__}: {str(error)[:300]}"] += 1

    async def _stream(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
        last_s, lines = None, 0
        async with client.stream("POST", path, json={**body, "stream": True}) as response:
            if response.status_code != 200:
                raise ValueError(f"{response.status_code}: {(await response.aread()).decode()[:200]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line.startswith('data: {"error"'):
                    raise ValueError(line)
                now_s, lines = time.perf_counter(), lines + 1
                if last_s is not None:
                    self._phase.gaps_s.append(now_s - last_s)
                last_s = now_s
                if line == "data: [DONE]":
                    return
        raise ValueError(f"the stream ended after {lines} lines without [DONE]")

    async def _heavy(self, client: httpx.AsyncClient) -> None:
        for name, (path, body) in itertools.cycle(heavy_requests(self._model).items()):
            while self._at[1] == "calm" and time.monotonic() < self._end_s:
                await asyncio.sleep(PROBE_S)
            if time.monotonic() > self._end_s:
                return
            try:
                answer = await client.post(path, content=body, headers={"content-type": "application/json"})
                self.statuses[f"{name}: {answer.status_code}"] += 1
                if answer.status_code not in (200, 400):
                    self.errors[f"{name}: {answer.status_code}: {answer.text[:200]}"] += 1
            except httpx.HTTPError as error:
                self.errors[f"{name}: {type(error).__name__}: {error}"] += 1
            await asyncio.sleep(HEAVY_PAUSE_S)

    async def _probe(self, client: httpx.AsyncClient) -> None:
        while time.monotonic() < self._end_s:
            began_s = time.perf_counter()
            await client.get("/health")
            self._phase.health_s.append(time.perf_counter() - began_s)
            await asyncio.sleep(PROBE_S)

    async def _weigh(self) -> None:
        while time.monotonic() < self._end_s:
            weights = {name: p.memory_info().rss / 2**20 for name, p in self._server.processes().items()}
            self.memory.append((self._at, weights))
            await asyncio.sleep(self._cycle_s / 40)

    def _stalls(self) -> Counter[float]:
        """Returns the looks at the event loop so far, by the upper bound of their bucket."""
        found: Counter[float] = Counter()
        below = 0
        for line in self._server.get("/metrics").splitlines():
            if line.startswith(f'{STALLS}_bucket{{le="'):
                bound, _, count = line.partition('le="')[2].partition('"} ')
                found[float(bound)] = int(float(count)) - below
                below = int(float(count))
        return found

    @property
    def stalls(self) -> int:
        """Stalls of the event loop above ``MAX_STALL_S`` while there were heavy requests."""
        return sum(count for bound, count in self.phases["heavy"].stalls.items() if bound > MAX_STALL_S)

    def levels_mib(self) -> dict[str, dict[str, list[float]]]:
        """Returns the mean memory of the second half of each phase, by process and kind of phase."""
        levels: dict[str, dict[str, list[float]]] = {}
        for at, samples in itertools.groupby(self.memory, key=lambda one: one[0]):
            late = [weights for _, weights in samples]
            late = late[len(late) // 2 :]
            for name in late[0]:
                level = round(statistics.fmean(weights[name] for weights in late), 1)
                levels.setdefault(name, {"calm": [], "heavy": []})[at[1]].append(level)
        return levels


def growth_mib(levels: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Returns by how much each process grew after the second phase of each kind: the larger of the two."""
    return {name: round(max(kind[-1] - kind[1] for kind in kinds.values()), 1) for name, kinds in levels.items()}


def _spread(values: list[float]) -> dict[str, float]:
    """Returns percentiles and the maximum in ms of values in seconds."""
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    spread = {"p50": cuts[49], "p99": cuts[98], "max": max(values)}
    return {name: round(1e3 * value, 1) for name, value in spread.items()}


def main() -> None:
    parser = options(__doc__, batch=8)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--growth-mib", type=float, default=32.0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ssd-soak-") as folder:
        config = uncompiled(chosen.pair, Path(folder), chosen.batch)
        with Server(str(config), SETTINGS) as server:
            soak = Soak(server, "soaked", clients=chosen.clients, minutes=chosen.minutes)
            asyncio.run(soak.run())
    levels = soak.levels_mib()
    growth = growth_mib(levels)
    result = {
        "pair": chosen.pair,
        "minutes": chosen.minutes,
        "clients": chosen.clients,
        "answered": dict(sorted(soak.answered.items())),
        "heavy": dict(sorted(soak.statuses.items())),
        "errors": dict(soak.errors.most_common(20)),
        "stalls_above_100_ms": soak.stalls,
        "growth_mib": growth,
        "resident_mib": levels,
        "phases": {name: phase.summary() for name, phase in soak.phases.items()},
    }
    report(result, chosen.json, good=not soak.errors and not soak.stalls and max(growth.values()) <= chosen.growth_mib)


if __name__ == "__main__":
    main()
