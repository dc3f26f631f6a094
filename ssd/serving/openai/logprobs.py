"""Log-probabilities in OpenAI's two response schemas."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...request.output import TokenLogprob

LEAST = -9999.0
"""OpenAI's value for a token without probability: JSON has no infinity."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes of each token of a tokenizer. A token may hold only part of a character."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._read(token)
        return known

    def characters(self, token: int) -> int:
        """Returns how many UTF-8 characters begin in the token."""
        return sum(byte & 0xC0 != 0x80 for byte in self[token])

    def _read(self, token: int) -> bytes:
        text = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return text.encode()  # padding of the vocabulary, which the tokenizer does not know
        if byte := _BYTE.fullmatch(piece):  # SentencePiece's byte fallback
            return bytes([int(byte[1], 16)])
        if "\N{LOWER ONE EIGHTH BLOCK}" in piece:  # SentencePiece's space, which decoding alone drops at the front
            return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        if "\N{REPLACEMENT CHARACTER}" in text and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        return text.encode()


def _byte_level() -> dict[str, int]:
    """Returns the byte of each character of byte-level BPE. Printable Latin-1 characters map to themselves; the
    characters from U+0100 map to the other bytes in order (GPT-2's table; Radford et al. 2019, section 2.2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level()


def chat_logprobs(tokens: Sequence[TokenLogprob], texts: TokenBytes) -> dict[str, Any]:
    """Returns ``choices[].logprobs`` of a chat completion."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        raw = texts[token]
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, LEAST), "bytes": list(raw)}

    content = [
        {**one(token.token_id, token.logprob), "top_logprobs": [one(*likely) for likely in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenLogprob], texts: TokenBytes, offset: int = 0) -> dict[str, Any]:
    """Returns ``choices[].logprobs`` of a text completion.

    Args:
        offset: ``text_offset`` of the first token, in characters.
    """
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += texts.characters(token.token_id)
    return {
        "text_offset": offsets,
        "tokens": [_shown(texts[token.token_id]) for token in tokens],
        "token_logprobs": [max(token.logprob, LEAST) for token in tokens],
        "top_logprobs": [_likeliest(token, texts) for token in tokens],
    }


def _likeliest(token: TokenLogprob, texts: TokenBytes) -> dict[str, float]:
    """Returns the most probable tokens, best first. The token itself is always among them, so there may be one
    more than asked for, as in OpenAI's API."""
    found: dict[str, float] = {}
    for id, value in (*token.top, (token.token_id, token.logprob)):
        found.setdefault(_shown(texts[id]), max(value, LEAST))
    return found


def _shown(raw: bytes) -> str:
    """Returns the text, or ``bytes:\\xf0\\x9f`` for part of a character, so that tokens stay distinct."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
