"""The text of tokenizers of every kind: always that of one decode, in any chunking."""

from __future__ import annotations

import codecs
import functools
import os
from collections.abc import Sequence

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from ssd.engine.detokenize import Detokenizer, StopRules
from ssd.engine.token_text import TokenTexts
from ssd.testing.models.tiny import tiny_tokenizer

REPLACEMENT = "\ufffd"
BYTES = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
WORDS = (
    "▁",
    "▁▁",
    "▁Hello",
    "▁world",
    "▁true",
    "true",
    "a",
    "b",
    "ok",
    "\ufffd",
    "😀",
    "é",
    "wo▁rd",
    ".",
    "##ly",
    "the</w>",
)
EMOJI = "😀😁😂"
STRIP = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))
DECODERS = {
    "strip": decoders.Sequence([*STRIP]),  # Llama 2, Mistral
    "fallback": decoders.Sequence([*STRIP[:3]]),  # Gemma
    "metaspace": decoders.Metaspace(),
    "metaspace_never": decoders.Metaspace(prepend_scheme="never"),
    "metaspace_fallback": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]),
    "wordpiece": decoders.WordPiece(),
    "suffix": decoders.BPEDecoder(),
    "none": None,
}
BYTE_FALLBACK = ("strip", "fallback", "metaspace_fallback")
KINDS = (*DECODERS, "byte_level")


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    if kind == "byte_level":
        made = tiny_tokenizer(400)
    else:
        vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | BYTES | {word: 259 + i for i, word in enumerate(WORDS)}
        inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        if DECODERS[kind] is not None:
            inner.decoder = DECODERS[kind]
        made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<é>"]})
    made.add_tokens([AddedToken("日x"), AddedToken("▁new")])
    return made


@functools.cache
def texts(kind: str) -> TokenTexts:
    return TokenTexts(tokenizer(kind))


def decode(kind: str, ids: Sequence[int], skip: bool = True) -> str:
    return tokenizer(kind).decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def ids_of(kind: str, *tokens: str) -> list[int]:
    return [tokenizer(kind).convert_tokens_to_ids(token) for token in tokens]


def bytes_of(text: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in text.encode()]


def expected(kind: str, prompt: Sequence[int], output: Sequence[int], skip: bool = True) -> str | None:
    """What one decode gives after the prompt's text. A character that the prompt begins and the output completes
    belongs to the output. None if the output changes what the prompt says: a run that a byte breaks is replaced."""
    # With the space that a decoder takes away at the start: it tells whether the output changes it.
    plain = "fallback" if kind == "strip" else kind
    before, whole = decode(plain, prompt, skip), decode(plain, [*prompt, *output], skip)
    kept = before
    if not whole.startswith(before):
        kept = before[:-1] if kind == "byte_level" else decode(plain, without_partial(kind, prompt), skip)
    if not whole.startswith(kept):
        return None
    return whole.removeprefix(" ") if kind == "strip" and not kept else whole[len(kept) :]


def without_partial(kind: str, prompt: Sequence[int]) -> Sequence[int]:
    """The prompt without the bytes of a character that is not complete."""
    for count in (1, 2, 3):
        tokens = tokenizer(kind).convert_ids_to_tokens(list(prompt[-count:]))
        if all(token in BYTES for token in tokens):
            raw = bytes(int(token[3:5], 16) for token in tokens)
            utf8 = codecs.getincrementaldecoder("utf-8")("replace")
            if not utf8.decode(raw) and utf8.getstate()[0] == raw:
                return prompt[:-count]
    return prompt


def size(kind: str) -> int:
    return max(tokenizer(kind).get_vocab().values()) + 3  # and two ids that no token has


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[int], list[int], bool]:
    """A kind of tokenizer, a prompt, an output, and whether special tokens are skipped."""
    kind = draw(st.sampled_from(KINDS))
    any_token = st.integers(0, size(kind) - 1)
    if kind in BYTE_FALLBACK:
        valid = st.sampled_from("é日😀 ").map(lambda character: ids_of(kind, *bytes_of(character)))
        broken = st.sampled_from("é日😀").map(lambda character: ids_of(kind, *bytes_of(character))[:-1])
        words = st.integers(259, size(kind) - 1).map(lambda token: [token])
        part = valid | broken | words | any_token.map(lambda token: [token])
        parts = draw(st.lists(part, max_size=12))
        ids = [token for part in parts for token in part]
    else:
        ids = draw(st.lists(any_token, max_size=30))
    cut = draw(st.integers(0, len(ids)))
    return kind, ids[:cut], ids[cut:], draw(st.booleans())


