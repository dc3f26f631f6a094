"""One conversation through every front door: the same tokens, tool calls and reasoning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.runtime.plan import Plan
from ssd.pipeline.transport.messages import Submit
from ssd.serving.anthropic.writer import BROKEN
from ssd.testing.twins.pipeline import ScriptedPipeline
from ssd.testing.twins.served import SOON_S, Served

TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% for call in message.tool_calls or [] %}CALL {{ call.id }} {{ call.function.name }}
{% endfor %}{% endfor %}{% if tools %}TOOLS {{ tools | tojson }}
{% endif %}{% if enable_thinking %}<think>
{% endif %}{% if template_knows %}<tool_call><think></think>{% endif %}"""
PLAIN = "{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CITY = '{"city":  "Paris"}'
CALLS = (
    f'Let me look.\n<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
CHAT_TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},
]
RESPONSES_TOOLS: list[Any] = [{"type": "function", **tool["function"]} for tool in CHAT_TOOLS]  # type: ignore[dict-item]
MESSAGES_TOOLS: list[Any] = [
    {"name": "get_weather", "input_schema": SCHEMA},
    {"name": "now", "input_schema": {"type": "object"}},
]


class Saying:
    """A server whose model answers the text after ``SAY`` in the last message."""

    def __init__(self, folder: Path):
        (folder / "template.jinja").write_text(TEMPLATE)
        self.prompts: list[str] = []
        self.served = Served(f"server.chat_template={folder}/template.jinja", launch=self._launch, round_s=0.0)
        self.openai = self.served.client()
        url = f"http://127.0.0.1:{self.served.port}"
        self.anthropic = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=SOON_S)

    def _launch(self, plan: Plan) -> ScriptedPipeline:
        def answer(submit: Submit) -> list[int]:
            prompt = self.served.engine.tokenizer.decode(submit.prompt)
            if not self.prompts or self.prompts[-1] != prompt:
                self.prompts.append(prompt)
            said = prompt.rpartition("SAY ")[2].partition("\nTOOLS")[0].removesuffix("<think>\n").removesuffix("\n")
            return self.served.engine.tokenizer.encode(said, add_special_tokens=False)

        return ScriptedPipeline(plan, round_s=0.0, answer=answer)

    def response(self, given: str | list[Any], **fields: Any) -> Any:
        """Returns a whole response, after it was checked against the streamed one."""
        asked = {"model": "tiny", "input": given, "max_output_tokens": 200, **fields}
        whole = self.openai.responses.create(**asked)
        with self.openai.responses.stream(**asked) as stream:
            for event in stream:
                EVENT.validate_python(event.model_dump(warnings=False, by_alias=True))
            final = event.response  # type: ignore[attr-defined]
        assert comparable(whole) == comparable(final)
        return whole

    def message(self, given: str | list[Any], **fields: Any) -> Any:
        """Returns a whole message, after it was checked against the streamed one."""
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
        asked: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 200, **fields}
        whole = self.anthropic.messages.create(**asked)
        with self.anthropic.messages.stream(**asked) as stream:
            final = stream.get_final_message()
        kept = [[block.model_dump(exclude={"id", "parsed_output"}) for block in m.content] for m in (whole, final)]
        assert kept[0] == kept[1] and whole.stop_reason == final.stop_reason
        return whole


def comparable(response: Any) -> tuple[Any, ...]:
    """What a whole and a streamed response have in common."""
    own = {"id", "call_id", "parsed_arguments"}
    output = [item.model_dump(exclude=own, warnings=False) for item in response.output]
    for item in output:
        for part in item.get("content") or []:
            part.pop("parsed", None)
    return response.status, output


@pytest.fixture(scope="module")
def saying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saying]:
    server = Saying(tmp_path_factory.mktemp("template"))
    yield server
    server.served.close()


