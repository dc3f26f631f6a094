"""What pages of other origins may read."""

from __future__ import annotations

from ssd.testing.twins.served import Served

ORIGIN = "http://page.example"


def test_pages_may_read_the_headers_of_answers() -> None:
    server = Served(f"server.allowed_origins=[{ORIGIN}]")
    try:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 2, "no_such_field": 1}
        status, headers, _ = server.ask("POST", "/v1/completions", body, {"origin": ORIGIN})
        exposed = {name.strip() for name in headers["access-control-expose-headers"].split(",")}
        assert status == 200 and "no_such_field" in headers["x-ssd-ignored-parameters"]
        assert {"x-ssd-ignored-parameters", "x-ssd-max-tokens", "x-request-id", "request-id"} <= exposed
        assert {name for name in headers if name.startswith("x-ssd-")} <= exposed
    finally:
        server.close()
