"""A client of a running server over HTTP, with the standard library only: for ``ssd chat`` and ``ssd top``."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ..errors import PipelineError, UsageError

TIMEOUT_S = 600.0


class Remote:
    """A server by its URL.

    Args:
        url: with or without a scheme.
        key: API key.

    Raises:
        UsageError: every method: the URL is not one, or the server refuses the request; the message is its own.
        PipelineError: every method: the server does not answer, or answers something that is not its protocol.
    """

    def __init__(self, url: str, key: str | None = None):
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if host is None or parts.scheme not in ("http", "https"):
            raise UsageError(f"{url!r} is not the URL of a server; for example http://127.0.0.1:8000")
        self.url, self._key = parts.geturl(), key
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connect = lambda: kind(host, port, timeout=TIMEOUT_S)

    def get(self, path: str) -> Any:
        """Returns the parsed JSON at a path."""
        with self._ask("GET", path) as answer:
            return json.loads(answer.read())

    def text(self, path: str) -> str:
        """Returns the text at a path."""
        with self._ask("GET", path) as answer:
            return answer.read().decode()

    def events(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Yields the server-sent events that answer a POST. Closing the iterator cancels the request."""
        with self._ask("POST", path, body) as answer:
            for raw in answer:
                line = raw.decode().strip()
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise PipelineError(event["error"]["message"])
                    yield event

    @contextlib.contextmanager
    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Iterator[http.client.HTTPResponse]:
        headers = {"content-type": "application/json"} if body is not None else {}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        with contextlib.closing(self._connect()) as connection:
            try:
                connection.request(method, path, json.dumps(body) if body is not None else None, headers)
                answer = connection.getresponse()
                if answer.status >= 400:
                    raise _refused(answer)
                yield answer
            except (OSError, http.client.HTTPException) as error:
                raise PipelineError(f"{self.url} does not answer ({error}); is `ssd serve` running?") from None
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise PipelineError(f"{self.url} does not answer like `ssd serve`: {error}") from None


def _refused(answer: http.client.HTTPResponse) -> UsageError | PipelineError:
    raw = answer.read()
    try:
        message = json.loads(raw)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {answer.status}"
    return PipelineError(message) if answer.status >= 500 or answer.status == 429 else UsageError(message)


def read_metrics(text: str) -> dict[str, float]:
    """Returns the samples of Prometheus text by name (``name{label="value"}``)."""
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """``/metrics`` at one moment. ``at_s``: monotonic clock, seconds."""

    values: dict[str, float]
    at_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What happened between two samples; None where nothing was counted."""

    tokens_per_s: float
    requests_per_s: float
    acceptance_rate: float | None
    acceptance_length: float | None
    hit_rate: float | None
    round_ms: float | None
    forward_share: float | None
    """Share of the verifier's time in rounds: forwards. The next two: waiting in the exchange, and after misses."""
    wait_share: float | None
    jit_share: float | None
    draft_busy_share: float | None
    provenance: dict[str, float]
    """Share of the tokens, by where they came from."""


def rates(before: Sample, after: Sample) -> Rates:
    """Returns the differences of counters as rates."""

    def grew(name: str) -> float:
        return after.values.get(f"ssd:{name}", 0.0) - before.values.get(f"ssd:{name}", 0.0)

    def ratio(part: float, whole: float) -> float | None:
        return part / whole if whole > 0 else None

    def labelled(name: str) -> dict[str, float]:
        found = {key for key in after.values if key.startswith(f"ssd:{name}{{")}
        return {key.partition('"')[2].partition('"')[0]: grew(key.removeprefix("ssd:")) for key in sorted(found)}

    seconds = max(after.at_s - before.at_s, 1e-9)
    tokens = labelled("generation_tokens_total")
    drafts, accepted = grew("spec_decode_num_drafts_total"), grew("spec_decode_num_accepted_tokens_total")
    hits, misses = grew("spec_decode_num_forecast_hits_total"), grew("spec_decode_num_forecast_misses_total")
    rounds, round_s = grew("rounds_total"), grew("round_seconds_total")
    draft_s = grew("draft_forecast_seconds_total") + grew("verifier_jit_wait_seconds_total")
    length = ratio(accepted, drafts)
    mean_s = ratio(round_s, rounds)
    total = sum(tokens.values())
    return Rates(
        tokens_per_s=total / seconds,
        requests_per_s=sum(labelled("request_success_total").values()) / seconds,
        acceptance_rate=ratio(accepted, grew("spec_decode_num_draft_tokens_total")),
        acceptance_length=None if length is None else 1 + length,
        hit_rate=ratio(hits, hits + misses),
        round_ms=None if mean_s is None else 1e3 * mean_s,
        forward_share=ratio(grew("verifier_forward_seconds_total"), round_s),
        wait_share=ratio(grew("verifier_wait_seconds_total"), round_s),
        jit_share=ratio(grew("verifier_jit_wait_seconds_total"), round_s),
        draft_busy_share=ratio(draft_s, round_s),
        provenance={name: count / total for name, count in tokens.items() if count},
    )
