"""Sends generated request bodies to a server: valid, broken and hostile ones, whole answers and streams.

    python benchmarks/serving/fuzz.py --count 100000 --json build/fuzz.json

Bodies are derived from the server's own models of request bodies. Every answer must be a success or a 4xx whose
body is an OpenAI error with a message of one line, and must come within ``--deadline-s``. After every
thousand bodies a fixed request must answer the same text as before the first one. Requests go to 127.0.0.1 only.

``--pair scripted`` (the default) serves from this process over a pipeline without models; ``tiny`` and
``embedded`` start ``ssd serve`` on real workers.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from fuzz_bodies import TEXT, Bodies, Case
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

AT_ONCE = 4
"""Bodies in flight at a time."""
KEPT = 20
"""Findings that are kept; more are only counted."""
ROUND = 1000
"""Bodies between two checks with the fixed request."""


@dataclass(kw_only=True, slots=True)
class Tally:
    """Counts of a run, and what was wrong."""

    statuses: Counter[str] = field(default_factory=Counter)
    """By HTTP status; streams that ended with an error event are ``200 error event``."""
    wrong: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)
    """The first ``KEPT`` wrong answers, with the bodies that reproduce them."""
    slowest_s: float = 0.0
    fixed_checks: int = 0


class Enough(BaseException):
    """Ends a run. Hypothesis would take an ``Exception`` for a finding and go on."""


# Asking and judging


def ask(address: tuple[str, int], case: Case, deadline_s: float) -> tuple[int, str]:
    """Returns status and body. Raises: OSError or HTTPException: no whole answer came within the deadline."""
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=deadline_s)) as connection:
        connection.request("POST", case.path, case.raw, {"content-type": case.kind} if case.kind else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def fault(status: int, text: str) -> tuple[str, str | None]:
    """Returns how an answer counts, and what is wrong with it if something is."""
    if status != 200:
        wrong = None if 400 <= status < 500 else f"status {status}"
        return str(status), wrong or error_fault(text)
    if not text.startswith("data: "):
        return "200", None if json.loads(text).get("choices") else "no choices"
    if not text.endswith("\n\n"):
        return "200 cut", "the stream is cut short"
    last = text[:-2].rpartition("\n\n")[2].removeprefix("data: ")
    if last == "[DONE]":
        return "200 stream", None
    return "200 error event", error_fault(last)


def error_fault(text: str) -> str | None:
    """Returns what is wrong with an error body, if something is."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return "not an OpenAI error"
    if set(error) != {"message", "type", "param", "code"} or not isinstance(error["message"], str):
        return "not an OpenAI error"
    if not error["message"] or "\n" in error["message"]:
        return "the message is not one line"
    return f"server error: {error['message']}" if error["type"] == "server_error" else None


class Fuzz:
    """One run against a server.

    Args:
        address: host and port.
        model: the served model's name.
        deadline_s: for every answer.
    """

    def __init__(self, address: tuple[str, int], model: str, *, deadline_s: float = 60.0):
        self.tally = Tally()
        self._address, self._deadline_s = address, deadline_s
        self._bodies = Bodies(model)
        fixed = {"model": model, "prompt": "def add(a, b):", "max_tokens": 12, "temperature": 0.8, "seed": 7}
        self._fixed = Case(path=TEXT, raw=json.dumps(fixed).encode())
        self._expected = self._fixed_text()

    def run(self, count: int, *, seconds: float, seed: int) -> Tally:
        """Sends up to ``count`` bodies within ``seconds``."""
        until = time.monotonic() + seconds
        sent = 0

        def round_of(cases: tuple[Case, ...]) -> None:
            nonlocal sent
            if sent >= count or time.monotonic() > until:
                raise Enough
            for case, (kind, wrong) in zip(cases, pool.map(self._judged, cases), strict=True):
                self.tally.statuses[kind] += 1
                if wrong is not None:
                    self._note(wrong, case)
            if sent // ROUND != (sent + len(cases)) // ROUND:
                self.check_fixed()
            sent += len(cases)

        chosen = settings(
            max_examples=-(-count // AT_ONCE),
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        with ThreadPoolExecutor(AT_ONCE) as pool, contextlib.suppress(Enough):
            hypothesis.seed(seed)(chosen(given(st.tuples(*[self._bodies.cases] * AT_ONCE))(round_of)))()
        self.check_fixed()
        return self.tally

    def check_fixed(self) -> None:
        """The fixed request must answer as it did before the first body."""
        self.tally.fixed_checks += 1
        try:
            text = self._fixed_text()
        except (OSError, http.client.HTTPException, LookupError, ValueError) as error:
            text = f"{type(error).__name__}: {error}"
        if text != self._expected:
            self._note(f"the fixed request answers {text!r} instead of {self._expected!r}", self._fixed)

    def _fixed_text(self) -> str:
        status, text = ask(self._address, self._fixed, self._deadline_s)
        if status != 200:
            raise ValueError(text)
        return json.loads(text)["choices"][0]["text"]

    def _judged(self, case: Case) -> tuple[str, str | None]:
        began = time.monotonic()
        try:
            kind, wrong = fault(*ask(self._address, case, self._deadline_s))
        except (OSError, http.client.HTTPException, ValueError) as error:
            kind, wrong = "none", f"no whole answer: {type(error).__name__}: {error}"
        self.tally.slowest_s = max(self.tally.slowest_s, time.monotonic() - began)
        return kind, wrong

    def _note(self, wrong: str, case: Case) -> None:
        self.tally.wrong += 1
        if len(self.tally.findings) < KEPT:
            body = ascii(case.raw.decode(errors="backslashreplace"))[:2000]
            self.tally.findings.append({"wrong": wrong, "path": case.path, "kind": case.kind, "body": body})


@contextlib.contextmanager
def served(pair: str, batch: int) -> Iterator[tuple[tuple[str, int], str]]:
    """Yields address and model name of a server that lasts as long as the block."""
    if pair == "scripted":
        from ssd.testing.twins.served import Served

        server = Served("engine.max_model_len=96", f"engine.max_batch={batch}", round_s=0.0)
        try:
            yield ("127.0.0.1", server.port), "tiny"
        finally:
            server.close()
        return
    from pairs import uncompiled
    from server import Server

    with tempfile.TemporaryDirectory(prefix="ssd-fuzz-") as name:
        config = uncompiled(pair, Path(name), batch)
        overrides = ["server.chat_template=embedded/chat_template.jinja", "engine.max_model_len=96"]
        with Server(str(config), overrides) as running:
            model = json.loads(running.get("/v1/models"))["data"][0]["id"]
            yield ("127.0.0.1", int(running.url.rpartition(":")[2])), model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=["scripted", "tiny", "embedded"], default="scripted")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--deadline-s", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given_args = parser.parse_args()
    began = time.monotonic()
    with served(given_args.pair, given_args.batch) as (address, model):
        tally = Fuzz(address, model, deadline_s=given_args.deadline_s).run(
            given_args.count, seconds=given_args.seconds, seed=given_args.seed
        )
    result = {
        "pair": given_args.pair,
        "seed": given_args.seed,
        "bodies": sum(tally.statuses.values()),
        "seconds": round(time.monotonic() - began, 1),
        "statuses": dict(sorted(tally.statuses.items())),
        "slowest_s": round(tally.slowest_s, 3),
        "fixed_checks": tally.fixed_checks,
        "wrong": tally.wrong,
        "findings": tally.findings,
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if given_args.json is not None:
        given_args.json.parent.mkdir(parents=True, exist_ok=True)
        given_args.json.write_text(text)
    if tally.wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
