"""Tools over HTTP: what OpenAI's own client sends and reads, streamed and whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field
from tokenizers import AddedToken

from ssd.pipeline.runtime.plan import Plan
from ssd.pipeline.transport.messages import Submit
from ssd.testing.models.tiny import tiny_model, tiny_tokenizer
from ssd.testing.twins.pipeline import ScriptedPipeline
from ssd.testing.twins.served import Served

TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if tools %}TOOLS {{ tools | tojson }}
{% endif %}{% if thinking %}<think>
{% endif %}{% if template_knows %}<tool_call><think></think>{% endif %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CITY = '{"city":  "Paris"}'
CALLS = (
    f'Let me look.\n<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


class Saying:
    """A server whose model answers the text after ``SAY`` in the last message."""

    def __init__(self, folder: Path, config: dict[str, Any] | str = "embedded"):
        (folder / "template.jinja").write_text(TEMPLATE)
        self.prompts: list[str] = []
        self.params: list[Any] = []
        template = f"server.chat_template={folder}/template.jinja"
        self.served = Served(template, launch=self._launch, round_s=0.0, config=config)
        self.client = self.served.client()

    def _launch(self, plan: Plan) -> ScriptedPipeline:
        def answer(submit: Submit) -> list[int]:
            prompt = self.served.engine.tokenizer.decode(submit.prompt)
            if submit.params not in self.params:
                self.prompts.append(prompt)
                self.params.append(submit.params)
            said = prompt.rpartition("SAY ")[2].partition("\nTOOLS")[0].removesuffix("<think>\n").removesuffix("\n")
            return self.served.engine.tokenizer.encode(said, add_special_tokens=False)

        return ScriptedPipeline(plan, round_s=0.0, answer=answer)

    def ask(self, say: str, **fields: Any) -> Any:
        """Returns the choice of a whole answer, after it was checked against the streamed one."""
        asked = {"model": "tiny", "messages": [{"role": "user", "content": f"SAY {say}"}], "max_tokens": 200, **fields}
        self.prompts, self.params = [], []
        whole = self.client.chat.completions.create(**asked).choices[0]
        text, reasoning, reason = "", "", None
        calls: dict[int, list[str]] = {}
        for chunk in self.client.chat.completions.create(**asked, stream=True):
            [choice] = chunk.choices
            text += choice.delta.content or ""
            reasoning += (choice.delta.model_extra or {}).get("reasoning", "")
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                if call.id is not None:
                    calls[call.index] = [call.function.name, ""]
                calls[call.index][1] += call.function.arguments
        message = whole.message
        assert (text or None, reason) == (message.content or None, whole.finish_reason)
        assert [tuple(call) for call in calls.values()] == called(message)
        assert reasoning == (message.model_extra or {}).get("reasoning", "")
        return whole


def called(message: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


@pytest.fixture(scope="module")
def saying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saying]:
    server = Saying(tmp_path_factory.mktemp("template"))
    yield server
    server.served.close()


def test_calls(saying: Saying) -> None:
    choice = saying.ask(CALLS, tools=[WEATHER, NOW])
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    assert called(choice.message) == [("get_weather", CITY), ("now", "{}")]
    assert "TOOLS" in saying.prompts[0] and '"description": "Weather of a city"' in saying.prompts[0]
    assert saying.params[0].structured_outputs is None


def test_content_is_null_beside_calls_only(saying: Saying) -> None:
    choice = saying.ask(CALLS.partition("\n")[2], tools=[WEATHER, NOW])
    assert choice.message.content is None and len(choice.message.tool_calls) == 2


def test_ids_differ(saying: Saying) -> None:
    answers = [saying.ask(CALLS, tools=[WEATHER, NOW]) for _ in range(2)]
    ids = {call.id for choice in answers for call in choice.message.tool_calls}
    assert len(ids) == 4 and all(id.startswith("call_") for id in ids)


def test_a_cut_call_is_kept(saying: Saying) -> None:
    choice = saying.ask(CALLS, tools=[WEATHER], max_tokens=40)
    assert choice.finish_reason == "length"
    [(name, arguments)] = called(choice.message)
    assert name == "get_weather" and arguments and CITY.startswith(arguments)


def test_what_is_no_call_is_text(saying: Saying) -> None:
    text = '<tool_call>{"name": 5}</tool_call> and more'
    choice = saying.ask(text, tools=[WEATHER])
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")


@pytest.mark.parametrize(
    "fields", [{}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}], ids=["", "empty", "none"]
)
def test_without_tools_a_call_is_text(saying: Saying, fields: dict[str, Any]) -> None:
    choice = saying.ask(CALLS, **fields)
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALLS, None, "stop")
    assert "TOOLS" not in saying.prompts[0]


def test_one_call_where_parallel_ones_are_off(saying: Saying) -> None:
    choice = saying.ask(CALLS, tools=[WEATHER, NOW], parallel_tool_calls=False)
    assert called(choice.message) == [("get_weather", CITY)]


NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"tool_choice": "required"}, ["get_weather", "now"]),
        ({"tool_choice": NAMED}, ["get_weather"]),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}},
            ["get_weather"],
        ),
        ({"tools": [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}, NOW]}, ["get_weather", "now"]),
        ({"response_format": {"type": "json_object"}}, ["get_weather", "now"]),
    ],
    ids=["required", "named", "allowed", "strict", "response_format"],
)
def test_what_is_forced_is_a_grammar(saying: Saying, fields: dict[str, Any], names: list[str]) -> None:
    saying.ask(CALLS.partition("\n")[2], **{"tools": [WEATHER, NOW], **fields})
    grammar = saying.params[0].structured_outputs.grammar
    assert [name for name in ("get_weather", "now") if f'\\"name\\": \\"{name}\\"' in grammar] == names
    assert '"TOOLS' not in grammar and all(name in saying.prompts[0] for name in ("get_weather", "now"))


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "only allowed with tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice", "'other'"),
        ({"tool_choice": "maybe"}, "tool_choice", "'none', 'auto' or 'required'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "function: Field required"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools.0.type: Input should be 'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "tools.0.function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
            "tools",
            "object",
        ),
        ({"tools": [{"type": "function", "function": {}}]}, "tools", "tools.0.function.name"),
        ({"tool_choice": "required", "structured_outputs": {"regex": "a"}}, "structured_outputs", "cannot both"),
        ({"functions": [{"name": "f"}]}, "functions", "old name of tools"),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {"type": "function", "function": {"name": "a", "parameters": {"properties": {"x": {"type": "z"}}}}}
                ],
            },
            "tools",
            "cannot be used",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(saying: Saying, fields: dict[str, Any], param: str, said: str) -> None:
    body = {"messages": [{"role": "user", "content": "SAY x"}], "tools": [WEATHER], **fields}
    status, _, text = saying.served.ask("POST", "/v1/chat/completions", body)
    error = json.loads(text)["error"]
    assert (status, error["param"]) == (400, param), error
    assert said in error["message"]


def test_reasoning_apart_from_text(saying: Saying) -> None:
    choice = saying.ask("Well, <b>.\n</think>\n\nParis.", extra_body={"chat_template_kwargs": {"thinking": True}})
    assert choice.message.content == "Paris."
    assert choice.message.reasoning == choice.message.reasoning_content == "Well, <b>."
    cut = saying.ask("Well, and", extra_body={"chat_template_kwargs": {"thinking": True}})
    assert (cut.message.content, cut.message.reasoning) == (None, "Well, and")
    assert saying.ask("<think>Well</think>Paris.").message.reasoning == "Well"


def test_json_without_tools_comes_after_reasoning(saying: Saying) -> None:
    choice = saying.ask(
        'Well</think>{"a": 1}',
        response_format={"type": "json_object"},
        extra_body={"chat_template_kwargs": {"thinking": True}},
    )
    assert (choice.message.content, choice.message.reasoning) == ('{"a": 1}', "Well")
    assert "answer: %json" in saying.params[0].structured_outputs.grammar


def test_text_that_is_free_of_markers_is_unchanged(saying: Saying) -> None:
    text = '  {"a": "<b>"} and\n\n <tool spaces '
    for fields in ({}, {"tools": [WEATHER]}):
        assert saying.ask(text, **fields).message.content == text


class GetWeather(BaseModel):
    """Weather of a city."""

    city: str = Field(min_length=1)


class Step(BaseModel):
    say: str


def test_clients_parse_with_pydantic_tools(saying: Saying) -> None:
    said = f'<tool_call>\n{{"name": "GetWeather", "arguments": {CITY}}}\n</tool_call>'
    fields: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": f"SAY {said}"}],
        "tools": [openai.pydantic_function_tool(GetWeather)],
        "response_format": Step,
    }
    [choice] = saying.client.chat.completions.parse(**fields).choices
    assert choice.message.tool_calls[0].function.parsed_arguments == GetWeather(city="Paris")
    with saying.client.chat.completions.stream(**fields) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0].message
    assert final.tool_calls[0].function.parsed_arguments == GetWeather(city="Paris")
    deltas = [event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(deltas) == CITY and len(deltas) > 1
    [done] = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert done.arguments == CITY


def test_a_conversation_with_a_tool(saying: Saying) -> None:
    """The answer goes back as the client gives it, with the tool's result."""
    first = saying.ask(CALLS, tools=[WEATHER, NOW]).message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in first.tool_calls]
    answer = saying.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "?"}, first, *results, {"role": "user", "content": "SAY It is sunny."}],
        tools=[WEATHER, NOW],
    )
    assert answer.choices[0].message.content == "It is sunny."
    assert "tool: sunny" in saying.prompts[-1]


