"""Metrics of one request and of the server, under vLLM's names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ssd.engine.request import Steps
from ssd.serving.openai.request_metrics import acceptance
from ssd.serving.remote import read_metrics
from ssd.testing.twins.served import Served

BODY = {"model": "tiny", "prompt": "x", "max_tokens": 30, "seed": 1}
TIMES = {"time_to_first_token_ms", "generation_time_ms", "queue_time_ms", "mean_itl_ms", "tokens_per_second"}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served("server.request_metrics=detailed")
    yield server
    server.close()


def ask(served: Served, **more: Any) -> dict[str, Any]:
    status, _, text = served.ask("POST", "/v1/completions", {**BODY, **more})
    assert status == 200, text
    return json.loads(text)


def test_detailed(served: Served) -> None:
    answer = ask(served, provenance=True)
    metrics = answer["metrics"]
    told = metrics["speculative_decoding"]
    accepted, drafted = told["per_step_accepted"], told["per_step_drafted"]
    assert len(accepted) == len(drafted) == told["num_spec_steps"] > 3
    assert sum(accepted) == told["num_accepted_draft_tokens"] and sum(drafted) == told["num_draft_tokens"]
    assert all(0 <= j <= k for j, k in zip(accepted, drafted, strict=True))
    assert told["acceptance_histogram"] == [accepted.count(j) for j in range(len(told["acceptance_histogram"]))]
    at_ms = metrics["ssd"]["per_step_ms"]
    assert len(at_ms) == len(accepted) and at_ms == sorted(at_ms) and at_ms[0] == 0 < at_ms[-1]
    assert metrics.keys() > TIMES and all(metrics[name] > 0 for name in TIMES - {"queue_time_ms"})
    assert metrics["mean_itl_ms"] == pytest.approx(metrics["generation_time_ms"] / 29)
    whole_ms = metrics["time_to_first_token_ms"] + metrics["generation_time_ms"]
    assert metrics["tokens_per_second"] == pytest.approx(30e3 / whole_ms)


def test_plain_decoding_and_one_token(served: Served) -> None:
    told = ask(served, method="none", max_tokens=1)["metrics"]
    assert told["mean_itl_ms"] is None and told["generation_time_ms"] == 0
    assert told["speculative_decoding"]["per_step_accepted"] == told["ssd"]["per_step_ms"] == []
    assert told["speculative_decoding"]["mean_acceptance_length"] is None


def test_a_stream_has_them_in_the_usage_chunk(served: Served) -> None:
    body = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    _, _, text = served.ask("POST", "/v1/completions", body)
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert chunks[-1]["metrics"]["speculative_decoding"]["per_step_accepted"]
    assert not any("metrics" in chunk for chunk in chunks[:-1])


@pytest.mark.parametrize("level", ["none", "summary"])
def test_the_other_levels(level: str) -> None:
    server = Served(f"server.request_metrics={level}")
    try:
        metrics = ask(server)["metrics"]
        if level == "none":
            assert metrics is None
        else:
            assert metrics.keys() > TIMES and "per_step_ms" not in metrics["ssd"]
            assert "per_step_accepted" not in metrics["speculative_decoding"]
    finally:
        server.close()


def test_an_accepted_sibling_counts_as_a_longer_draft() -> None:
    steps = Steps()
    for drafted, accepted in ((3, 1), (0, 0), (3, 3), (0, 1)):
        steps.add(drafted, accepted, 0.0)
    told = acceptance(steps, 3, detailed=True)
    assert (told["per_step_accepted"], told["per_step_drafted"]) == ([1, 3, 1], [3, 3, 1])
    assert told["acceptance_histogram"] == [0, 2, 0, 1] and told["num_spec_steps"] == 3


def as_load_generators_read(text: str) -> tuple[dict[str, float], dict[int, float]]:
    """Sums what ``vllm bench serve`` sums: every line of a name, whatever its labels and suffixes."""
    counts: dict[str, float] = {"num_drafts": 0, "num_draft_tokens": 0, "num_accepted_tokens": 0}
    positions: dict[int, float] = {}
    for line in text.splitlines():
        if not line.startswith("vllm:spec_decode"):
            continue
        value = float(line.split()[-1])
        if "num_accepted_tokens_per_pos" in line:
            position = int(line.partition('position="')[2].partition('"')[0])
            positions[position] = positions.get(position, 0) + value
        else:
            [name] = [name for name in sorted(counts, key=len, reverse=True) if name in line][:1]
            counts[name] += value
    return counts, positions


def test_load_generators_see_the_acceptance() -> None:
    server = Served()
    try:
        before, _ = as_load_generators_read(server.ask("GET", "/metrics")[2])
        told = ask(server)["metrics"]["speculative_decoding"]
        after, positions = as_load_generators_read(server.ask("GET", "/metrics")[2])
        assert before == dict.fromkeys(before, 0)
        assert after == {
            "num_drafts": told["num_spec_steps"],
            "num_draft_tokens": told["num_draft_tokens"],
            "num_accepted_tokens": told["num_accepted_draft_tokens"],
        }
        histogram = told["acceptance_histogram"]
        assert positions == {j: sum(histogram[j + 1 :]) for j in range(len(histogram) - 1) if sum(histogram[j + 1 :])}
    finally:
        server.close()


def test_dashboards_find_vllm_names(served: Served) -> None:
    answer = ask(served, max_tokens=8)
    _, _, text = served.ask("GET", "/metrics")
    values = read_metrics(text)
    labels = 'engine="0",model_name="tiny"'
    for name in ("num_requests_running", "num_requests_waiting"):
        assert values[f"vllm:{name}{{{labels}}}"] == 0
    tokens = sum(value for name, value in values.items() if name.startswith("ssd:generation_tokens_total"))
    assert values[f"vllm:generation_tokens_total{{{labels}}}"] == tokens >= 8
    assert values['vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"}'] >= 1
    for name in (
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
        *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
        *("request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens"),
    ):
        assert values[f"vllm:{name}_count{{{labels}}}"] == values[f"ssd:{name}_count"] > 0
        buckets = [v for n, v in values.items() if n.startswith(f"vllm:{name}_bucket")]
        assert buckets == sorted(buckets) and buckets[-1] == values[f"ssd:{name}_count"]
    assert (
        "# TYPE vllm:time_to_first_token_seconds histogram" in text and "vllm:" not in text.partition("# HELP vllm:")[0]
    )
    assert answer["usage"]["completion_tokens"] == 8
    assert not any(line.startswith("vllm:") and "_created" in line for line in text.splitlines())
