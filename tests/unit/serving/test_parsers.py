"""Parsers of tool calls and reasoning: what they find, and that cuts in the text make no difference."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd.serving.parsers.formats import CALL_FORMATS, REASONING_FORMATS, AnswerFormat, Tool
from ssd.serving.parsers.parts import Answer, WholeCall

TOOLS = (
    Tool(name="get_weather", schema={"type": "object", "properties": {"city": {"type": "string"}}}),
    Tool(name="add", schema={"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}),
)
HARMONY_PROMPT = "<|end|><|start|>assistant"
HIDDEN = ("<|im_start|>", "<|reserved_1|>")
FORMATS = {
    **{
        name: (AnswerFormat(calls=name, reasoning="none", tokens={}, hidden=(), special=False), "")
        for name in CALL_FORMATS
    },
    **{
        f"{calls}+{reasoning}{'+inside' * inside}": (
            AnswerFormat(calls=calls, reasoning=reasoning, tokens={}, hidden=HIDDEN, special=True),
            REASONING_FORMATS[reasoning][0] + "\n" if inside else "",
        )
        for calls, reasoning in (("hermes", "think"), ("hermes", "deepseek_r1"), ("mistral", "mistral"))
        for inside in (False, True)
    },
    "gpt_oss": (AnswerFormat(calls="gpt_oss", reasoning="gpt_oss", tokens={}, hidden=(), special=True), HARMONY_PROMPT),
    "gpt_oss+final": (
        AnswerFormat(calls="gpt_oss", reasoning="gpt_oss", tokens={}, hidden=(), special=True),
        HARMONY_PROMPT + "<|channel|>final<|message|>",
    ),
    "none": (AnswerFormat(calls="none", reasoning="none", tokens={}, hidden=(), special=False), ""),
}


def read(name: str, chunks: Iterable[str], **options: bool) -> Answer:
    format, prompt_end = FORMATS[name]
    parser = format.parser(prompt_end, tools=TOOLS, **options)(lambda index: f"{index}" * 64)
    parts = [part for chunk in chunks for part in parser.feed(chunk)]
    return Answer.of([*parts, *parser.finish()])


def calls(answer: Answer) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in answer.calls]


WEATHER, ADD = '{"city": "Paris"}', '{"a":1,  "b": [2]}'
FOUND: dict[str, list[tuple[str, str, str, list[tuple[str, str]]]]] = {
    "hermes": [
        (
            f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>',
            "",
            "",
            [("get_weather", WEATHER)],
        ),
        (
            f'Let me look. \n<tool_call>{{"arguments":{ADD},"name":"add"}}</tool_call>\n<tool_call>'
            f'{{"name": "get_weather", "arguments": {WEATHER}}}</tool_call> Done.',
            "Let me look.Done.",
            "",
            [("add", ADD), ("get_weather", WEATHER)],
        ),
        ('<tool_call>{"name": "add"}</tool_call>', "", "", [("add", "{}")]),
        ('<tool_call>{"name": "add", "arguments": {"a": "</tool_call>}', "", "", [("add", '{"a": "</tool_call>}')]),
        ('<tool_call>{"name": "add", "arguments": {}, "x"; 3', ', "x"; 3', "", [("add", "{}")]),
        ('<tool_call>{"name": add}</tool_call> ', '<tool_call>{"name": add}</tool_call> ', "", []),
        (
            '<tool_call>no</tool_call><tool_call>{"name":"add","arguments":{}}',
            "<tool_call>no</tool_call>",
            "",
            [("add", "{}")],
        ),
        ('<tool_call>{"name": "add", "arguments": [1]}', '<tool_call>{"name": "add", "arguments": [1]}', "", []),
        ('<tool_call>{"name": "\\ud800", "arguments": {}}', '<tool_call>{"name": "\\ud800", "arguments": {}}', "", []),
        ("<tool_call>", "<tool_call>", "", []),
        ("  no call <tool_cal ", "  no call <tool_cal ", "", []),
    ],
    "qwen3_xml": [
        (
            "Hm\n<tool_call>\n<function=get_weather>\n<parameter=city>\n12\n</parameter>\n</function>\n</tool_call>\n"
            "<tool_call>\n<function=add>\n<parameter=a>\n12\n</parameter>\n<parameter=b>\n[1, 2]</parameter>\n"
            "</function>",
            "Hm",
            "",
            [("get_weather", '{"city": "12"}'), ("add", '{"a": 12, "b": [1, 2]}')],
        ),
        ("<function=add></function></tool_call>!", "!", "", [("add", "{}")]),
        ("<function=add><parameter=a>1</parameter><parameter=b>x", "", "", [("add", '{"a": 1, "b": "x')]),
        ("<tool_call>function", "<tool_call>function", "", []),
        ("<function=add\n>", "<function=add\n>", "", []),
    ],
    "llama3_json": [
        (
            f'{{"name": "get_weather", "parameters": {WEATHER}}}; '
            f'{{"type": "function", "name": "add", "parameters": {ADD}}}',
            "",
            "",
            [("get_weather", WEATHER), ("add", ADD)],
        ),
        (f'I see <|python_tag|>{{"name": "add", "parameters": {ADD}}}', "I see", "", [("add", ADD)]),
        ('{"city": "Paris"}', '{"city": "Paris"}', "", []),
        ('{"name": "Paris"}', '{"name": "Paris"}', "", []),
        ('see {"name": "add", "parameters": {}}', 'see {"name": "add", "parameters": {}}', "", []),
        (" {", " {", "", []),
        ("<|python_tag|>print(1)", "<|python_tag|>print(1)", "", []),
        ('{"name": "add", "parameters": {}} then', "then", "", [("add", "{}")]),
    ],
    "mistral": [
        (
            f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {WEATHER}}}, {{"name": "add", "arguments": {ADD}}}]',
            "",
            "",
            [("get_weather", WEATHER), ("add", ADD)],
        ),
        (
            f"Well.[TOOL_CALLS]get_weather[ARGS]{WEATHER}[TOOL_CALLS]add[CALL_ID]abc123xyz[ARGS]{ADD}",
            "Well.",
            "",
            [("get_weather", WEATHER), ("add", ADD)],
        ),
        (f"[TOOL_CALLS]add{ADD}", "", "", [("add", ADD)]),
        ("[TOOL_CALLS] [1]", "[TOOL_CALLS] [1]", "", []),
        ('[TOOL_CALLS][{"name": "add", "arguments": {}}, 5]', ", 5]", "", [("add", "{}")]),
        ("[TOOL_CALLS]add", "[TOOL_CALLS]add", "", []),
    ],
    "gpt_oss": [
        (
            "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>final<|message|>Hello!",
            "Hello!",
            "Think.",
            [],
        ),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|><|start|>assistant"
            f"<|channel|>commentary to=functions.add <|constrain|>json<|message|>{ADD}<|call|>",
            "",
            "a\nb",
            [("add", ADD)],
        ),
        (f" to=functions.add<|channel|>commentary json<|message|>{ADD}", "", "", [("add", ADD)]),
        (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>x",
            "I look.\nx",
            "",
            [],
        ),
        ('{"plain": 1}', '{"plain": 1}', "", []),
        ("<|channel|>final", "final", "", []),
    ],
    "gpt_oss+final": [("Hello<|return|>", "Hello", "", [])],
    "hermes+think": [
        ("<think>\nWell\n</think>\n\nHi <|im_start|>there <think>", "Hi there <think>", "Well", []),
        (" Hi </think>", " Hi </think>", "", []),
        (
            '<think>a<tool_call></think><tool_call>{"name":"add","arguments":{}}</tool_call>',
            "",
            "a<tool_call>",
            [("add", "{}")],
        ),
        ("<think>never", "", "never", []),
    ],
    "hermes+think+inside": [("Well</think>Hi", "Hi", "Well", []), ("<think>\nWell</think>Hi", "Hi", "Well", [])],
    "hermes+deepseek_r1": [("Well</think>Hi", "Hi", "Well", [])],
    "mistral+mistral": [("[THINK]Well[/THINK]Hi[TOOL_CALLS]add[ARGS]{}", "Hi", "Well", [("add", "{}")])],
    "none": [("<tool_call> <think>", "<tool_call> <think>", "", [])],
}


@pytest.mark.parametrize(
    ("name", "case"), [(name, at) for name, cases in FOUND.items() for at in range(len(cases))], ids=str
)
def test_what_is_found(name: str, case: int) -> None:
    text, visible, reasoning, found = FOUND[name][case]
    answer = read(name, [text])
    assert (answer.text, answer.reasoning, calls(answer)) == (visible, reasoning, found)
    assert read(name, text) == answer, "one character at a time"


FRAGMENTS = sorted(
    {marker for group in (*CALL_FORMATS.values(), *REASONING_FORMATS.values()) for marker in group}
    | {"<function=add>", "<parameter=a>", "</parameter>", "</function>", "commentary to=functions.add ", "analysis"}
    | {
        '{"name": "add", "arguments": ',
        '{"name": "add", "parameters": ',
        WEATHER,
        ADD,
        '{"arguments": {"a": 1}, "name": ',
    }
    | {'"add"', "}", "]", ";", ", ", "\n", " ", '"', "\\", "add", "x", "é", *HIDDEN}
)


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text that looks like a format, and the same text in pieces."""
    text = "".join(draw(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12)))
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    return text, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=300, deadline=None)
@given(cut=cut_texts())
def test_cuts_make_no_difference(name: str, cut: tuple[str, list[str]]) -> None:
    text, chunks = cut
    whole = read(name, [text])
    assert read(name, chunks) == whole
    assert read(name, text) == whole


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(st.text(alphabet=st.characters(blacklist_characters="<[{", blacklist_categories=["Cs"])), max_size=6)
)
def test_text_without_markers_is_unchanged(name: str, words: Sequence[str]) -> None:
    answer = read(name, words)
    whole = "".join(words)
    if name.endswith(("+inside", "deepseek_r1")):
        assert (answer.text, answer.reasoning) == ("", whole.strip(" \t\r\n"))
    elif name.startswith("gpt_oss"):
        assert answer.text == whole.strip(" \t\r\n") or whole.lstrip(" \t\r\n").startswith("to=")
    else:
        assert answer.text == whole


