"""Literals that the tokenizer encodes as something else: the name of a special token, or a text that it normalizes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssd import RequestError
from ssd.request.structured import StructuredOutputsParams
from ssd.testing.walks import Walker

CALL = "<tool_call>"
NORMALIZERS = {"nfc": normalizers.NFC(), "nfkc": normalizers.NFKC(), "lowercase": normalizers.Lowercase()}
ADDED = {
    "special": AddedToken(CALL, special=True, normalized=False),
    "added": AddedToken(CALL, special=False, normalized=False),
    "normalized": AddedToken(CALL, special=False, normalized=True),
    "with blanks": AddedToken(CALL, special=True, normalized=False, lstrip=True, rstrip=True),
}
LITERALS = ("<tool_call>", "x<tool_call>y", "a <tool_call> b", "<tool_call><tool_call>")
NORMALIZED = {"nfc": "e\u0301x", "nfkc": "\ufb01x", "lowercase": "HeLLo"}


def tokenizer(added: AddedToken, *, normalizer: str | None = None, without: str = "") -> Any:
    """Returns a tokenizer of single bytes, with one added token.

    Args:
        normalizer: A key of ``NORMALIZERS``.
        without: Characters that no token writes.
    """
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(without))
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    if normalizer is not None:
        backend.normalizer = NORMALIZERS[normalizer]  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    fast.add_tokens([added], special_tokens=added.special)
    return fast


def walker(tokens: Any) -> Walker:
    return Walker(tokens, vocabulary=len(tokens), ends=[tokens.eos_token_id])


def asked(text: str) -> dict[str, tuple[StructuredOutputsParams, str]]:
    """Returns every way to ask for a literal, with a pattern of the whole output."""
    value, literal = json.dumps(text, ensure_ascii=False), re.escape(text)
    schema = {"type": "object", "properties": {text: {"const": 1}}, "required": [text], "additionalProperties": False}
    of = StructuredOutputsParams
    return {
        "regex": (of(regex=f"{literal}[a-c]"), f"{literal}[a-c]"),
        "choice": (of(choice=(text,)), literal),
        "choices": (of(choice=(text, f"{text}!", "other")), f"{literal}!?|other"),
        "enum": (of(json=json.dumps({"enum": [text, f"b{text}"]})), f'"b?{literal}"'),
        "const": (of(json=json.dumps({"const": text})), f'"{literal}"'),
        "key": (of(json=json.dumps(schema), disable_any_whitespace=True), rf'\{{"{literal}": ?1\}}'),
        "lark": (of(grammar=f"start: {value} /[a-c]/"), f"{literal}[a-c]"),
        "lark regex": (of(grammar=f"start: /{literal}[a-c]/"), f"{literal}[a-c]"),
        "ebnf": (of(grammar=f"root ::= {value} [a-c]"), f"{literal}[a-c]"),
    }


KINDS = sorted(asked(CALL))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", ADDED)
def test_the_name_of_a_special_token_is_written_as_text(kind: str, added: str) -> None:
    writer = walker(tokenizer(ADDED[added]))
    for text in LITERALS:
        wanted, pattern = asked(text)[kind]
        for seed in range(3):
            written, complete = writer.walk(wanted, seed)
            assert complete and re.fullmatch(pattern, written), written


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_what_the_tokenizer_normalizes_is_written_as_it_is(kind: str, normalizer: str) -> None:
    wanted, pattern = asked(NORMALIZED[normalizer])[kind]
    writer = walker(tokenizer(ADDED["special"], normalizer=normalizer))
    for seed in range(3):
        written, complete = writer.walk(wanted, seed)
        assert complete and re.fullmatch(pattern, written), written


def test_a_special_token_that_the_grammar_names_is_a_token() -> None:
    tokens = tokenizer(ADDED["special"])
    call = tokens.convert_tokens_to_ids(CALL)
    wanted = StructuredOutputsParams(grammar=f'start: {CALL} "{CALL}" <[{call}]>')
    matcher = walker(tokens).grammars.matcher(wanted)
    spelt = [*tokens.convert_tokens_to_ids(list(CALL))]
    for token in (call, *spelt, call):
        assert matcher.allowed([()])[0].nonzero().flatten().tolist() == [token]
        assert matcher.advance(token), matcher.error
    assert matcher.complete


def test_drafted_tokens_are_replaced_by_text() -> None:
    tokens = tokenizer(ADDED["special"])
    matcher = walker(tokens).grammars.matcher(StructuredOutputsParams(regex=f"x{CALL}[a-c]"))
    first, *spelt = tokens.convert_tokens_to_ids(list("x" + CALL))
    [wrong] = tokens.convert_tokens_to_ids(["q"])
    assert matcher.mended([], [first, *[wrong] * 20]) == [first, *spelt, *[wrong] * (20 - len(spelt))]
    assert matcher.mended([first], [tokens.convert_tokens_to_ids(CALL), wrong]) == spelt[:2]


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"choices"}))
def test_what_the_tokenizer_cannot_write_is_refused(kind: str) -> None:
    wanted, _ = asked(CALL)[kind]
    with pytest.raises(RequestError, match=r"the model's tokenizer cannot write '_call>.*' after '.*<tool'"):
        walker(tokenizer(ADDED["special"], without="_")).grammars.matcher(wanted)


def test_a_missing_letter_of_a_class_is_named() -> None:
    grammars = walker(tokenizer(ADDED["special"], without="_-")).grammars
    with pytest.raises(RequestError, match="no token of the model can follow 'ab'"):
        grammars.matcher(StructuredOutputsParams(regex="ab[_-]"))
