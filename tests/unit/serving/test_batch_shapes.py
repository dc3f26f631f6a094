"""Batch files in OpenAI's shapes: results, answers that are errors, and lines that are not requests."""

from __future__ import annotations

import asyncio
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ssd.config.load import load_config
from ssd.errors import UsageError
from ssd.serving.batch.lines import MAX_LINE_BYTES
from ssd.serving.batch.run import Batch
from ssd.testing.twins.pipeline import ScriptedPipeline

BODY = {"model": "embedded", "prompt": "x", "max_tokens": 3}
CHAT = {"model": "embedded", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


def run(folder: Path, *lines: Any, settings: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Runs a batch of the lines. Returns the records of the output and of the error file."""
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    source.write_bytes(b"\n".join(raw))
    config = load_config("embedded", ["engine.max_batch=3", *settings])
    asyncio.run(Batch(config, source, out, launch=partial(ScriptedPipeline, round_s=0.001)).run())
    errors = out.with_name("out.jsonl.errors")
    return tuple(  # type: ignore[return-value]
        [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [] for path in (out, errors)
    )


def openai_line(id: Any = "a", **changes: Any) -> dict[str, Any]:
    line = {"custom_id": id, "method": "POST", "url": "/v1/completions", "body": BODY, **changes}
    return {name: value for name, value in line.items() if value is not ...}


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_result(tmp_path: Path, kind: str) -> None:
    url, body = {"completion": ("/v1/completions", BODY), "chat": ("/v1/chat/completions", CHAT)}[kind]
    [one, two], errors = run(tmp_path, openai_line("a", url=url, body=body), openai_line("b", url=url, body=body))
    assert errors == []
    for record, id in ((one, "a"), (two, "b")):
        assert list(record) == ["id", "custom_id", "response", "error"]
        assert re.fullmatch(r"batch_req_\w+", record["id"]) and record["custom_id"] == id and record["error"] is None
        assert list(record["response"]) == ["status_code", "request_id", "body"]
        assert record["response"]["status_code"] == 200 and re.fullmatch(r"req_\w+", record["response"]["request_id"])
        assert record["response"]["body"]["usage"]["completion_tokens"] == 3
    assert one["id"] != two["id"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"prompt": ["x"] * 200}, 400, "n"),
        ({"model": "other"}, 404, "model"),
        ({"structured_outputs": {"regex": "("}}, 400, "structured_outputs"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_an_answer_that_is_an_error(tmp_path: Path, body: dict[str, Any], status: int, param: str) -> None:
    good, [record] = run(tmp_path, openai_line("a", body={**BODY, **body}), openai_line("b"))
    assert [one["custom_id"] for one in good] == ["b"]
    assert list(record) == ["id", "custom_id", "response", "error"]
    assert re.fullmatch(r"batch_req_\w+", record["id"]) and record["custom_id"] == "a" and record["error"] is None
    assert record["response"]["status_code"] == status and record["response"]["request_id"].startswith("req_")
    error = record["response"]["body"]["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param


@pytest.mark.parametrize(
    ("line", "id", "code", "param"),
    [
        (b"{not json", None, "invalid_json_line", None),
        (b"", None, None, None),
        (b"[1]", None, "invalid_json_line", None),
        (b"\xff\xfe", None, "invalid_json_line", None),
        (b'{"custom_id": "b", "custom_id": "c"}', None, "invalid_json_line", None),
        (b'{"custom_id": "' + b"x" * MAX_LINE_BYTES + b'"}', None, "line_too_long", None),
        (openai_line("a"), "a", "duplicate_custom_id", "custom_id"),
        (openai_line(...), None, "missing_required_parameter", "custom_id"),
        (openai_line(7), None, "invalid_custom_id", "custom_id"),
        (openai_line(""), None, "invalid_custom_id", "custom_id"),
        (openai_line("b", method=...), "b", "missing_required_parameter", "method"),
        (openai_line("b", method="GET"), "b", "invalid_method", "method"),
        (openai_line("b", url=...), "b", "missing_required_parameter", "url"),
        (openai_line("b", url="/v1/embeddings"), "b", "invalid_url", "url"),
        (openai_line("b", url="/v1/moderations"), "b", "invalid_url", "url"),
        (openai_line("b", url="/v1/completions/"), "b", "invalid_url", "url"),
        (openai_line("b", url=None), "b", "invalid_url", "url"),
        (openai_line("b", body=...), "b", "missing_required_parameter", "body"),
        (openai_line("b", body="x"), "b", "invalid_type", "body"),
        (openai_line("b", body={**BODY, "stream": True}), "b", "invalid_value", "body.stream"),
    ],
    ids=lambda value: None if isinstance(value, bytes | dict) else str(value),
)
def test_a_line_that_is_not_a_request(tmp_path: Path, line: Any, id: str | None, code: str, param: str) -> None:
    """It has the shape of OpenAI's lines wherever it stands, also as the first or the last line."""
    good, errors = run(tmp_path, openai_line("a"), line, openai_line("z"))
    assert [one["custom_id"] for one in good] == ["a", "z"]
    if line == b"":
        assert errors == []
        return
    [record] = errors
    assert list(record) == ["id", "custom_id", "response", "error"]
    assert re.fullmatch(r"batch_req_\w+", record["id"]) and record["response"] is None and record["custom_id"] == id
    assert set(record["error"]) == {"code", "message", "param", "line"}
    assert (record["error"]["code"], record["error"]["param"], record["error"]["line"]) == (code, param, 2)
    if code == "invalid_url" and isinstance(line["url"], str):
        assert line["url"] in record["error"]["message"]


@pytest.mark.parametrize(
    ("lines", "openai"),
    [
        ([b"{", b"7", openai_line()], True),
        ([b"{", {"prompt": "x"}, openai_line()], False),
        ([openai_line(), b"{", {"prompt": "x"}], True),
        ([openai_line(), {"prompt": "x"}, b"{"], False),
        ([b"{"], False),
    ],
    ids=["before openai", "before plain", "after openai", "after plain", "alone"],
)
def test_a_line_that_cannot_be_read_has_the_format_of_its_neighbours(
    tmp_path: Path, lines: list[Any], openai: bool
) -> None:
    _, errors = run(tmp_path, *lines)
    assert errors and all(("custom_id" in record) == openai for record in errors)


def test_unknown_keys_beside_the_body_are_ignored(tmp_path: Path) -> None:
    [record], errors = run(tmp_path, openai_line("a", metadata={"source": 1}, priority="low"))
    assert record["custom_id"] == "a" and errors == []


def test_a_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbf" + json.dumps(openai_line("a")).encode() + b"\r",
        json.dumps(openai_line("b")).encode() + b"\r",
    ]
    good, errors = run(tmp_path, *lines)
    assert [record["custom_id"] for record in good] == ["a", "b"] and errors == []


def test_plain_lines_with_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    [chat, bare], [both, listed] = run(
        tmp_path,
        {"id": "chat", "messages": messages, "max_tokens": 5},
        {"messages": messages, "max_completion_tokens": 2},
        {"messages": messages, "prompt": "x"},
        {"prompt": ["x", "y"]},
    )
    assert chat["id"] == "chat" and chat["usage"]["completion_tokens"] == 5 and chat["finish_reason"] == "length"
    assert chat["message"]["role"] == "assistant" and chat["message"]["content"] == chat["text"] != ""
    assert bare["id"] == "line-2" and bare["usage"]["completion_tokens"] == 2
    assert both["error"]["param"] == "messages" and both["line"] == 3
    assert listed["error"]["param"] == "prompt" and listed["error"]["code"] != "internal_error"


def test_a_plain_line_without_a_length_takes_the_room_that_is_left(tmp_path: Path) -> None:
    lines = [{"prompt": [7] * 60}, {"prompt": "word " * 8}, {"prompt": [7] * 64}, {"prompt": [7] * 63}]
    good, [bad] = run(tmp_path, *lines, settings=("engine.max_model_len=64",))
    assert [r["usage"]["total_tokens"] for r in good] == [64] * 3
    assert bad["line"] == 3 and "64" in bad["error"]["message"]


def test_the_input_is_not_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x"}\n')
    for out in (source, tmp_path / "." / "in.jsonl"):
        with pytest.raises(UsageError, match="is the input"):
            Batch(load_config("embedded"), source, out, restart=True)
    assert source.read_text() == '{"prompt": "x"}\n'