def test_calls_through_the_other_front_doors(saying: Saying) -> None:
    flat = {"type": "function", **WEATHER["function"], "strict": False}
    said = saying.client.responses.create(model="tiny", input=f"SAY {CALLS}", tools=[flat], max_output_tokens=200)
    found = [(item.name, item.arguments) for item in said.output if item.type == "function_call"]
    assert found == [("get_weather", CITY), ("now", "{}")]
    tool = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}
    body = {
        "model": "tiny",
        "max_tokens": 200,
        "messages": [{"role": "user", "content": f"SAY {CALLS}"}],
        "tools": [tool],
    }
    status, _, text = saying.served.ask("POST", "/v1/messages", body)
    answer = json.loads(text)
    assert (status, answer["stop_reason"]) == (200, "tool_use")
    assert [block["type"] for block in answer["content"]] == ["text", "tool_use", "tool_use"]
    assert answer["content"][1]["input"] == {"city": "Paris"}


VOCABULARY = 400
"""From 324 ids on the tiny tokenizer spells every byte."""


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saying]:
    """A server of a model whose markers are special tokens."""
    folder = tmp_path_factory.mktemp("mistral")
    tokenizer = tiny_tokenizer(VOCABULARY)
    tokenizer.add_tokens([AddedToken(text, special=True) for text in ("[TOOL_CALLS]", "[ARGS]", "<|odd|>")])
    for role in ("target", "draft"):
        tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    models = {role: {"model": str(folder / role)} for role in ("target", "draft")}
    server = Saying(folder, {**models, "engine": {"max_model_len": 1024}})
    yield server
    server.served.close()


def test_markers_that_are_special_tokens(mistral: Saying) -> None:
    choice = mistral.ask(f"I <|odd|>look.[TOOL_CALLS]get_weather[ARGS]{CITY}", tools=[WEATHER])
    assert (choice.message.content, called(choice.message)) == ("I look.", [("get_weather", CITY)])
    assert len(choice.message.tool_calls[0].id) == 9
    shown = mistral.ask("I <|odd|>look.", tools=[WEATHER], extra_body={"skip_special_tokens": False})
    assert shown.message.content == "I <|odd|>look."
    assert mistral.ask("I <|odd|>look.").message.content == "I look."


def test_forced_calls_begin_with_the_special_token(mistral: Saying) -> None:
    mistral.ask(f"[TOOL_CALLS]get_weather[ARGS]{CITY}", tools=[WEATHER], tool_choice="required")
    marker = mistral.served.engine.tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    assert f'<[{marker}]> ("get_weather"' in mistral.params[0].structured_outputs.grammar
