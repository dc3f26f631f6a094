"""Random kills while answers stream: of the draft, of a client, of the front and of a rank of the verifier.

    python benchmarks/serving/kills.py --kills 100 --seed 1 --json kills.json

Tiny models, real processes, SIGKILL. After every kill the tokens are those of an undisturbed run, or there is one clear
error where no answer is possible any more (a killed rank or front). In the end no process and no socket
folder is left. The script exits with 1 and says what is wrong otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from server import Server

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ssd import LLM, Client, SamplingParams, WorkerError
from ssd.testing.models.tiny import save_tiny, tiny_tokenizer

PROMPT = list(range(20, 60))
COUNT = 300
LONG = SamplingParams(max_tokens=COUNT, ignore_eos=True, temperature=0.8, seed=3)
SOON_S, RESTART_S = 20.0, 120.0
IN_A_ROW = 5
"""Kills of one engine's drafts: each restart waits twice as long as the one before."""
SHARES = {"draft": 0.4, "client": 0.4, "front": 0.12, "rank": 0.08}
CLIENT = """
import json, sys
from ssd import Client, SamplingParams
order = json.loads(sys.argv[1])
with Client(order["lane"]) as client:
    for event in client.stream(order["prompt"], SamplingParams(**order["params"])):
        print(len(event.token_ids), flush=True)
"""
FRONT = """
import json, sys
from ssd import LLM, SamplingParams
order = json.loads(sys.argv[1])
with LLM(order["config"]) as llm:
    print(json.dumps([pid for pid in llm._pipeline.pids.values()]), flush=True)
    for event in llm.stream(order["prompt"], SamplingParams(**order["params"])):
        print(len(event.token_ids), flush=True)
"""


class Wrong(Exception):
    """What a kill broke."""


def check(right: bool, what: str) -> None:
    if not right:
        raise Wrong(what)


def models(folder: Path) -> dict[str, Any]:
    """A configuration over a tiny pair in ``folder``."""
    sections = {}
    for number, role in enumerate(("target", "draft")):
        place = folder / role
        save_tiny(place, "llama", seed=number, vocab_size=128)
        tiny_tokenizer(128).save_pretrained(place)
        sections[role] = {"model": str(place), "compile": False, "cores": [number]}
    return {
        **sections,
        "speculation": {"lookahead": 3, "siblings": 1, "governor": False, "forecast": {"budget": 10}},
        "engine": {
            "max_batch": 2,
            "max_model_len": 480,
            "draft_restarts": 100,
            "draft_restart_delay_s": 0.05,
            "link_timeout_s": 5.0,
            "start_timeout_s": RESTART_S,
        },
    }


def gone(pids: list[int]) -> bool:
    """Whether these processes end within ``SOON_S``."""
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], SOON_S)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def drafts(config: dict[str, Any], count: int, draw: random.Random) -> Iterator[str]:
    for first in range(0, count, IN_A_ROW):
        yield from some_drafts(config, min(IN_A_ROW, count - first), draw)


def some_drafts(config: dict[str, Any], count: int, draw: random.Random) -> Iterator[str]:
    with LLM(config) as llm:
        plain = llm.generate([PROMPT], LONG_PLAIN)[0].token_ids
        for _ in range(count):
            at, got, killed = draw.randrange(COUNT), [], llm._pipeline.pids["draft"]  # type: ignore[union-attr]
            for event in llm.stream(PROMPT, LONG):
                if len(got) <= at < len(got) + len(event.token_ids):
                    os.kill(killed, signal.SIGKILL)
                got += event.token_ids
            check(tuple(got) == plain, f"tokens changed after the draft was killed at token {at}")
            deadline = time.monotonic() + RESTART_S
            while llm.degraded or llm._pipeline.pids.get("draft") == killed:  # type: ignore[union-attr]
                check(time.monotonic() < deadline, f"the draft did not come back: {llm.degraded}")
                llm.generate([PROMPT], LONG_PLAIN)
            yield "tokens unchanged, draft back"
        pids = list(llm._pipeline.pids.values())  # type: ignore[union-attr]
    check(gone(pids), "workers are left")


