"""Shadow replay over a scripted server: what is replayed, when, and what is said of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ssd.pipeline.transport.messages import Submit
from ssd.testing.twins.pipeline import ScriptedPipeline
from ssd.testing.twins.served import Served


def replays(served: Served) -> dict[str, float]:
    _, _, text = served.ask("GET", "/metrics")
    return {k: float(v) for k, v in re.findall(r'ssd:shadow_replays_total\{result="(\w+)"\} (\S+)', text)}


def complete(served: Served, **fields: Any) -> Any:
    return served.client().completions.create(model="tiny", prompt="def", **{"max_tokens": 8, "seed": 3, **fields})


@pytest.fixture
def served() -> Iterator[Served]:
    server = Served("server.shadow_rate=1")
    yield server
    server.close()


def test_finished_requests_are_replayed(served: Served) -> None:
    complete(served)
    complete(served, temperature=0.8, n=2, logprobs=1)
    served.until(lambda: replays(served) == {"equal": 3.0})
    # What decodes plainly anyway has nothing to be compared with.
    complete(served, extra_body={"method": "none"})
    complete(served, seed=4)
    served.until(lambda: replays(served) == {"equal": 4.0})
    # Replays are nobody's requests.
    _, _, text = served.ask("GET", "/metrics")
    assert 'request_success_total{finished_reason="length"} 5.0' in text


def test_a_difference_is_told(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    take = ScriptedPipeline._take

    def other_when_plain(self: ScriptedPipeline, message: Any) -> None:
        if isinstance(message, Submit) and message.params.method == "none":
            message = Submit(request=message.request, prompt=message.prompt, params=replace(message.params, seed=99))
        take(self, message)

    monkeypatch.setattr(ScriptedPipeline, "_take", other_when_plain)
    with caplog.at_level(logging.WARNING, logger="ssd.serving.shadow"):
        answer = complete(served)
        served.until(lambda: replays(served) == {"different": 1.0})
    (record,) = caplog.records
    assert answer.id in record.getMessage()
    assert "differs from plain decoding at generated token 0" in record.getMessage()


def test_not_asked_for() -> None:
    served = Served()
    complete(served)
    complete(served)
    assert replays(served) == {}
    served.close()


def test_rules_that_keep_the_law_only() -> None:
    served = Served("server.shadow_rate=1", "speculation.verify=rejection")
    complete(served, temperature=0.9)
    complete(served, temperature=0)
    served.until(lambda: replays(served) == {"equal": 1.0})
    served.close()


def test_replays_give_way() -> None:
    served = Served("server.shadow_rate=1", "engine.max_batch=1", round_s=0.01)
    pipeline = served.pipeline
    complete(served, max_tokens=120)
    served.until(lambda: pipeline.busy == 1)  # the replay, 120 rounds of it
    complete(served, max_tokens=2)
    assert replays(served) == {}
    served.until(lambda: replays(served) == {"equal": 2.0})
    served.close()