def written(name: str, made: Sequence[tuple[str, str]]) -> str:
    """The text of calls in a format."""
    objects = [f'{{"name": {json.dumps(call)}, "arguments": {arguments}}}' for call, arguments in made]
    if name.startswith("hermes"):
        return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
    if name == "llama3_json":
        return "; ".join(objects)
    if name == "mistral":
        return f"[TOOL_CALLS][{', '.join(objects)}]"
    start = "<|start|>assistant"
    text = "".join(
        f"{start}<|channel|>commentary to=functions.{call} <|constrain|>json<|message|>{arguments}<|call|>"
        for call, arguments in made
    )
    return text.removeprefix(start)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet=st.characters(blacklist_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.builds(
    lambda value, indent: json.dumps(value, indent=indent, ensure_ascii=False),
    st.dictionaries(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=4), JSON_VALUES, max_size=3),
    st.sampled_from([None, 1]),
)


@pytest.mark.parametrize("name", ["hermes", "hermes+think", "llama3_json", "mistral", "gpt_oss"])
@settings(max_examples=150, deadline=None)
@given(made=st.lists(st.tuples(st.sampled_from(["add", "get_weather"]), ARGUMENTS), min_size=1, max_size=3))
def test_arguments_are_the_text_that_was_written(name: str, made: list[tuple[str, str]]) -> None:
    answer = read(name, written(name, made))
    assert (answer.text, calls(answer)) == ("", made)
    first = read(name, written(name, made), first_only=True)
    assert (first.text, calls(first)) == ("", made[:1])


def test_arguments_come_while_they_are_written() -> None:
    format, _ = FORMATS["hermes"]
    parser = format.parser("", tools=TOOLS)(str)
    assert not parser.feed('<tool_call>{"name": "add", "arguments": ')
    for piece in ('{"a"', ": [1, ", "2"):
        [*_, last] = parser.feed(piece)
        assert getattr(last, "text", None) == piece


def test_ids_follow_the_format() -> None:
    [call] = read("hermes", ['<tool_call>{"name": "add"}']).calls
    assert call == WholeCall(id="call_" + "0" * 24, name="add", arguments="{}")
    assert [call.id for call in read("mistral", ["[TOOL_CALLS]a{}[TOOL_CALLS]b{}"]).calls] == ["0" * 9, "1" * 9]
