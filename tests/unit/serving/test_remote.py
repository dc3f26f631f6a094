"""``ssd chat`` and ``ssd top`` against a scripted server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ssd.cli.app import make_app
from ssd.errors import PipelineError, UsageError
from ssd.serving.remote import Rates, Remote, Sample, rates, read_metrics
from ssd.testing.twins.served import Served

KEY = "a-key-of-at-least-16"
app = make_app()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.close()


def url(served: Served) -> str:
    return f"http://127.0.0.1:{served.port}"


def test_chat(served: Served) -> None:
    answer = CliRunner().invoke(app, ["chat", "--url", url(served), "--max-tokens", "9", "--seed", "3"], input="hi\n\n")
    assert answer.exit_code == 0, answer.output
    assert served.text("hi\n", 3, 9).strip() in answer.output.replace("\r", "")
    assert "rounds" in answer.output


def test_chat_commands(served: Served) -> None:
    said = "hi\nmore\n/stats\n/clear\nhi\n\n"
    answer = CliRunner().invoke(app, ["chat", "--url", url(served), "--max-tokens", "9", "--seed", "3"], input=said)
    assert answer.exit_code == 0, answer.output
    assert "2 answers, 18 tokens" in answer.output and "a new conversation" in answer.output
    assert answer.output.count(served.text("hi\n", 3, 9).strip()) == 2  # /clear forgot what came between


def test_chat_shows_why_the_server_refuses(served: Served) -> None:
    answer = CliRunner().invoke(app, ["chat", "--url", url(served), "--max-tokens", "99999"], input="hi\n\n")
    assert answer.exit_code == 0 and "max_model_len" in answer.output


def test_top(served: Served) -> None:
    answer = CliRunner().invoke(app, ["top", "--url", url(served), "--interval", "0.1", "--count", "2"])
    assert answer.exit_code == 0, answer.output
    assert "0 running, 0 waiting" in answer.output and "acceptance" in answer.output


def test_nobody_there() -> None:
    answer = CliRunner().invoke(app, ["top", "--url", "http://127.0.0.1:9"])
    assert answer.exit_code == 3 and "ssd serve" in answer.output


@pytest.mark.parametrize("url", ["ftp://x", "", "http://", "http://[", "http://x:port", "http://x:99999", "//"])
def test_urls_that_are_not_one(url: str) -> None:
    with pytest.raises(UsageError, match="not the URL"):
        Remote(url)


def test_a_server_that_is_not_ours(served: Served) -> None:
    with pytest.raises(PipelineError, match="ssd serve"):
        Remote(url(served)).get("/")  # a page, not JSON


def test_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    server = Served(f"server.api_key_file={keys}")
    try:
        command = ["top", "--url", url(server), "--interval", "0.1", "--count", "1"]
        assert CliRunner().invoke(app, command).exit_code == 2
        assert CliRunner().invoke(app, [*command, "--api-key-file", str(keys)]).exit_code == 0
    finally:
        server.close()


def test_rates_are_differences() -> None:
    text = """# HELP x
ssd:generation_tokens_total{provenance="hit"} 30.0
ssd:generation_tokens_total{provenance="bonus"} 10.0
ssd:request_success_total{finished_reason="length"} 2.0
ssd:spec_decode_num_drafts_total 10.0
ssd:spec_decode_num_draft_tokens_total 40.0
ssd:spec_decode_num_accepted_tokens_total 30.0
ssd:spec_decode_num_forecast_hits_total 6.0
ssd:spec_decode_num_forecast_misses_total 4.0
ssd:rounds_total 10.0
ssd:round_seconds_total 2.0
ssd:verifier_forward_seconds_total 1.0
ssd:verifier_wait_seconds_total 0.5
ssd:verifier_jit_wait_seconds_total 0.25
ssd:draft_forecast_seconds_total 1.0
"""
    told = rates(Sample(values={}, at_s=1.0), Sample(values=read_metrics(text), at_s=5.0))
    assert told == Rates(
        tokens_per_s=10.0,
        requests_per_s=0.5,
        acceptance_rate=0.75,
        acceptance_length=4.0,
        hit_rate=0.6,
        round_ms=200.0,
        forward_share=0.5,
        wait_share=0.25,
        jit_share=0.125,
        draft_busy_share=0.625,
        provenance={"bonus": 0.25, "hit": 0.75},
    )
    again = Sample(values=read_metrics(text), at_s=6.0)
    nothing = rates(again, again)
    assert nothing.acceptance_rate is None and nothing.tokens_per_s == 0 and nothing.provenance == {}
