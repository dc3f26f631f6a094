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
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ssd.serving.http.bodies import UNSUPPORTED, ChatBody, CompletionBody

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON_KIND = "application/json"
AT_ONCE = 4
"""Bodies in flight at a time."""
KEPT = 20
"""Findings that are kept; more are only counted."""
ROUND = 1000
"""Bodies between two checks with the fixed request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One request."""

    path: str
    raw: bytes
    kind: str = JSON_KIND
    """Its content type."""


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


# Strategies

hostile_text = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "\ud800", "a\udfffb", "\x00", "\ufeff", "\n\n", "a" * 3000, "{{ x }}", "(a*)*" * 9, "𝔘", "NaN"]
    ),
)
hostile_number = st.one_of(
    st.integers(-3, 130),
    st.sampled_from([2**31, 2**63 - 1, -(2**63), 2**63, 2**64, -(2**64), 10**39, 10**400, 1e39, 1e308, -1e39, 5e-324]),
    st.floats(),
)
hostile_leaf = st.none() | st.booleans() | hostile_number | hostile_text
hostile = st.recursive(
    hostile_leaf,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(hostile_text, inner, max_size=3),
    max_leaves=6,
)


def of_schema(schema: dict[str, Any], named: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Returns a strategy for values of a JSON schema as pydantic writes them; ``named``: its ``$defs``."""
    if "$ref" in schema:
        target = schema["$ref"].rpartition("/")[2]
        return st.deferred(lambda: of_schema(named[target], named))
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return st.one_of(*(of_schema(option, named) for option in schema[union]))
    match schema.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            low, high = schema.get("minimum", -(2**63)), schema.get("maximum", 2**63)
            return st.integers(max(low, -2), min(high, 6)) | st.integers(low, high)
        case "number":
            bounds = {"min_value": schema.get("minimum"), "max_value": schema.get("maximum")}
            return st.sampled_from([0, 0.5, 1.0]) | st.floats(**bounds, allow_nan=False)
        case "string":
            sized = st.text(min_size=schema.get("minLength", 0), max_size=schema.get("maxLength", 8))
            return st.from_regex(schema["pattern"], fullmatch=True) if "pattern" in schema else sized
        case "array":
            low = schema.get("minItems", 0)
            return st.lists(of_schema(schema.get("items", {}), named), min_size=low, max_size=low + 3)
        case "object" if "properties" in schema:
            needed = schema.get("required", [])
            parts = {name: of_schema(part, named) for name, part in schema["properties"].items()}
            optional = {name: part for name, part in parts.items() if name not in needed}
            return st.fixed_dictionaries({name: parts[name] for name in needed}, optional=optional)
        case "object":
            inner = schema.get("additionalProperties", True)
            values = of_schema(inner, named) if isinstance(inner, dict) else hostile_leaf
            return st.dictionaries(st.sampled_from(["1", "5", "type", "x", "99999"]), values, max_size=3)
    return hostile_leaf


LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0, 0.7, 1.0, 2]),
    "top_p": st.floats(0.01, 1),
    "min_p": st.floats(0, 1),
    "top_k": st.integers(-1, 50),
    "n": st.integers(1, 4),
    "min_tokens": st.integers(0, 3),
    "repetition_penalty": st.floats(0.1, 3),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "stop_token_ids": st.lists(st.integers(0, 100), max_size=3),
    "allowed_token_ids": st.lists(st.integers(0, 100), min_size=1, max_size=3),
    "logit_bias": st.dictionaries(st.integers(0, 100).map(str), st.floats(-100, 100), max_size=3),
    "bad_words": st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=2) | st.text(min_size=1), max_size=2),
    "method": st.sampled_from(["none", "sd", "ssd"]),
    "priority": st.just(0),
    "stream_options": st.sampled_from([None, {"include_usage": True}]),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    "structured_outputs": st.sampled_from(
        [{"regex": "a{2,4}"}, {"choice": ["x", "yy"]}, {"json": {"type": "integer"}}]
    ),
}
"""Values that make sense where a field's type alone would seldom give one."""


class Bodies:
    """Strategies for the requests of one server.

    Args:
        model: its model's name.
    """

    def __init__(self, model: str):
        self._model = model
        self._fields: dict[str, dict[str, st.SearchStrategy[Any]]] = {}
        for path, kind in ((TEXT, CompletionBody), (CHAT, ChatBody)):
            schema = kind.model_json_schema()
            named = schema.get("$defs", {})
            self._fields[path] = {name: of_schema(part, named) for name, part in schema["properties"].items()}
        self._prompts = st.text(min_size=1, max_size=12) | st.lists(st.integers(0, 100), min_size=1, max_size=12)
        self._messages = st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=12)}
            ),
            min_size=1,
            max_size=3,
        )

    @property
    def cases(self) -> st.SearchStrategy[Case]:
        return st.composite(self._case)()

    def _case(self, draw: Any) -> Case:
        path = draw(st.sampled_from([TEXT, CHAT]))
        body = self._valid(draw, path)
        style = draw(st.sampled_from(["valid", "typed", "broken", "broken", "raw", "anything"]))
        if style == "typed":  # right by type, whatever it means
            name = draw(st.sampled_from(sorted(self._fields[path])))
            body[name] = draw(self._fields[path][name])
        elif style == "broken":
            for _ in range(draw(st.integers(1, 2))):
                self._break(draw, path, body)
        elif style == "anything":
            return Case(path=path, raw=json.dumps(draw(hostile)).encode(), kind=self._kind(draw))
        raw = json.dumps(body).encode()
        return (
            Case(path=path, raw=self._damaged(draw, raw), kind=self._kind(draw))
            if style == "raw"
            else Case(path=path, raw=raw)
        )

    def _valid(self, draw: Any, path: str) -> dict[str, Any]:
        """A body that should work, unless its fields contradict each other."""
        body: dict[str, Any] = {"model": self._model, "max_tokens": draw(st.integers(1, 8))}
        body |= {"messages": draw(self._messages)} if path == CHAT else {"prompt": draw(self._prompts)}
        if draw(st.booleans()):
            body["stream"] = True
        for name in draw(st.lists(st.sampled_from(sorted(LIKELY)), max_size=3, unique=True)):
            body[name] = draw(LIKELY[name])
        return body

    def _break(self, draw: Any, path: str, body: dict[str, Any]) -> None:
        known = st.sampled_from(sorted({*self._fields[path], *UNSUPPORTED}))
        match draw(st.sampled_from(["hostile", "hostile", "remove", "wrap", "unknown"])):
            case "hostile":
                body[draw(known)] = draw(hostile)
            case "remove" if body:
                del body[draw(st.sampled_from(sorted(body)))]
            case "wrap" if body:
                name = draw(st.sampled_from(sorted(body)))
                for _ in range(draw(st.sampled_from([1, 2, 90, 120, 500]))):
                    body[name] = [body[name]]
            case _:
                body[draw(hostile_text)] = draw(hostile)

    def _damaged(self, draw: Any, raw: bytes) -> bytes:
        at = draw(st.integers(0, len(raw)))
        match draw(st.sampled_from(["cut", "insert", "flip", "twice", "literal", "deep", "empty"])):
            case "cut":
                return raw[:at]
            case "insert":
                return raw[:at] + draw(st.binary(min_size=1, max_size=6)) + raw[at:]
            case "flip" if at < len(raw):
                return raw[:at] + bytes([raw[at] ^ draw(st.integers(1, 255))]) + raw[at + 1 :]
            case "twice":
                return raw[:-1] + b', "max_tokens": 1, "max_tokens": 2}'
            case "literal":
                literal = draw(
                    st.sampled_from(["NaN", "-Infinity", "1e999", "-0", "9" * 5000, "1e-999", "0x1", "01", "'x'"])
                )
                name = draw(st.sampled_from(["temperature", "seed", "top_k", "user"]))
                return raw[:-1] + f', "{name}": {literal}}}'.encode()
            case "deep":
                levels = draw(st.sampled_from([50, 99, 150, 2000, 100_000]))
                return raw[:-1] + b', "metadata": ' + b'{"a":' * levels + b"1" + b"}" * levels + b"}"
        return draw(st.sampled_from([b"", b" ", b"\xff\xfe", b"\xef\xbb\xbf{}", b"null", raw * 2]))

    def _kind(self, draw: Any) -> str:
        kinds = [JSON_KIND] * 6 + ["application/json; charset=utf-8", "text/plain", "", "application/json;;", "a/b"]
        return draw(st.sampled_from(kinds))


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
                return
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
        with ThreadPoolExecutor(AT_ONCE) as pool:
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
