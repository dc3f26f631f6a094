"""Incremental text: certain as soon as given out, and the whole of it what one decode says."""

from __future__ import annotations

import functools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ssd.engine.detokenize import Detokenizer, StopRules
from ssd.engine.token_text import TokenTexts
from ssd.testing.models.tiny import tiny_tokenizer

REPLACEMENT = "\ufffd"
SIZE = 700  # all bytes, and merges: every text, characters beyond ASCII in several tokens


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(SIZE)


def encode(text: str) -> list[int]:
    return tokenizer().encode(text)


def decode(ids: list[int]) -> str:
    return tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def detokenizer_of(stop: tuple[str, ...]) -> Detokenizer:
    return Detokenizer(TokenTexts(tokenizer()).stream(), StopRules(strings=stop))


def pieces(ids: list[int], stop: tuple[str, ...] = (), at_once: int = 1) -> tuple[list[str], Detokenizer]:
    detokenizer = detokenizer_of(stop)
    given_out = [detokenizer.add(ids[i : i + at_once]) for i in range(0, len(ids), at_once)]
    given_out.append(detokenizer.finish())
    assert "".join(given_out) == detokenizer.text
    return given_out, detokenizer


texts = st.text(st.sampled_from("abe \n.é日ß🐍👩\u200d🚀́"), max_size=30) | st.text(max_size=20)


def test_characters_are_really_split() -> None:
    assert len(encode("🐍")) == 4
    assert decode(encode("🐍")[:3]).endswith(REPLACEMENT)


@given(st.lists(st.integers(0, SIZE - 1), max_size=40), st.integers(1, 5))
def test_random_tokens(ids: list[int], at_once: int) -> None:
    """Special tokens, broken characters and all: what is given out is what one decode gives."""
    assert "".join(pieces(ids, at_once=at_once)[0]) == decode(ids)


@given(st.lists(st.integers(227, 323), max_size=40))
def test_random_bytes(ids: list[int]) -> None:
    """Mostly bytes that make no character."""
    assert "".join(pieces(ids)[0]) == decode(ids)


@given(texts, st.integers(1, 4))
@example("🐍🐍👩\u200d🚀" * 4, 1)
def test_split_characters_are_never_shown(text: str, at_once: int) -> None:
    given_out, _ = pieces(encode(text), at_once=at_once)
    assert "".join(given_out) == text
    if REPLACEMENT not in text:
        assert all(REPLACEMENT not in piece for piece in given_out)


def test_given_out_as_soon_as_certain() -> None:
    assert [piece for piece in pieces(encode("a🐍b日"))[0] if piece] == ["a", "🐍", "b", "日"]
    assert pieces(encode("a🐍"))[0][:5] == ["a", "", "", "", "🐍"]


def test_half_a_character_at_the_end_is_shown_as_decode_shows_it() -> None:
    ids = [*encode("ok"), *encode("🐍")[:2]]
    given_out, detokenizer = pieces(ids)
    assert detokenizer.text == decode(ids) == "ok" + REPLACEMENT
    assert "".join(given_out[:-1]) == "ok"


@given(texts, st.lists(st.text(st.sampled_from("abe \n.é🐍"), min_size=1, max_size=4), min_size=1, max_size=3))
@example("abab🐍", ["b🐍"])
@example("aaab", ["aab"])
def test_stop_strings(text: str, stop: list[str]) -> None:
    """Token by token, over token borders: the text ends before the first stop string that is complete."""
    ids, full = encode(text), text
    given_out, detokenizer = pieces(ids, tuple(stop))
    shown = "".join(given_out)
    ends = [(full.find(s) + len(s), full.find(s)) for s in stop if s in full]
    assert detokenizer.stopped == bool(ends)
    if not ends:
        assert shown == full
        return
    assert full.startswith(shown)
    assert all(s not in shown for s in stop)
    assert any(full.startswith(shown + s) for s in stop)
    # Nothing beyond the stop string that was complete first.
    assert len(shown) <= min(end for end, _ in ends)


def test_a_stop_string_over_a_token_border() -> None:
    ids = encode("one the") + encode(" tin hat")
    _, detokenizer = pieces(ids, ("he t",))
    assert detokenizer.stopped
    assert detokenizer.text == "one t"


def test_nothing_after_the_stop() -> None:
    detokenizer = detokenizer_of(("STOP",))
    detokenizer.add(encode("go STOP"))
    assert (detokenizer.stopped, detokenizer.text) == (True, "go ")
    assert detokenizer.add(encode(" and on")) == ""
    assert detokenizer.finish() == ""
    assert detokenizer.text == "go "


def test_the_beginning_of_a_stop_string_is_held_back_and_then_given() -> None:
    detokenizer = detokenizer_of(("\n\n",))
    assert detokenizer.add(encode("a\n")) == "a"
    assert detokenizer.add(encode("b\n")) == "\nb"
    assert detokenizer.finish() == "\n"


@pytest.mark.parametrize("tail", [b"\xf0\x9f", b"\xe2"])
def test_a_stop_string_before_half_a_character(tail: bytes) -> None:
    """All in one step, and then the end: the half character must not hide the stop string."""
    half = encode("🐍")[:2] if tail[0] == 0xF0 else encode("日")[:1]
    detokenizer = detokenizer_of(("END",))
    detokenizer.add([*encode("the END"), *half])
    detokenizer.finish()
    assert detokenizer.text == "the "
    assert detokenizer.stopped
