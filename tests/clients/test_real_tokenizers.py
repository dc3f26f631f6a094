"""The text of real tokenizers: always that of one decode, in any chunking."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ssd.engine.detokenize import Detokenizer
from ssd.engine.token_text import TokenTexts
from ssd.serving.openai.logprobs import TokenReader, chat_logprobs
from ssd.testing import real
from tests.unit.serving.test_openai_logprobs import rows

pytestmark = pytest.mark.slow
MODELS = sorted(real.MODELS)
REPLACEMENT = "\ufffd"
RARE = "𐍈𐌰𐍂 😀😁😂 👩\u200d🚀 é日 ok\ufffd\n"


@functools.cache
def tokenizer(model: str) -> Any:
    return AutoTokenizer.from_pretrained(real.cached(model), local_files_only=True)


@functools.cache
def texts(model: str) -> TokenTexts:
    return TokenTexts(tokenizer(model))


@functools.cache
def short_tokens(model: str) -> list[int]:
    """Most of them are bytes."""
    vocabulary = tokenizer(model).get_vocab()
    return sorted(token for string, token in vocabulary.items() if string.startswith("<0x") or len(string) == 1)[:512]


def decode(model: str, ids: Sequence[int], skip: bool = True) -> str:
    return tokenizer(model).decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def text_of(model: str, prompt: Sequence[int], output: Sequence[int], at_once: int, skip: bool = True) -> str:
    detokenizer = Detokenizer(texts(model).stream(prompt, skip_special_tokens=skip))
    pieces = [detokenizer.add(output[i : i + at_once]) for i in range(0, len(output), at_once)]
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == detokenizer.text
    return detokenizer.text


@pytest.mark.parametrize("model", MODELS)
@given(st.text(st.sampled_from(RARE) | st.characters(exclude_categories=["Cs"]), max_size=30), st.integers(1, 5))
@settings(max_examples=300, deadline=None)
def test_encoded_text(model: str, text: str, at_once: int) -> None:
    """A text comes back whole, and its tokens' bytes are its bytes."""
    prompt = tokenizer(model).encode("Say: ")
    ids = tokenizer(model).encode(text, add_special_tokens=False)
    wanted = decode(model, [*prompt, *ids])[len(decode(model, prompt)) :]
    assert text_of(model, prompt, ids, at_once) == wanted
    content = chat_logprobs(rows(ids), TokenReader(texts(model), prompt))["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode(errors="replace") == wanted


@pytest.mark.parametrize("model", MODELS)
@given(st.data(), st.integers(1, 5), st.booleans())
@settings(max_examples=500, deadline=None)
def test_random_tokens(model: str, data: st.DataObject, at_once: int, skip: bool) -> None:
    """Special tokens and broken characters too."""
    token = st.integers(0, len(tokenizer(model)) - 1) | st.sampled_from(short_tokens(model))
    ids = data.draw(st.lists(token, max_size=24))
    cut = data.draw(st.integers(0, len(ids)))
    before, whole = decode(model, ids[:cut], skip), decode(model, ids, skip)
    assume(whole.startswith(before))
    assert text_of(model, ids[:cut], ids[cut:], at_once, skip) == whole[len(before) :]


@pytest.mark.parametrize("model", MODELS)
def test_runs_of_rare_characters(model: str) -> None:
    ids = tokenizer(model).encode(RARE, add_special_tokens=False)
    for at_once in range(1, len(ids) + 1):
        assert text_of(model, tokenizer(model).encode("a"), ids, at_once) == RARE
