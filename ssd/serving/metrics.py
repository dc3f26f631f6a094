"""Prometheus metrics of a server, named as vLLM's where they mean the same; rates derive from counters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..config.sections import HeldDevices
from ..engine.request import Request
from ..engine.restarts import News
from ..pipeline.transport.messages import RoundReport
from ..request.output import StreamEvent
from .remote import read_metrics
from .vllm_names import VllmNames

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """Counts what an engine does, in its own registry. Times are seconds.

    Args:
        clock: Returns monotonic seconds, on the engine's clock.
        devices: Held by the workers; their time in rounds is counted.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, *, devices: Sequence[HeldDevices] = ()):
        self.registry = registry = CollectorRegistry()
        self._clock, self._last = clock, dict[int, float]()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"ssd:{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"ssd:{name}", text, buckets=buckets, registry=registry)

        self.drafts = counter("spec_decode_num_drafts", "Rounds of a sequence that verified draft tokens.")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Draft tokens verified.")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Draft tokens accepted.")
        self.accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Rounds that accepted the draft token there.", ("position",)
        )
        self.hits = counter("spec_decode_num_forecast_hits", "Outcomes found in the speculation set.")
        self.misses = counter("spec_decode_num_forecast_misses", "Outcomes looked up and not found.")
        self.tokens = counter("generation_tokens", "Tokens generated, by where they came from.", ("provenance",))
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests.")
        self.prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked for in the prefix cache.")
        self.prefix_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.finished = counter("request_success", "Requests finished.", ("finished_reason",))
        self.draft_events = counter("draft_events", "Draft lost, restarting, back or given up.", ("event",))
        self.refused = counter("requests_refused", "Requests refused, by HTTP status.", ("status",))
        self.rounds = counter("rounds", "Rounds of the whole batch.")
        self.round_s = counter("round_seconds", "Time in rounds.")
        self.device_s = counter("device_seconds", "Time in rounds, times the devices held by a worker.", ("worker",))
        self._devices = tuple(devices)
        held = Gauge("ssd:devices", "Devices held by a worker.", ("worker",), registry=registry)
        prices = Gauge("ssd:device_price_per_hour", "Configured price of a device.", ("worker",), registry=registry)
        for one in self._devices:
            held.labels(one.worker).set(one.count)
            if one.price_per_hour is not None:
                prices.labels(one.worker).set(one.price_per_hour)
        self.forward_s = counter("verifier_forward_seconds", "The verifier's forwards.")
        self.forecast_s = counter("draft_forecast_seconds", "The draft making speculation sets.")
        self.wait_s = counter("verifier_wait_seconds", "The verifier waiting in the exchange.")
        self.jit_s = counter("verifier_jit_wait_seconds", "The verifier waiting for trees drafted after a miss.")
        self.draft_bubble_s = counter("draft_bubble_seconds", "The draft with nothing to do, within rounds.")
        self.shadow_replays = counter(
            "shadow_replays", "Finished requests decoded again without speculation, by result.", ("result",)
        )
        self.queue_time = histogram("request_queue_time_seconds", "From arrival to the verifier.")
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.between = histogram("inter_token_latency_seconds", "Between the commits of a request.")
        self.per_token = histogram("request_time_per_output_token_seconds", "Mean time a token after the first.")
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end.")
        self.prefill = histogram("request_prefill_time_seconds", "From the verifier to the first token.")
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.")
        self.inference = histogram("request_inference_time_seconds", "From the verifier to the last token.")
        self.stalls = histogram(
            "event_loop_stall_seconds", "Time the server kept all clients waiting, fifty times a second."
        )
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens of a finished request.", TOKENS)
        self.output_length = histogram("request_generation_tokens", "Tokens a finished request got.", TOKENS)

    def gauges(self, **values: Callable[[], float]) -> None:
        """Adds gauges: each function is called when metrics are read."""
        for name, value in values.items():
            Gauge(f"ssd:{name}", name.replace("_", " "), registry=self.registry).set_function(value)

    def text(self, model: str) -> bytes:
        """Returns all metrics in Prometheus' text format, those that vLLM has under its names too: the answer of
        ``/metrics``.

        Args:
            model: name of the model, a label of vLLM's metrics.
        """
        also = CollectorRegistry()
        also.register(VllmNames(self.registry, model))
        return generate_latest(self.registry) + generate_latest(also)

    @property
    def values(self) -> dict[str, float]:
        """All metrics by sample (``name{label="value"}``)."""
        return read_metrics(generate_latest(self.registry).decode())

    def event(self, request: Request, event: StreamEvent) -> None:
        """Counts an event of a request."""
        now = self._clock()
        if event.token_ids:
            last = self._last.get(request.number)
            if last is None:
                self.queue_time.observe((request.sent_s or now) - request.added_s)
                self.first_token.observe(now - request.added_s)
                self.prefix_queries.inc(len(request.prompt_ids))
                self.prefix_hits.inc(request.cached)
            else:
                self.between.observe(now - last)
            self._last[request.number] = now
            for provenance in event.provenance:
                self.tokens.labels(provenance).inc()
            if event.drafted:
                self.drafts.inc()
                self.draft_tokens.inc(event.drafted)
                self.accepted.inc(event.accepted)
                for position in range(event.accepted):
                    self.accepted_at.labels(position).inc()
        if event.output is not None:
            last = self._last.pop(request.number, None)
            self.finished.labels(event.output.finish_reason).inc()
            self.prompt_tokens.inc(len(request.prompt_ids))
            self.whole.observe(now - request.added_s)
            self.prompt_length.observe(len(request.prompt_ids))
            self.output_length.observe(len(request.token_ids))
            later = len(request.token_ids) - 1
            if last is not None and request.first_s is not None:
                sent_s = request.sent_s or request.added_s
                self.prefill.observe(request.first_s - sent_s)
                self.decode.observe(last - request.first_s)
                self.inference.observe(last - sent_s)
                if later > 0:
                    self.per_token.observe((last - request.first_s) / later)

    def draft(self, news: News) -> None:
        """Counts a change of the draft."""
        self.draft_events.labels(news).inc()

    def round(self, report: RoundReport) -> None:
        """Counts a round of the batch."""
        self.rounds.inc()
        self.round_s.inc(max(0.0, report.round_s))
        for one in self._devices:
            self.device_s.labels(one.worker).inc(max(0.0, report.round_s) * one.count)
        self.forward_s.inc(report.forward_s)
        self.hits.inc(report.hits)
        self.misses.inc(report.lookups - report.hits)
        if report.draft_s is not None:
            self.forecast_s.inc(report.draft_s)
            self.wait_s.inc(report.wait_s or 0.0)
            self.jit_s.inc(report.jit_s or 0.0)
            self.draft_bubble_s.inc(max(0.0, report.round_s - report.draft_s - (report.jit_s or 0.0)))