@given(cases(), st.integers(1, 4))
@settings(max_examples=600)
def test_the_text_of_one_decode(case: tuple[str, list[int], list[int], bool], at_once: int) -> None:
    kind, prompt, output, skip = case
    told = expected(kind, prompt, output, skip)
    assume(told is not None)
    detokenizer = Detokenizer(texts(kind).stream(prompt, skip_special_tokens=skip))
    pieces = [detokenizer.add(output[i : i + at_once]) for i in range(0, len(output), at_once)]
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == detokenizer.text == told


@given(cases())
@example(("byte_level", [241, 164], [0], False))  # two bytes of a surrogate
@settings(max_examples=600)
def test_final_and_tail_are_the_text_after_every_token(case: tuple[str, list[int], list[int], bool]) -> None:
    kind, prompt, output, skip = case
    stream, final = texts(kind).stream(prompt, skip_special_tokens=skip), ""
    for count, token in enumerate(output, 1):
        final += stream.add(token)
        told = expected(kind, prompt, output[:count], skip)
        assume(told is not None)
        assert final + stream.tail == told
        assert told.startswith(final + stream.open) or stream.tail.startswith(REPLACEMENT)


@pytest.mark.parametrize("kind", ["strip", "metaspace"])
def test_the_space_of_the_first_word(kind: str) -> None:
    """Decoders drop it at the beginning of a text only: after a prompt it stays, unless all of that is left out."""
    (hello, world), beginning = ids_of(kind, "▁Hello", "▁world"), tokenizer(kind).bos_token_id
    for prompt, skip, text in (
        ([hello], True, " world"),
        ([beginning, hello], True, " world"),
        ([beginning], True, "world"),
        ([beginning], False, " world"),
        ([], True, "world"),
    ):
        detokenizer = Detokenizer(texts(kind).stream(prompt, skip_special_tokens=skip))
        assert detokenizer.add([world]) == text


@pytest.mark.parametrize("kind", BYTE_FALLBACK)
def test_a_run_of_characters(kind: str) -> None:
    tokens = ids_of(kind, *bytes_of(EMOJI), "▁", "ok")
    for at_once in range(1, len(tokens) + 1):
        detokenizer = Detokenizer(texts(kind).stream(ids_of(kind, "a")))
        pieces = [detokenizer.add(tokens[i : i + at_once]) for i in range(0, len(tokens), at_once)]
        assert "".join([*pieces, detokenizer.finish()]) == f"{EMOJI} ok"


@pytest.mark.parametrize("kind", KINDS)
def test_a_replacement_character_of_the_model_is_not_held_back(kind: str) -> None:
    tokens = tokenizer(kind).encode("\ufffd", add_special_tokens=False)
    if kind != "byte_level":
        tokens = ids_of(kind, "\ufffd")
    detokenizer = Detokenizer(texts(kind).stream(tokens))
    assert REPLACEMENT in detokenizer.add(tokens)
    assert REPLACEMENT in detokenizer.add(tokens)


@pytest.mark.parametrize("kind", BYTE_FALLBACK)
def test_a_broken_run_is_not_held_back(kind: str) -> None:
    detokenizer = Detokenizer(texts(kind).stream(ids_of(kind, "a")))
    assert detokenizer.add(ids_of(kind, *bytes_of("😀"))) == ""
    assert detokenizer.add(ids_of(kind, "<0xFF>")) == 5 * REPLACEMENT
    assert detokenizer.add(ids_of(kind, "<0x41>")) == REPLACEMENT
    assert detokenizer.add(ids_of(kind, "b")) == "b"


def run(kind: str, tokens: Sequence[int], stop: StopRules, skip: bool = True) -> Detokenizer:
    detokenizer = Detokenizer(texts(kind).stream(ids_of(kind, "a"), skip_special_tokens=skip), stop)
    pieces = [detokenizer.add([token]) for token in tokens]
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == detokenizer.text
    return detokenizer


def found_by_search(
    kind: str, prompt: Sequence[int], output: Sequence[int], rules: StopRules, skip: bool
) -> tuple[int, str] | None:
    """Searches the whole text after every token. Returns the token that completes a stop string, counted from 1, and
    the text then."""
    stream, final, before = texts(kind).stream(prompt, skip_special_tokens=skip), "", ""
    for count, token in enumerate(output, 1):
        final += stream.add(token)
        now = final + stream.open
        same = len(os.path.commonprefix([before, now]))  # noqa: RUF071
        places = [
            (at, stop)
            for stop in rules.strings
            for at in range(len(now))
            if now[at:].startswith(stop)
            if at + len(stop) > same
        ]
        if places and count > rules.min_tokens:
            at, stop = min(places)
            return count, now[:at] + (stop if rules.include else "")
        before = now
    return None


