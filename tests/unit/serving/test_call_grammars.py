"""Grammars of answers with tool calls: what they allow, and that the parsers read whatever they allow."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssd.grammars.compiler import Grammars
from ssd.grammars.matcher import GrammarMatcher
from ssd.request.structured import StructuredOutputsParams
from ssd.serving.parsers.formats import CALL_FORMATS, REASONING_FORMATS, AnswerFormat, Tool
from ssd.serving.parsers.grammars import Asked, call_grammar
from ssd.serving.parsers.parts import Answer

CITY = {"type": "string", "enum": ["Paris", "Rome"]}
TOOLS = (
    Tool(
        name="get_weather",
        schema={
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"City": CITY},
        },
        strict=True,
    ),
    Tool(name="now", schema={"type": "object", "properties": {}, "additionalProperties": False}, strict=True),
)
LOOSE = (Tool(name="get_weather", schema=TOOLS[0].schema),)
MARKERS = sorted({marker for group in (*CALL_FORMATS.values(), *REASONING_FORMATS.values()) for marker in group})
END = "<|endoftext|>"


def tokenizer(markers: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes. Markers are special tokens (``special``), ordinary ones (``added``), or no tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={END: 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens([END])
    if markers != "text":
        bytes_only.add_tokens([AddedToken(marker, special=markers == "special") for marker in MARKERS])
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token=END)


class Written:
    """One way to write markers, and one format."""

    def __init__(self, markers: str, calls: str, reasoning: str = "none"):
        self.tokenizer = tokenizer(markers)
        self.format = AnswerFormat.of(self.tokenizer, None, calls=calls, reasoning=reasoning)
        self.grammars = Grammars(lambda: self.tokenizer, vocabulary=len(self.tokenizer), ends=[0])
        self.prompt_end = "<|start|>assistant" if calls == "gpt_oss" else ""

    def matcher(self, asked: Asked, prompt_end: str | None = None) -> GrammarMatcher:
        thinking = self.format.thinking(self.prompt_end if prompt_end is None else prompt_end)
        return self.grammars.matcher(StructuredOutputsParams(grammar=call_grammar(self.format, thinking, asked)))

    def allows(self, asked: Asked, text: str, prompt_end: str | None = None) -> bool:
        """Whether the text is a whole answer."""
        matcher = self.matcher(asked, prompt_end)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return all(map(matcher.advance, ids)) and (matcher.complete or matcher.advance(0))

    def sampled(self, asked: Asked, seed: int, length: int) -> str | None:
        """A random answer; None if it does not end within so many tokens."""
        chance, matcher, ids = random.Random(seed), self.matcher(asked), []
        while not matcher.complete and len(ids) < length:
            allowed = matcher.allowed([()])[0].nonzero()[:, 0].tolist()
            # Letters run on for ever where text is free, so ends and markers are preferred at times.
            rare = [token for token in allowed if token == 0 or token > 256]
            token = chance.choice(rare) if rare and chance.random() < 0.2 else chance.choice(allowed)
            if token == 0:
                break
            assert matcher.advance(token)
            ids.append(token)
        else:
            if not matcher.complete:
                return None
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def read(self, text: str, tools: tuple[Tool, ...], prompt_end: str | None = None) -> Answer:
        end = self.prompt_end if prompt_end is None else prompt_end
        parser = self.format.parser(end, tools=tools)(str)
        return Answer.of([*parser.feed(text), *parser.finish()])


CALL = '{"city": "Paris"}'
TWO: dict[str, str] = {
    "hermes": f'<tool_call>\n{{"name": "get_weather", "arguments": {CALL}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "qwen3_xml": "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
    "</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "llama3_json": f'{{"name": "get_weather", "parameters": {CALL}}}; {{"name": "now", "parameters": {{}}}}',
    "mistral": f"[TOOL_CALLS]get_weather[ARGS]{CALL}[TOOL_CALLS]now[ARGS]{{}}",
}
ONE = {
    "hermes": TWO["hermes"].split("\n<tool_call>")[0],
    "qwen3_xml": TWO["qwen3_xml"].split("\n<tool_call>")[0],
    "llama3_json": TWO["llama3_json"].split("; ")[0],
    "mistral": f"[TOOL_CALLS]get_weather[ARGS]{CALL}",
    "gpt_oss": f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{CALL}",
}
WAYS = [(markers, calls) for markers in ("special", "added", "text") for calls in CALL_FORMATS]


@pytest.mark.parametrize(("markers", "calls"), WAYS, ids=str)
def test_forced_calls(markers: str, calls: str) -> None:
    written, asked = Written(markers, calls), Asked(tools=TOOLS, forced=True)
    one = as_written(written, ONE[calls])
    assert written.allows(asked, one)
    assert not written.allows(asked, one.replace("Paris", "Oslo"))
    assert not written.allows(asked, "Hello!") and not written.allows(asked, "")
    if calls in TWO:
        two = as_written(written, TWO[calls])
        assert written.allows(asked, two)
        assert not written.allows(Asked(tools=TOOLS, forced=True, first_only=True), two)


@pytest.mark.parametrize(("markers", "calls"), WAYS, ids=str)
def test_free_text_with_strict_calls(markers: str, calls: str) -> None:
    written, asked = Written(markers, calls), Asked(tools=TOOLS)
    one = as_written(written, ONE[calls])
    hello = "<|channel|>final<|message|>Hello!" if calls == "gpt_oss" else "Hello!"
    assert written.allows(asked, one) and written.allows(asked, hello)
    assert not written.allows(asked, one.replace("Paris", "Oslo"))
    assert written.allows(Asked(tools=LOOSE), one.replace("Paris", "Oslo")), "only strict tools are held to a schema"
    if calls not in ("gpt_oss", "llama3_json"):
        assert written.allows(asked, f"Let me look.\n{as_written(written, TWO[calls])}")
        assert written.allows(Asked(tools=TOOLS, first_only=True), f"So: {one}")


@pytest.mark.parametrize(("markers", "calls"), WAYS, ids=str)
def test_a_call_or_json(markers: str, calls: str) -> None:
    written, asked = Written(markers, calls), Asked(tools=TOOLS, answer={"type": "object", "required": ["a"]})
    said = "<|channel|>final<|message|>" if calls == "gpt_oss" else ""
    tag = "<|python_tag|>" if calls == "llama3_json" else ""
    assert written.allows(asked, tag + as_written(written, ONE[calls]))
    assert written.allows(asked, said + '{"a": 1}')
    assert not written.allows(asked, said + '{"b": 1}') and not written.allows(asked, said + "Hello!")


@pytest.mark.parametrize("markers", ["special", "added", "text"])
def test_reasoning_before_forced_calls(markers: str) -> None:
    written, asked = Written(markers, "hermes", "think"), Asked(tools=TOOLS, forced=True)
    call = ONE["hermes"]
    for prompt_end, text, allowed in [
        ("<think>\n", f"Hm.\n</think>\n\n{call}", True),
        ("<think>\n", call, False),
        ("<think>\n\n</think>\n\n", call, True),
        ("", call, True),
        ("", f"<think>Hm.</think>{call}", True),
        ("", f"Hm.</think>{call}", False),
    ]:
        assert written.allows(asked, text, prompt_end) is allowed, (prompt_end, text)
        if allowed:
            answer = written.read(text, TOOLS, prompt_end)
            assert (answer.text, answer.reasoning) == ("", "Hm." if "Hm." in text else "")
            assert [call.name for call in answer.calls] == ["get_weather"]


@pytest.mark.parametrize(("markers", "calls"), WAYS, ids=str)
@pytest.mark.parametrize("forced", [True, False], ids=["forced", "free"])
def test_parsers_read_what_grammars_allow(markers: str, calls: str, forced: bool) -> None:
    written = Written(markers, calls)
    found = 0
    for seed in range(30):
        text = written.sampled(Asked(tools=TOOLS, forced=forced), seed, 300)
        if text is None:
            continue
        answer = written.read(text, TOOLS)
        found += len(answer.calls)
        for call in answer.calls:
            [tool] = [tool for tool in TOOLS if tool.name == call.name]
            jsonschema.validate(json.loads(call.arguments), dict(tool.schema))
        if forced:
            assert answer.calls and not answer.text, text
    assert found > 3 or not forced


def as_written(written: Written, text: str) -> str:
    """Mistral's older format where the newer one has no tokens."""
    if written.format.calls != "mistral" or written.format.tokens:
        return text
    calls = [piece.split("[ARGS]") for piece in text.split("[TOOL_CALLS]")[1:]]
    objects: list[Any] = [f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls]
    return f"[TOOL_CALLS][{', '.join(objects)}]"


