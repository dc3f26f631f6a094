"""OpenAI's log-probability schemas: the tokens' texts and bytes are the text, whatever the tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ssd.engine.detokenize import Detokenizer
from ssd.engine.token_text import TokenTexts
from ssd.request.output import TokenLogprob
from ssd.serving.openai.logprobs import TokenReader, chat_logprobs, completion_logprobs
from ssd.testing.models.tiny import tiny_tokenizer
from tests.unit.engine.test_detokenize_kinds import KINDS, cases, decode, ids_of, texts, tokenizer

TEXT = "né 🐍\n日 x"


def rows(ids: list[int], *top: tuple[int, float]) -> list[TokenLogprob]:
    return [TokenLogprob(token_id=token, logprob=-2.0, rank=3, top=top) for token in ids]


def test_schemas() -> None:
    known = TokenTexts(tiny_tokenizer(700))
    ids = tiny_tokenizer(700).encode(TEXT, add_special_tokens=False)
    tokens = rows(ids, (ids[0], -0.5), (ids[-1], float("-inf")))
    told = completion_logprobs(tokens, TokenReader(known))
    partial = [shown for shown in told["tokens"] if shown.startswith("bytes:")]
    assert partial and partial[:3] == ["bytes:\\xc3", "bytes:\\xa9", "bytes:\\xf0"]
    for offset, shown in zip(told["text_offset"], told["tokens"], strict=True):
        assert shown in partial or TEXT[offset:].startswith(shown)
    # The likeliest as asked for, best first, and the token itself.
    middle = told["top_logprobs"][2]
    assert list(middle.values()) == [-0.5, -9999.0, -2.0] and list(middle)[2] == told["tokens"][2]
    assert len(told["top_logprobs"][0]) == 2
    content = chat_logprobs(tokens, TokenReader(known))["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == TEXT
    assert [likely["logprob"] for likely in content[0]["top_logprobs"]] == [-0.5, -9999.0]


@given(cases(), st.integers(1, 5))
@example(("byte_level", [0, 0, 229], [132, 0], False), 1)
@settings(max_examples=400)
def test_tokens_are_the_text(case: tuple[str, list[int], list[int], bool], at_once: int) -> None:
    """In any chunking: bytes joined, offsets, and names where a token is not a part of a character."""
    kind, prompt, output, skip = case
    reader, chat = (TokenReader(texts(kind), prompt, skip_special_tokens=skip) for _ in range(2))
    stream = texts(kind).stream(prompt, skip_special_tokens=skip)
    detokenizer = Detokenizer(texts(kind).stream(prompt, skip_special_tokens=skip))
    text = detokenizer.add(output) + detokenizer.finish()
    offsets: list[int] = []
    names: list[str] = []
    raw = b""
    for begin in range(0, len(output), at_once):
        tokens = rows(output[begin : begin + at_once])
        part = completion_logprobs(tokens, reader)
        offsets += part["text_offset"]
        names += part["tokens"]
        raw += b"".join(bytes(token["bytes"]) for token in chat_logprobs(tokens, chat)["content"])
    final = ""
    for token, offset in zip(output, offsets, strict=True):
        assert offset == len(final + stream.open)
        final += stream.add(token)
    if "\ufffd" in text or kind == "suffix":  # bytes that are no text, and a border that only a next token shows
        return
    completing = len(raw) - len(raw.lstrip(bytes(range(0x80, 0xC0))))
    if completing:  # bytes of a character that the prompt begins; if it stays broken, its replacement is the prompt's
        broken = decode(kind, [*prompt, *output], skip).startswith(decode(kind, prompt, skip))
        assert raw[completing:].decode() == (text if broken else text[1:])
        return
    assert raw.decode() == text
    visible = [name for token, name in zip(output, names, strict=True) if not texts(kind)[token].special or not skip]
    if not any(name.startswith("bytes:") for name in visible):
        assert "".join(visible) == text
        ends = [*offsets[1:], len(text)][: len(offsets)]
        shown = [text[begin:end] for begin, end in zip(offsets, ends, strict=True)]
        assert [piece for piece in shown if piece] == [name for name in visible if name]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_names(kind: str) -> None:
    end = tokenizer(kind).eos_token
    for skip in (True, False):
        reader = TokenReader(texts(kind), ids_of(kind, "a"), skip_special_tokens=skip)
        told = chat_logprobs(rows(ids_of(kind, end)), reader)["content"][0]
        spelled = bytes(told["bytes"]).decode().strip()
        assert (told["token"].strip(), spelled) == (end, "" if skip else end)


def test_the_first_word_of_a_text_has_no_space() -> None:
    world = rows(ids_of("strip", "▁world"))
    for prompt, name in (([], "world"), (ids_of("strip", "<s>"), "world"), (ids_of("strip", "▁Hello"), " world")):
        told = completion_logprobs(world, TokenReader(texts("strip"), prompt))
        assert told["tokens"] == [name]