LONG_PLAIN = SamplingParams(max_tokens=COUNT, ignore_eos=True, temperature=0.8, seed=3, method="none")
PARAMS = {"max_tokens": COUNT, "ignore_eos": True, "temperature": 0.8, "seed": 3}


@contextmanager
def started(program: str, order: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", program, json.dumps(order)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], at: int) -> None:
    """Read token counts until ``at`` tokens have come."""
    assert process.stdout is not None
    count = 0
    while count <= at and (line := process.stdout.readline()):
        count += int(line)


def clients(config: dict[str, Any], count: int, draw: random.Random) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ssd-kills-") as folder:
        lane = f"ipc://{folder}/lane"
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump({**config, "server": {"lane": lane}}))
        with Server(str(path), [], start_s=RESTART_S) as server, Client(lane) as other:
            plain = other.generate([PROMPT], LONG_PLAIN)[0].token_ids
            for _ in range(count):
                with started(CLIENT, {"lane": lane, "prompt": PROMPT, "params": PARAMS}) as process:
                    read_until(process, draw.randrange(COUNT - 20))
                    process.send_signal(signal.SIGKILL)
                # Two at once: the slot of the killed client is free again.
                found = other.generate([PROMPT] * 2, LONG)
                check(all(one.token_ids == plain for one in found), "another client's tokens changed")
                check(json.loads(server.get("/health"))["status"] == "ok", "the server is not healthy")
                yield "other clients unaffected"
            pids = [process.pid for process in server.processes().values()]
        check(gone(pids), "server processes are left")


def fronts(config: dict[str, Any], count: int, draw: random.Random) -> Iterator[str]:
    for _ in range(count):
        with started(FRONT, {"config": config, "prompt": PROMPT, "params": PARAMS}) as process:
            assert process.stdout is not None
            pids = json.loads(process.stdout.readline())
            read_until(process, draw.randrange(COUNT - 20))
            process.send_signal(signal.SIGKILL)
            process.wait()
        check(gone(pids), "workers outlive their front")
        yield "workers left"


def ranks(config: dict[str, Any], count: int, draw: random.Random) -> Iterator[str]:
    config = {**config, "target": {**config["target"], "tensor_parallel": 2}}
    for _ in range(count):
        with LLM(config) as llm:
            pids, at, got = llm._pipeline.pids, draw.randrange(COUNT - 20), 0  # type: ignore[union-attr]
            began = time.monotonic()
            try:
                for event in llm.stream(PROMPT, LONG):
                    if got <= at < got + len(event.token_ids):
                        began = time.monotonic()
                        os.kill(pids["verifier-1"], signal.SIGKILL)
                    got += len(event.token_ids)
                check(False, "an answer without one of the verifier's ranks")
            except WorkerError as error:
                check("rank" in str(error) or "verifier-1" in str(error), f"not a clear error: {error}")
            check(time.monotonic() - began < SOON_S, "the error came late")
        check(gone(list(pids.values())), "workers are left")
        yield "a clear error"


VICTIMS: dict[str, Callable[[dict[str, Any], int, random.Random], Iterator[str]]] = {
    "draft": drafts,
    "client": clients,
    "front": fronts,
    "rank": ranks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts here")
    options = parser.parse_args()
    began, draw, outcomes = time.monotonic(), random.Random(options.seed), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="ssd-kills-", dir="/tmp") as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = str(Path(folder) / "tmp")
        Path(tempfile.tempdir).mkdir()
        config = models(Path(folder))
        try:
            for victim, share in SHARES.items():
                for outcome in VICTIMS[victim](config, max(1, round(share * options.kills)), draw):
                    outcomes[f"{victim}: {outcome}"] += 1
                    print(f"{sum(outcomes.values()):4} {victim}: {outcome}", flush=True)
            left = [path.name for path in Path(tempfile.tempdir).iterdir()]
            check(not left, f"folders are left: {left}")
            check(not psutil.Process().children(recursive=True), "processes are left")
        except Wrong as problem:
            sys.exit(f"after {sum(outcomes.values())} kills: {problem}")
    result = {
        "kills": sum(outcomes.values()),
        "seed": options.seed,
        "seconds": round(time.monotonic() - began),
        **outcomes,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