def with_tokens(*special: str, ordinary: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    made = tokenizer("text")
    made.add_tokens([AddedToken(text, special=True) for text in special])
    made.add_tokens([AddedToken(text, special=False) for text in ordinary])
    return made


@pytest.mark.parametrize(
    ("made", "template", "calls", "reasoning"),
    [
        (with_tokens(), None, "hermes", "none"),
        (with_tokens("<|im_start|>", ordinary=("<tool_call>", "<think>", "</think>")), "", "hermes", "think"),
        (with_tokens(), "{{ '<tool_call>' }} {{ '<think></think>' }}", "hermes", "think"),
        (with_tokens(ordinary=("<tool_call>",)), "<function=name> <parameter=key>", "qwen3_xml", "none"),
        (with_tokens("<|python_tag|>", "<|eot_id|>"), "", "llama3_json", "none"),
        (with_tokens("<|python_tag|>"), "<tool_call>", "hermes", "none"),
        (with_tokens("[TOOL_CALLS]"), "", "mistral", "none"),
        (with_tokens("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"), "", "mistral", "mistral"),
        (with_tokens(*CALL_FORMATS["gpt_oss"]), "", "gpt_oss", "gpt_oss"),
    ],
    ids=["nothing", "qwen3", "template", "qwen3_coder", "llama3", "hermes3", "mistral", "magistral", "gpt_oss"],
)
def test_formats_are_chosen_by_markers(made: Any, template: str | None, calls: str, reasoning: str) -> None:
    format = AnswerFormat.of(made, template)
    assert (format.calls, format.reasoning) == (calls, reasoning)
    special = {token.content for token in made.added_tokens_decoder.values() if token.special}
    used = {*CALL_FORMATS[calls], *REASONING_FORMATS.get(reasoning, ())}
    assert format.special is bool(special & used)
    assert set(format.hidden) == special - used
    assert AnswerFormat.of(made, template, calls="none", reasoning="none").calls == "none"


def test_special_tokens_that_are_no_markers_are_hidden() -> None:
    format = AnswerFormat.of(with_tokens("[TOOL_CALLS]", "<|odd|>"), None)
    text = "See <|odd|>this<|o.[TOOL_CALLS]now{}"
    for chunks in ([text], text):
        parser = format.parser("", tools=TOOLS)(str)
        answer = Answer.of([part for chunk in chunks for part in parser.feed(chunk)] + parser.finish())
        assert (answer.text, [call.name for call in answer.calls]) == ("See this<|o.", ["now"])
    parser = format.parser("", tools=TOOLS, show_specials=True)(str)
    assert Answer.of([*parser.feed(text), *parser.finish()]).text == "See <|odd|>this<|o."
