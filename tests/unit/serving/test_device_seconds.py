"""Device-seconds in ``/metrics``: what the tokens of a server cost."""

from __future__ import annotations

import pytest

from ssd.config.load import load_config
from ssd.pipeline.transport.messages import RoundReport
from ssd.serving.metrics import Metrics
from ssd.serving.remote import read_metrics
from ssd.testing.twins.served import Served


def test_a_server_counts_the_devices_it_holds() -> None:
    server = Served("cost.target_per_hour=3.6", "cost.draft_per_hour=0.9")
    try:
        assert server.ask("POST", "/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 20})[0] == 200
        found = read_metrics(server.ask("GET", "/metrics")[2])
    finally:
        server.close()
    seconds = found["ssd:round_seconds_total"]
    assert seconds > 0
    for worker, price in (("target", 3.6), ("draft", 0.9)):
        label = f'{{worker="{worker}"}}'
        assert found[f"ssd:device_seconds_total{label}"] == pytest.approx(seconds)
        assert found[f"ssd:devices{label}"] == 1 and found[f"ssd:device_price_per_hour{label}"] == price


def test_every_rank_counts() -> None:
    overrides = ["target.tensor_parallel=2", "draft.data_parallel=3", "target.device=cuda:0", "draft.device=cuda:1"]
    metrics = Metrics(devices=load_config("embedded", overrides).devices)
    alone = {"wait_s": None, "draft_s": None, "jit_s": None, "rows": 1, "lookups": 0, "hits": 0}
    metrics.round(RoundReport(began_s=0.0, round_s=0.5, forward_s=0.3, **alone))
    assert metrics.values['ssd:device_seconds_total{worker="target"}'] == 1.0
    assert metrics.values['ssd:device_seconds_total{worker="draft"}'] == 1.5
    assert not any("price" in name and "{" in name for name in metrics.values)
