"""Traces of requests for OpenTelemetry: a span for each request, with its queue, prefill and decode below it.

Attributes have the names of OpenTelemetry's conventions for generative AI and of vLLM's traces.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import Span, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .. import __version__
from ..engine.request import Request
from ..engine.restarts import News
from ..pipeline.transport.messages import RoundReport
from ..request.output import RequestOutput, StreamEvent
from .shadow import CLIENT

HTTP_PATH = "/v1/traces"
"""Path of collectors that take OTLP over HTTP."""
FLUSH_MS = 5000


@dataclass(frozen=True, kw_only=True, slots=True)
class _Round:
    """What a round did for one request."""

    at_s: float
    drafted: int
    accepted: int
    tokens: int
    origin: str


class Tracing:
    """An engine's observer: makes the spans of a request when it ends.

    Args:
        processor: takes finished spans.
        model: name of the model.
        clock: returns monotonic seconds, on the engine's clock.
    """

    def __init__(self, processor: SpanProcessor, model: str, clock: Callable[[], float] = time.perf_counter):
        self._provider = TracerProvider(
            resource=Resource.create({SERVICE_NAME: "ssd", SERVICE_VERSION: __version__}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("ssd", __version__)
        self._model, self._clock = model, clock
        self._epoch_s = time.time() - clock()
        self._rounds: dict[int, list[_Round]] = {}

    @classmethod
    def to(cls, endpoint: str, model: str) -> Tracing:
        """Sends spans to a collector, in batches and from a thread.

        Args:
            endpoint: its URL; one with the path ``/v1/traces`` is sent OTLP over HTTP, others OTLP over gRPC.

        Raises:
            ImportError: the exporter for the protocol is not installed.
        """
        return cls(BatchSpanProcessor(_exporter(endpoint)), model)

    def event(self, request: Request, event: StreamEvent) -> None:
        """Takes in an event of a request."""
        if request.client == CLIENT:
            return
        if event.token_ids:
            rounds = self._rounds.setdefault(request.number, [])
            origin = event.provenance[0] if event.accepted else "none"
            rounds.append(
                _Round(
                    at_s=self._clock(),
                    drafted=event.drafted,
                    accepted=event.accepted,
                    tokens=len(event.token_ids),
                    origin=origin,
                )
            )
        if event.output is not None:
            self._record(request, event.output, self._rounds.pop(request.number, []))

    def round(self, report: RoundReport) -> None:
        """Rounds of the batch are not traced."""

    def draft(self, news: News) -> None:
        """Changes of the draft are not traced."""

    def close(self) -> None:
        """Sends what is left. Waits for the collector, for five seconds at most."""
        self._provider.force_flush(FLUSH_MS)
        self._provider.shutdown()

    def _record(self, request: Request, output: RequestOutput, rounds: list[_Round]) -> None:
        end_s = self._clock()
        parent = TraceContextTextMapPropagator().extract(request.trace_headers) if request.trace_headers else None
        whole: Any = self._tracer.start_span(
            "llm_request",
            parent,
            SpanKind.SERVER,
            attributes=self._attributes(request, output, end_s),
            start_time=self._ns(request.added_s),
        )
        sent_s, first_s, last_s = request.sent_s, request.first_s, request.last_s
        self._child(whole, "queue", request.added_s, end_s if sent_s is None else sent_s)
        if sent_s is not None:
            prefill = {"gen_ai.usage.cached_tokens": output.num_cached_tokens}
            self._child(whole, "prefill", sent_s, end_s if first_s is None else first_s, prefill)
        if first_s is not None and last_s is not None:
            self._child(whole, "decode", first_s, last_s, _speculation(request, output), rounds)
        if output.finish_reason == "error":
            whole.set_status(StatusCode.ERROR, output.error)
        whole.end(self._ns(end_s))

    def _child(
        self,
        parent: Span,
        name: str,
        begin_s: float,
        end_s: float,
        attributes: Mapping[str, Any] | None = None,
        rounds: list[_Round] | None = None,
    ) -> None:
        span: Any = self._tracer.start_span(
            name, set_span_in_context(parent), attributes=attributes, start_time=self._ns(begin_s)
        )
        for one in rounds or ():
            told = {"drafted": one.drafted, "accepted": one.accepted, "tokens": one.tokens, "origin": one.origin}
            span.add_event("round", told, self._ns(one.at_s))
        span.end(self._ns(end_s))

    def _attributes(self, request: Request, output: RequestOutput, end_s: float) -> dict[str, Any]:
        params, sent_s, first_s, last_s = request.params, request.sent_s, request.first_s, request.last_s
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion" if request.label.startswith("cmpl-") else "chat",
            "gen_ai.provider.name": "ssd",
            "gen_ai.request.id": request.label or str(request.number),
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.seed": str(params.seed),
            "gen_ai.request.choice.count": params.n,
            "gen_ai.response.finish_reasons": [output.finish_reason],
            # The conventions' names, then the older ones that vLLM reports.
            "gen_ai.usage.input_tokens": len(request.prompt_ids),
            "gen_ai.usage.output_tokens": len(output.token_ids),
            "gen_ai.usage.prompt_tokens": len(request.prompt_ids),
            "gen_ai.usage.completion_tokens": len(output.token_ids),
            "gen_ai.latency.e2e": end_s - request.added_s,
        }
        if sent_s is not None:
            attributes["gen_ai.latency.time_in_queue"] = sent_s - request.added_s
        if sent_s is not None and first_s is not None and last_s is not None:
            attributes["gen_ai.latency.time_to_first_token"] = first_s - request.added_s
            attributes["gen_ai.latency.time_in_model_prefill"] = first_s - sent_s
            attributes["gen_ai.latency.time_in_model_decode"] = last_s - first_s
            attributes["gen_ai.latency.time_in_model_inference"] = last_s - sent_s
        return attributes

    def _ns(self, at_s: float) -> int:
        """Returns a moment of the engine's clock in nanoseconds since 1970."""
        return int((self._epoch_s + at_s) * 1e9)


def _speculation(request: Request, output: RequestOutput) -> dict[str, Any]:
    record, steps = output.speculation, request.steps
    return {
        "ssd.method": request.params.method or "",
        "ssd.rounds": record.rounds,
        "ssd.lookups": record.lookups,
        "ssd.hits": record.hits,
        "ssd.num_spec_steps": len(steps.accepted),
        "ssd.num_draft_tokens": sum(steps.drafted),
        "ssd.num_accepted_draft_tokens": sum(steps.accepted),
    }


def _exporter(endpoint: str) -> SpanExporter:
    if urlsplit(endpoint).path.rstrip("/").endswith(HTTP_PATH):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=endpoint)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