STOPS = (" world", " ", "😁", "é", "😀é", "o", "ab", "aab", "\ufffd", "日x", "x", "unk", "<é>", "l")


@given(cases(), st.lists(st.sampled_from(STOPS), min_size=1, max_size=3), st.booleans(), st.integers(0, 4))
@settings(max_examples=600)
def test_stop_strings(
    case: tuple[str, list[int], list[int], bool], stops: list[str], include: bool, min_tokens: int
) -> None:
    """They end the text at the first token that completes one, as a search through all the text would."""
    kind, prompt, output, skip = case
    assume(not skip or "<é>" not in stops)
    rules = StopRules(strings=tuple(stops), include=include, min_tokens=min_tokens)
    detokenizer = Detokenizer(texts(kind).stream(prompt, skip_special_tokens=skip), rules)
    pieces, count = [], 0
    while count < len(output) and not detokenizer.stopped:
        pieces.append(detokenizer.add([output[count]]))
        count += 1
    wanted = found_by_search(kind, prompt, output, rules, skip)
    if wanted is None:
        assert not detokenizer.stopped
        pieces.append(detokenizer.finish())
        if not detokenizer.stopped:
            everything = Detokenizer(texts(kind).stream(prompt, skip_special_tokens=skip))
            assert detokenizer.text == everything.add(output) + everything.finish()
    else:
        assert (count, detokenizer.text) == wanted
        assert detokenizer.finish() == ""
    assert "".join(pieces) == detokenizer.text


SPECIAL_STOPS = {
    "alone": (["a", "<|tool|>", "b"], "<|tool|>", 2, "a"),
    "first": (["<|tool|>", "b"], "<|tool|>", 1, ""),
    "text_before": (["a", "b", "<|tool|>", "b"], "b<|tool|>", 3, "a"),
    "text_after": (["a", "<|tool|>", "b", "b"], "<|tool|>b", 3, "a"),
    "around": (["a", "b", "<|tool|>", "b", "a"], "b<|tool|>ba", 5, "a"),
    "two": (["a", "<|tool|>", "<é>", "b"], "<|tool|><é>", 3, "a"),
    "two_with_text": (["a", "<|tool|>", "ok", "<é>", "b"], "<|tool|>ok<é>", 4, "a"),
    "another_in_between": (["a", "ok", "<é>", "b"], "okb", 4, "a"),
    "second_try": (["a", "<|tool|>", "a", "<|tool|>", "ok"], "<|tool|>ok", 5, "aa"),
    "other_text": (["a", "b", "<|tool|>", "ok"], "b<|tool|>b", None, "abok"),
}


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", SPECIAL_STOPS)
@pytest.mark.parametrize("kind", ["strip", "metaspace_never", "fallback"])
def test_stop_strings_with_special_tokens(kind: str, name: str, skip: bool, include: bool) -> None:
    tokens, stop, count, text = SPECIAL_STOPS[name]
    if name == "another_in_between" and not skip:
        count = None
    detokenizer = Detokenizer(
        texts(kind).stream(ids_of(kind, "a"), skip_special_tokens=skip), StopRules(strings=(stop,), include=include)
    )
    fed = 0
    for token in ids_of(kind, *tokens):
        if not detokenizer.stopped:
            detokenizer.add([token])
            fed += 1
    detokenizer.finish()
    assert (detokenizer.stopped, fed) == (count is not None, count or len(tokens))
    if skip:
        assert detokenizer.text == text + (stop if include and count else "")
    else:
        whole = "".join(tokens)
        assert detokenizer.text == (whole if count is None else whole[: whole.index(stop) + len(stop) * include])


def test_stop_strings_within_the_first_tokens_are_ignored() -> None:
    kind, rules = "strip", StopRules(strings=("<|tool|>", "ab"), min_tokens=3)
    ids = ids_of(kind, "<|tool|>", "a", "b", "<|tool|>", "ok")
    detokenizer = Detokenizer(texts(kind).stream(ids_of(kind, "a")), rules)
    assert detokenizer.add(ids) == "ab"
    assert detokenizer.found == "<|tool|>"


def test_memory_and_work_do_not_grow_with_the_text() -> None:
    kind, rules = "strip", StopRules(strings=("<|tool|>x", "zz"))
    detokenizer = Detokenizer(texts(kind).stream(ids_of(kind, "a")), rules)
    detokenizer.add(5000 * ids_of(kind, "<|tool|>", "<|tool|>", "▁Hello"))
    assert len(detokenizer._waiting) + len(detokenizer._marks) < 30
    assert detokenizer.finish() == "" and detokenizer.text == 5000 * " Hello"