def test_calls_of_a_response(saying: Saying) -> None:
    response = saying.response(f"SAY {CALLS}", tools=RESPONSES_TOOLS)
    _, *calls = response.output
    assert (response.status, response.output_text) == ("completed", "Let me look.")
    assert [(call.type, call.name, call.arguments) for call in calls] == [
        ("function_call", "get_weather", CITY),
        ("function_call", "now", "{}"),
    ]
    assert len({call.call_id for call in calls}) == 2
    # The client's own dump is the history of the next request.
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain SAY ok"} for call in calls]
    history = [{"role": "user", "content": "Weather?"}, *(item.model_dump() for item in response.output), *results]
    by_items = saying.response(history)
    prompt = saying.prompts[-1]
    for call in calls:
        assert f"CALL {call.call_id} {call.name}" in prompt
    assert prompt.count("tool: rain") == 2 and by_items.output_text == "ok"
    # Referring to the response gives the same prompt, except for the first question.
    saying.response(results, previous_response_id=response.id)
    assert saying.prompts[-1] == prompt.replace("Weather?", f"SAY {CALLS}")


def test_calls_of_a_message(saying: Saying) -> None:
    message = saying.message(f"SAY {CALLS}", tools=MESSAGES_TOOLS)
    text, *calls = message.content
    assert (message.stop_reason, text.text) == ("tool_use", "Let me look.")
    assert [(call.type, call.name, call.input) for call in calls] == [
        ("tool_use", "get_weather", {"city": "Paris"}),
        ("tool_use", "now", {}),
    ]
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "rain SAY ok"} for call in calls]
    history = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": [block.model_dump() for block in message.content]},
        {"role": "user", "content": results},
    ]
    assert saying.message(history).content[0].text == "ok"
    for call in calls:
        assert f"CALL {call.id} {call.name}" in saying.prompts[-1]
    assert saying.prompts[-1].count("tool: rain") == 2


def test_the_same_prompt_through_every_door(saying: Saying) -> None:
    for choice, other in (("auto", "auto"), ("none", "none")):
        saying.prompts.clear()
        messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "SAY hi"}]
        saying.openai.chat.completions.create(
            model="tiny", messages=messages, tools=CHAT_TOOLS, tool_choice=choice, max_tokens=50
        )
        saying.response("SAY hi", instructions="Be brief", tools=RESPONSES_TOOLS, tool_choice=choice)
        saying.message("SAY hi", system="Be brief", tools=MESSAGES_TOOLS, tool_choice={"type": other})
        assert len(set(saying.prompts)) == 1 and ("TOOLS" in saying.prompts[0]) == (choice == "auto")


def test_one_call_at_a_time(saying: Saying) -> None:
    response = saying.response(f"SAY {CALLS}", tools=RESPONSES_TOOLS, parallel_tool_calls=False)
    assert [item.type for item in response.output] == ["message", "function_call"]
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    message = saying.message(f"SAY {CALLS}", tools=MESSAGES_TOOLS, tool_choice=choice)
    assert [block.type for block in message.content] == ["text", "tool_use"]


def test_reasoning(saying: Saying) -> None:
    thought = "SAY Well.\n</think>\n\nParis."
    switch = {"chat_template_kwargs": {"enable_thinking": True}}
    response = saying.response(thought, extra_body=switch)
    reasoning, text = response.output
    assert (reasoning.type, reasoning.content[0].text, text.content[0].text) == ("reasoning", "Well.", "Paris.")
    tokens = len(saying.served.engine.tokenize("Well.", add_special_tokens=False))
    assert response.usage.output_tokens_details.reasoning_tokens == tokens > 0
    message = saying.message(thought, thinking={"type": "enabled", "budget_tokens": 1024})
    thinking, text = message.content
    assert (thinking.type, thinking.thinking, text.text) == ("thinking", "Well.", "Paris.")
    assert message.usage.output_tokens_details.thinking_tokens == tokens
    # Without thinking the same text is no reasoning.
    assert saying.message("SAY Paris.", thinking={"type": "disabled"}).content[0].text == "Paris."


