"""Anthropic's library, at /v1/messages."""

from __future__ import annotations

import anthropic
from checks import MODEL, QUESTION, URL, check, run

client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0, timeout=300)
ASKED = [{"role": "user", "content": QUESTION}]
EXACT = {"temperature": 0}
TOOL = {
    "name": "get_weather",
    "description": "Tells the weather.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
    },
}


@check
def create() -> None:
    answer = client.messages.create(model=MODEL, max_tokens=64, messages=ASKED, extra_body=EXACT)
    assert answer.role == "assistant" and "Paris" in answer.content[0].text
    assert answer.usage.input_tokens > 0 and answer.usage.output_tokens > 0
    again = [*ASKED, {"role": "assistant", "content": answer.content}, {"role": "user", "content": "Thank you."}]
    client.messages.create(model=MODEL, max_tokens=4, messages=again)


@check
def system_and_parts() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION, "cache_control": {"type": "ephemeral"}}]}]
    answer = client.messages.create(
        model=MODEL, max_tokens=8, messages=parts, system=[{"type": "text", "text": "Be brief."}], stop_sequences=["."]
    )
    assert answer.stop_reason in ("max_tokens", "stop_sequence", "end_turn")


@check
def stream() -> None:
    with client.messages.stream(model=MODEL, max_tokens=16, messages=ASKED, extra_body=EXACT) as stream:
        text = "".join(stream.text_stream)
        assert stream.get_final_message().content[0].text == text != ""
        assert stream.get_final_message().usage.output_tokens == 16 or len(text) > 8


@check
def tools() -> None:
    answer = client.messages.create(
        model=MODEL,
        max_tokens=96,
        messages=ASKED,
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        extra_body=EXACT,
    )
    call, *_ = [block for block in answer.content if block.type == "tool_use"]
    assert answer.stop_reason == "tool_use" and call.input["city"] in ("Paris", "Rome")
    told = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny."}
    client.messages.create(
        model=MODEL,
        max_tokens=8,
        tools=[TOOL],
        messages=[*ASKED, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [told]}],
    )


@check
def tools_stream() -> None:
    with client.messages.stream(
        model=MODEL,
        max_tokens=96,
        messages=ASKED,
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        extra_body=EXACT,
    ) as stream:
        kinds = {event.type for event in stream}
        call, *_ = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert "input_json" in kinds and call.input["city"] in ("Paris", "Rome")


@check
def count_tokens() -> None:
    assert client.messages.count_tokens(model=MODEL, messages=ASKED).input_tokens > 5


@check
def errors() -> None:
    for kind, fields in (
        (anthropic.NotFoundError, {"model": "no-such-model", "messages": ASKED}),
        (anthropic.BadRequestError, {"model": MODEL, "messages": []}),
    ):
        try:
            client.messages.create(max_tokens=4, **fields)
        except kind as error:
            assert error.body["type"] == "error" and error.body["error"]["message"]
        else:
            raise AssertionError(f"{fields} is not refused")


run()
