"""Spans of requests, taken in by OpenTelemetry's exporter in memory."""

from __future__ import annotations

import gzip
import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ssd.errors import UsageError
from ssd.serving.run import traces
from ssd.testing.twins.served import Served

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from ssd.serving.tracing import Tracing

BODY = {"model": "tiny", "prompt": "x y", "max_tokens": 30, "seed": 1, "temperature": 0.5}
PARENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=1"}


class Traced:
    def __init__(self, *overrides: str):
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing(SimpleSpanProcessor(self.exporter), "tiny")
        self.server = Served(*overrides, observers=[self.tracing])

    def spans(self, count: int = 4) -> dict[str, Any]:
        """Waits for the spans. Returns them by name, and forgets them."""
        self.server.until(lambda: len(self.exporter.get_finished_spans()) >= count)
        spans = self.exporter.get_finished_spans()
        self.exporter.clear()
        return {span.name: span for span in spans}


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    traced = Traced("server.request_metrics=detailed")
    yield traced
    traced.server.close()


def test_a_request_has_queue_prefill_and_decode(traced: Traced) -> None:
    status, _, text = traced.server.ask("POST", "/v1/completions", BODY)
    answer = json.loads(text)
    spans = traced.spans()
    assert status == 200 and set(spans) == {"llm_request", "queue", "prefill", "decode"}
    whole, queue, prefill, decode = (spans[name] for name in ("llm_request", "queue", "prefill", "decode"))
    assert whole.kind is SpanKind.SERVER and whole.parent is None
    for child in (queue, prefill, decode):
        assert child.parent.span_id == whole.context.span_id and child.context.trace_id == whole.context.trace_id
    assert whole.start_time == queue.start_time <= queue.end_time == prefill.start_time
    assert prefill.end_time == decode.start_time < decode.end_time <= whole.end_time
    told = dict(whole.attributes)
    assert told["gen_ai.operation.name"] == "text_completion" and told["gen_ai.request.id"] == answer["id"]
    assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == "tiny"
    assert told["gen_ai.usage.input_tokens"] == told["gen_ai.usage.prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == told["gen_ai.usage.completion_tokens"] == 30
    assert (told["gen_ai.request.max_tokens"], told["gen_ai.request.temperature"]) == (30, 0.5)
    assert told["gen_ai.response.finish_reasons"] == ("length",) and told["gen_ai.request.seed"] == "1"
    seconds = {name: told[f"gen_ai.latency.{name}"] for name in ("time_in_queue", "time_to_first_token", "e2e")}
    assert 0 <= seconds["time_in_queue"] <= seconds["time_to_first_token"] < seconds["e2e"] < 60
    parts = ("time_in_model_prefill", "time_in_model_decode")
    inference = told["gen_ai.latency.time_in_model_inference"]
    assert sum(told[f"gen_ai.latency.{part}"] for part in parts) == pytest.approx(inference)


def test_rounds_are_events_of_decode(traced: Traced) -> None:
    _, _, text = traced.server.ask("POST", "/v1/completions", BODY)
    metrics, decode = json.loads(text)["metrics"], traced.spans()["decode"]
    rounds = [dict(event.attributes) for event in decode.events]
    assert all(event.name == "round" for event in decode.events) and len(rounds) == metrics["ssd"]["rounds"]
    speculating = [one for one in rounds if one["drafted"]]
    told = metrics["speculative_decoding"]
    assert [one["drafted"] for one in speculating] == told["per_step_drafted"]
    assert [one["accepted"] for one in speculating] == told["per_step_accepted"]
    assert sum(one["tokens"] for one in rounds) == 30
    times = [event.timestamp for event in decode.events]
    assert times == sorted(times) and decode.attributes["ssd.num_draft_tokens"] == told["num_draft_tokens"]


def test_a_request_joins_the_trace_of_its_client(traced: Traced) -> None:
    messages = [{"role": "user", "content": "x"}]
    doors: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/completions", BODY, "text_completion"),
        ("/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 9}, "chat"),
        ("/v1/messages", {"model": "tiny", "messages": messages, "max_tokens": 9}, "chat"),
        ("/v1/responses", {"model": "tiny", "input": "x", "max_output_tokens": 20}, "chat"),
    ]
    for path, body, operation in doors:
        assert traced.server.ask("POST", path, body, PARENT)[0] == 200
        whole = traced.spans()["llm_request"]
        assert f"{whole.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
        assert f"{whole.parent.span_id:016x}" == "b7ad6b7169203331" and whole.parent.is_remote
        assert whole.context.trace_state["a"] == "1" and whole.attributes["gen_ai.operation.name"] == operation


@pytest.mark.parametrize("header", ["", "nonsense", "00-0-0-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "ü" * 40])
def test_a_bad_trace_header_begins_a_new_trace(traced: Traced, header: str) -> None:
    headers = {"traceparent": header.encode("latin-1").decode("latin-1")}
    assert traced.server.ask("POST", "/v1/completions", BODY, headers)[0] == 200
    assert traced.spans()["llm_request"].parent is None


def test_every_choice_is_traced(traced: Traced) -> None:
    assert traced.server.ask("POST", "/v1/completions", {**BODY, "n": 3}, PARENT)[0] == 200
    traced.server.until(lambda: len(traced.exporter.get_finished_spans()) == 12)
    traced.exporter.clear()


def test_a_client_that_leaves(traced: Traced) -> None:
    stream = traced.server.client().completions.create(**{**BODY, "max_tokens": 400}, stream=True)
    next(iter(stream))
    stream.close()
    whole = traced.spans()["llm_request"]
    assert whole.attributes["gen_ai.response.finish_reasons"] == ("cancelled",)
    assert whole.status.status_code is StatusCode.UNSET
    assert traced.tracing._rounds == {}


@pytest.mark.parametrize("path", ["/v1/traces", "/prefix/v1/traces/"])
def test_spans_reach_a_collector(path: str) -> None:
    """OTLP over HTTP, as collectors take it."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    taken: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            taken.append((self.path, gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        [tracing] = traces(f"http://127.0.0.1:{collector.server_port}{path}", "tiny")
        server = Served(observers=[tracing])
        try:
            assert server.ask("POST", "/v1/completions", BODY)[0] == 200
        finally:
            server.close()
            tracing.close()  # sends what is left
            collector.shutdown()
    [(where, raw)] = taken
    [resource] = ExportTraceServiceRequest.FromString(raw).resource_spans
    assert where == path
    assert "ssd" in [attribute.value.string_value for attribute in resource.resource.attributes]
    assert {span.name for span in resource.scope_spans[0].spans} == {"llm_request", "queue", "prefill", "decode"}


def test_a_collector_that_is_not_there_harms_nobody() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")
    [tracing] = traces("http://127.0.0.1:9", "tiny")
    server = Served(observers=[tracing])
    try:
        assert server.ask("POST", "/v1/completions", BODY)[0] == 200
    finally:
        server.close()
        began_s = time.monotonic()
        tracing.close()
    assert time.monotonic() - began_s < 30


def test_without_opentelemetry_the_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert traces(None, "tiny") == []
    monkeypatch.setitem(sys.modules, "ssd.serving.tracing", None)
    with pytest.raises(UsageError, match=r"ssd-engine\[otel\]"):
        traces("http://127.0.0.1:4318/v1/traces", "tiny")


def test_serving_does_not_import_opentelemetry() -> None:
    """It is an optional dependency."""
    code = "import sys, ssd.serving.run; sys.exit('ssd.serving.tracing' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
