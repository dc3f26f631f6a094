"""The text of tokenizers of every kind: always that of one decode, in any chunking."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Sequence

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from ssd.engine.detokenize import Detokenizer
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
    """What one decode gives after the prompt's text. A character that the prompt begins and the output completes belongs
    to the output. None if the output changes what the prompt says: bytes that break a run of bytes replace all of it."""
    before, whole = decode(kind, prompt, skip), decode(kind, [*prompt, *output], skip)
    if whole.startswith(before):
        return whole[len(before) :]
    kept = before[:-1] if kind == "byte_level" else decode(kind, without_partial(kind, prompt), skip)
    return whole[len(kept) :] if whole.startswith(kept) else None


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
