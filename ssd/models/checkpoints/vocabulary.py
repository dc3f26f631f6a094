"""Vocabularies: what each token id stands for, so that ids of two tokenizers can be compared."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

ROLES = ("bos", "eos")
"""Special tokens that stand for each other whatever they are called."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The token ids of one model, and what they stand for.

    Two tokens of different tokenizers are the same if they have the same bytes, or the same special meaning. Bytes are
    those that the token adds in the middle of a text: the markers of spaces (``Ġ``, ``▁``) are spaces, and byte tokens
    (``<0x0A>``) and the characters of byte-level vocabularies are bytes.
    """

    ids: Mapping[str, int]
    """Token ids by spelling."""
    spoken: Mapping[int, bytes]
    """Bytes of the tokens that add some to a text."""
    special: Mapping[int, str]
    """Spelling of the special tokens."""
    added: frozenset[int]
    """Ids of the tokens that are not part of the trained vocabulary."""
    named: Mapping[int, str]
    """Roles (``ROLES``) of special tokens."""
    byte_tokens: frozenset[int]
    """Ids of the tokens of byte-fallback vocabularies that stand for one byte."""

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Reads the vocabulary of a transformers tokenizer."""
        ids = tokenizer.get_vocab()
        entries = tokenizer.added_tokens_decoder
        special = {token: str(entry) for token, entry in entries.items() if entry.special}
        special |= {
            ids[name]: name for name in tokenizer.all_special_tokens if name in ids and ids[name] not in special
        }
        spell = _Spelling(tokenizer)
        texts = {token: spell.raw(name, added=token in entries) for name, token in ids.items() if token not in special}
        bytewise = frozenset(token for name, token in ids.items() if spell.is_byte(name))
        named = {getattr(tokenizer, f"{role}_token_id"): role for role in reversed(ROLES)}
        named.pop(None, None)
        return cls(
            ids=ids,
            spoken={token: raw for token, raw in texts.items() if raw},
            special=special,
            added=frozenset(entries),
            named=named,
            byte_tokens=bytewise,
        )

    @cached_property
    def tokens(self) -> frozenset[int]:
        """All ids."""
        return frozenset(self.ids.values())

    @property
    def size(self) -> int:
        """One more than the largest id; ids need not be contiguous."""
        return max(self.ids.values()) + 1

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """Token ids by bytes. A word that is also spelled by a byte token is the word."""
        found: dict[bytes, int] = {}
        for token, raw in sorted(self.spoken.items(), reverse=True):
            if raw not in found or token not in self.byte_tokens:
                found[raw] = token
        return found

    @cached_property
    def by_name(self) -> dict[str, int]:
        """Ids of special tokens by spelling."""
        return {name: token for token, name in self.special.items()}

    @cached_property
    def by_role(self) -> dict[str, int]:
        """Ids of special tokens by role."""
        return {role: token for token, role in self.named.items()}

    def counterpart(self, token: int, other: Vocabulary) -> int | None:
        """Returns the id of ``other`` that stands for the same as this vocabulary's ``token``; None if none does."""
        if token in self.special:
            same = other.by_name.get(self.special[token])
            return other.by_role.get(self.named.get(token, "")) if same is None else same
        return other.by_bytes.get(self.spoken.get(token, b""))


class _Spelling:
    """How a tokenizer spells bytes, found by letting it decode a few strings."""

    def __init__(self, tokenizer: Any):
        def joined(*strings: str) -> str:
            return tokenizer.convert_tokens_to_string(list(strings))

        sample = "\N{GRINNING FACE}"
        characters = {byte: character for character, byte in _ALPHABET.items()}
        self._byte_level = joined(*(characters[byte] for byte in sample.encode())) == sample
        self._fallback = joined(*(f"<0x{byte:02X}>" for byte in sample.encode())) == sample
        self._marked = joined("a", "\u2581a") == "a a"

    def raw(self, name: str, *, added: bool) -> bytes:
        """Returns the bytes that a token adds to a text. Those of ``added`` tokens are their spelling."""
        if self._fallback and (byte := _BYTE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        if self._byte_level and not added and all(character in _ALPHABET for character in name):
            return bytes(_ALPHABET[character] for character in name)
        return (name.replace("\u2581", " ") if self._marked else name).encode()

    def is_byte(self, name: str) -> bool:
        """Whether this is a byte token of a byte-fallback vocabulary."""
        return self._fallback and _BYTE.fullmatch(name) is not None


def _alphabet() -> dict[str, int]:
    """Returns the byte of each character of byte-level vocabularies: printable Latin-1 stands for itself, the
    characters from U+0100 on for the other bytes in order (GPT-2's table; Radford et al. 2019, section 2.2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _alphabet()
