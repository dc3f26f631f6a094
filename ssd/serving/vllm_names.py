"""Metrics under vLLM's names, for the dashboards and load generators that read those."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

NAMES = (
    "num_requests_running",
    "num_requests_waiting",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
)
"""Metrics that mean the same in vLLM, without the prefix ``ssd:`` or ``vllm:``."""
OURS = frozenset({"provenance"})
"""Labels that vLLM's metrics do not have."""


class VllmNames(Collector):
    """Copies the metrics of a registry that vLLM has too, with its names and labels.

    Args:
        model: name of the model, vLLM's label ``model_name``.
    """

    def __init__(self, registry: CollectorRegistry, model: str):
        self._registry, self._labels = registry, {"model_name": model, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        shared = {f"ssd:{name}": f"vllm:{name}" for name in NAMES}
        for family in self._registry.collect():
            if (name := shared.get(family.name)) is None:
                continue
            copy = Metric(name, family.documentation, family.type)
            totals: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
            for sample in family.samples:
                # Load generators would add the time of creation to the counts.
                if not sample.name.endswith("_created"):
                    labels = tuple((label, text) for label, text in sample.labels.items() if label not in OURS)
                    totals[sample.name, labels] += sample.value
            for (sample_name, labels), value in totals.items():
                copy.add_sample(sample_name.replace("ssd:", "vllm:", 1), {**self._labels, **dict(labels)}, value)
            yield copy
