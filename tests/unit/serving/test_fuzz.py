"""``benchmarks/serving/fuzz.py`` on a few hundred bodies, over a scripted pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssd.testing.twins.served import Served

SCRIPTS = Path(__file__).resolve().parents[3] / "benchmarks" / "serving"


def test_generated_bodies_never_break_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from fuzz import Fuzz

    server = Served("engine.max_model_len=96", round_s=0.0)
    try:
        tally = Fuzz(("127.0.0.1", server.port), "tiny").run(400, seconds=100, seed=3)
        server.until(lambda: server.engine.running == server.engine.queued == server.engine.tokens_in_flight == 0)
    finally:
        server.close()
    assert not tally.findings
    assert {"200", "200 stream", "400", "415"} <= set(tally.statuses)
    assert tally.statuses.total() >= 200


def test_wrong_answers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from fuzz import fault

    good = '{"error": {"message": "no", "type": "invalid_request_error", "param": null, "code": null}}'
    assert fault(400, good) == ("400", None)
    assert fault(200, '{"choices": [1]}') == ("200", None)
    assert fault(200, "data: {}\n\ndata: [DONE]\n\n") == ("200 stream", None)
    assert fault(200, f"data: {{}}\n\ndata: {good}\n\n") == ("200 error event", None)
    for status, text in (
        (500, good),
        (302, good),
        (400, "Internal Server Error"),
        (400, "{}"),
        (400, good.replace("no", r"two\nlines")),
        (400, good.replace("invalid_request_error", "server_error")),
        (200, "{}"),
        (200, "data: {}\n\ndata: {}"),
        (200, "data: {}\n\ndata: {}\n\n"),
    ):
        assert fault(status, text)[1] is not None, (status, text)