def test_a_cut_call(saying: Saying) -> None:
    response = saying.response(f"SAY {CALLS}", tools=RESPONSES_TOOLS, max_output_tokens=30)
    call = response.output[-1]
    assert (response.status, call.status) == ("incomplete", "incomplete")
    assert call.arguments and CITY.startswith(call.arguments)
    messages: list[Any] = [{"role": "user", "content": f"SAY {CALLS}"}]
    message = saying.anthropic.messages.create(model="tiny", tools=MESSAGES_TOOLS, messages=messages, max_tokens=30)
    use = message.content[-1]
    assert message.stop_reason == "max_tokens" and message.usage.output_tokens == 30
    assert use.type == "tool_use" and use.input == {BROKEN: call.arguments}


def test_an_answer_that_continues_the_clients(saying: Saying) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "The answer SAY is 4"}]
    assert saying.message(messages).content[0].text == "is 4"
    assert saying.prompts[-1].endswith("SAY is 4")


class Point(BaseModel):
    x: int


def test_parsed_output(saying: Saying) -> None:
    """The schema goes to the engine: the scripted model happens to follow it."""
    parsed = saying.openai.responses.parse(model="tiny", input='SAY {"x": 4}', text_format=Point)
    assert parsed.output_parsed == Point(x=4)
    with saying.openai.responses.stream(model="tiny", input='SAY {"x": 4}', text_format=Point) as stream:
        assert stream.get_final_response().output_parsed == Point(x=4)
    message = saying.anthropic.messages.parse(
        model="tiny", max_tokens=50, messages=[{"role": "user", "content": 'SAY {"x": 4}'}], output_format=Point
    )
    assert message.parsed_output == Point(x=4)


def test_foreign_fields_are_named(saying: Saying) -> None:
    body = {"model": "tiny", "input": "SAY ok", "strange": 1}
    status, headers, _ = saying.served.ask("POST", "/v1/responses", body)
    assert status == 200 and "strange" in headers["x-ssd-ignored-parameters"]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "SAY ok"}], "max_tokens": 5, "strange": 1}
    status, headers, _ = saying.served.ask("POST", "/v1/messages", body)
    assert status == 200 and "strange" in headers["x-ssd-ignored-parameters"]


@pytest.fixture(scope="module")
def real(tiny_config: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    template = tmp_path_factory.mktemp("plain") / "template.jinja"
    template.write_text(PLAIN)
    server = Served(f"server.chat_template={template}", config=tiny_config(), launch=InprocPipeline)
    yield server
    server.close()


CONVERSATION = [("system", "ab"), ("user", "cd"), ("assistant", "ef"), ("user", "gh")]


def asked(path: str, stream: bool, **sampling: Any) -> dict[str, Any]:
    """The body that asks a door for the conversation."""
    messages = [{"role": role, "content": content} for role, content in CONVERSATION]
    body: dict[str, Any] = {"model": "tiny", "stream": stream, **sampling}
    if path == "/v1/messages":
        return {**body, "max_tokens": 24, "system": "ab", "messages": messages[1:]}
    if path == "/v1/responses":
        return {**body, "max_output_tokens": 24, "instructions": "ab", "input": messages[1:]}
    return {**body, "max_tokens": 24, "messages": messages}


def answered(path: str, stream: bool, text: str) -> str:
    """The text of an answer."""
    if not stream:
        answer = json.loads(text)
        if path == "/v1/messages":
            return "".join(block["text"] for block in answer["content"])
        if path == "/v1/responses":
            return "".join(part["text"] for item in answer["output"] for part in item["content"])
        return answer["choices"][0]["message"]["content"]
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    if path == "/v1/messages":
        return "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    if path == "/v1/responses":
        return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


@pytest.mark.parametrize("temperature", [0, 1])
def test_the_same_text_through_every_door(real: Served, temperature: int) -> None:
    texts: dict[tuple[Any, ...], str] = {}
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
        for stream in (False, True):
            for method in ("none", "ssd"):
                body = asked(path, stream, temperature=temperature, seed=5, method=method, ignore_eos=True)
                status, _, text = real.ask("POST", path, body)
                assert status == 200, text
                texts[path, stream, method] = answered(path, stream, text)
    assert len(set(texts.values())) == 1 and next(iter(texts.values())), texts
