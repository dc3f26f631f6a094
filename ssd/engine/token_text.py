"""What each token adds to a text, and text that grows token by token.

``TextStream`` gives exactly the text of one decode of all tokens, although it reads each token once. Three facts about
decoders make that possible:

* Tokens are decoded as strings, in order, after special tokens are dropped (``convert_tokens_to_string``).
* Apart from bytes, what a string adds depends only on whether it is the first one, a later one, or the last one. A
  decoder may strip the space of the first, and drop the word border after the last.
* Bytes come in two kinds. A byte-level decoder joins the bytes of all tokens and replaces what is not UTF-8 by U+FFFD.
  A byte-fallback decoder joins a run of byte tokens such as ``<0xF0>``: if the run as a whole is not UTF-8, each of its
  bytes becomes U+FFFD. So a run is certain when another token ends it, or when it can no longer become UTF-8.
"""

from __future__ import annotations

import codecs
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_NEIGHBOUR = "a"
"""A string that every decoder leaves as it is."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_PARTIAL = 3
"""Most bytes of a UTF-8 character that is not complete."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What a token adds to a text in one position."""

    last: str
    """If no token follows."""
    more: str
    """What it adds to that if another token follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenText:
    """What one token adds to a text."""

    string: str
    """The token as the vocabulary spells it; ``""`` for ids that no token has."""
    special: bool
    """Whether ``skip_special_tokens`` leaves it out."""
    byte: bool
    """Whether it is a byte token of a byte-fallback vocabulary."""
    raw: bytes
    """What it adds after other tokens. Byte tokens and byte-level tokens may hold a part of a character."""
    first: Form
    later: Form


class TokenTexts:
    """The texts of a tokenizer's tokens, each read at its first use. Safe to share between threads.

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[int, TokenText] = {}
        sample = "\N{GRINNING FACE}"
        self.byte_level = self.join([_CHARACTERS[byte] for byte in sample.encode()]) == sample
        """Whether the decoder joins bytes of all tokens."""
        self._fallback = self.join([f"<0x{byte:02X}>" for byte in sample.encode()]) == sample

    def __getitem__(self, token: int) -> TokenText:
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._read(token)
        return known

    def join(self, strings: Sequence[str]) -> str:
        """Decodes tokens given as strings."""
        return self._tokenizer.convert_tokens_to_string(list(strings))

    def stream(self, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> TextStream:
        """Returns the text after a prompt, empty so far.

        A character whose bytes the prompt begins belongs to the new text if that completes it. Otherwise, it is part of
        the prompt's text, as one U+FFFD.
        """
        kind = _ByteLevelStream if self.byte_level else _StringStream
        return kind(self, prompt, skip_special_tokens=skip_special_tokens)

    def _read(self, token: int) -> TokenText:
        string = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(string, str):
            nothing = Form(last="", more="")
            return TokenText(string="", special=False, byte=False, raw=b"", first=nothing, later=nothing)
        shown, skipped = (
            self._tokenizer.decode([token], skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            for skip in (False, True)
        )
        first, later = self._form([], string), self._form([_NEIGHBOUR], string)
        byte = _BYTE.fullmatch(string) if self._fallback else None
        if byte:
            raw = bytes([int(byte[1], 16)])
        elif self.byte_level and all(character in _BYTES for character in string):
            raw = bytes(_BYTES[character] for character in string)
        elif self.byte_level:
            raw = string.encode()
        else:
            raw = (later.last + later.more).encode()
        return TokenText(string=string, special=shown != skipped, byte=bool(byte), raw=raw, first=first, later=later)

    def _form(self, before: list[str], string: str) -> Form:
        begin = len(self.join(before))
        after = len(self.join([*before, _NEIGHBOUR, _NEIGHBOUR])) - len(self.join([*before, _NEIGHBOUR]))
        last = self.join([*before, string])[begin:]
        within = self.join([*before, string, _NEIGHBOUR])[begin:]
        within = within[: len(within) - after]
        return Form(last=last, more=within[len(last) :]) if within.startswith(last) else Form(last=within, more="")


class TextStream(ABC):
    """The text of a growing list of tokens."""

    def __init__(self, texts: TokenTexts, skip_special_tokens: bool):
        self._texts, self._skip = texts, skip_special_tokens

    def add(self, token: int) -> str:
        """Adds a token and returns the text that became final."""
        text = self._texts[token]
        return "" if self._left_out(text) else self._add(text)

    def marker(self, token: int) -> str:
        """Returns the token as the vocabulary spells it if it is left out as a special token, otherwise ``""``."""
        text = self._texts[token]
        return text.string if self._skip and text.special else ""

    @abstractmethod
    def raw(self, token: int) -> bytes:
        """Returns what a token would add. It may be a part of a character; tokens that are left out add nothing."""

    @property
    @abstractmethod
    def open(self) -> str:
        """The complete characters after the final text, as they are if no token follows."""

    @property
    @abstractmethod
    def tail(self) -> str:
        """All text after the final text if no token follows."""

    @abstractmethod
    def _add(self, text: TokenText) -> str: ...

    def _left_out(self, text: TokenText) -> bool:
        return not text.string or (self._skip and text.special)

    def _visible_backwards(self, prompt: Sequence[int]) -> Iterator[TokenText]:
        return (text for token in reversed(prompt) if not self._left_out(text := self._texts[token]))


class _ByteLevelStream(TextStream):
    """All bytes are one sequence, so a character is final when its last byte is there."""

    def __init__(self, texts: TokenTexts, prompt: Sequence[int], *, skip_special_tokens: bool):
        super().__init__(texts, skip_special_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for text in reversed([*itertools.islice(self._visible_backwards(prompt), _MAX_PARTIAL)]):
            self._decode(text.raw)
        self._begun = bool(self._partial)
        """The prompt has begun a character, and so far no other has followed it."""

    def raw(self, token: int) -> bytes:
        text = self._texts[token]
        return b"" if self._left_out(text) else text.raw

    @property
    def open(self) -> str:
        return ""

    @property
    def tail(self) -> str:
        return self._without_begun(self._partial.decode(errors="replace"))

    def _add(self, text: TokenText) -> str:
        decoded = self._decode(text.raw)
        fresh = self._without_begun(decoded)
        self._begun = self._begun and not decoded
        return fresh

    def _decode(self, raw: bytes) -> str:
        text = self._utf8.decode(raw)
        # After two bytes of a surrogate Python waits for the third, although no character begins so.
        broken = self._partial.decode(errors="replace")
        if len(broken) > 1:
            self._utf8.reset()
            text += broken
        return text

    @property
    def _partial(self) -> bytes:
        return self._utf8.getstate()[0]

    def _without_begun(self, text: str) -> str:
        return text.removeprefix(REPLACEMENT) if self._begun else text


class _StringStream(TextStream):
    """Strings are decoded one by one, and runs of byte tokens together."""

    def __init__(self, texts: TokenTexts, prompt: Sequence[int], *, skip_special_tokens: bool):
        super().__init__(texts, skip_special_tokens)
        before = self._visible_backwards(prompt)
        run: list[TokenText] = []
        last = next(before, None)
        while last is not None and last.byte:
            run.append(last)
            last = next(before, None)
        self._before: list[str] = []
        """A string that stands for all before the run, if there is any."""
        self._more = ""
        """What the last string adds if another follows."""
        self._start_run()
        if last is not None:
            self._before = [_NEIGHBOUR]
            self._more = last.later.more if not run else ""
        for text in reversed(run):
            self._add_byte(text)
        # The characters that are complete belong to the prompt, whatever follows.
        if self._complete:
            self._before = [_NEIGHBOUR]
        self._run, self._complete, self._characters = self._run[self._complete :], 0, ""
        self._begun = len(self._run)
        """Bytes of the run that the prompt has."""

    def raw(self, token: int) -> bytes:
        text = self._texts[token]
        if self._left_out(text):
            return b""
        within = self._before or self._run or (text.byte and not text.raw.isascii())
        return text.raw if within else (text.first.last + text.first.more).encode()

    @property
    def open(self) -> str:
        return self._characters if self._before else self._joined(self._run[: self._complete])

    @property
    def tail(self) -> str:
        text = self._joined(self._run)
        return text if self._complete == len(self._run) else text[self._begun :]

    def _add(self, text: TokenText) -> str:
        if text.byte:
            fresh, self._more = self._more, ""
            return fresh + self._add_byte(text)
        fresh = self._more + self.tail
        form = text.later if self._before or self._run else text.first
        self._before, self._more = [_NEIGHBOUR], form.more
        self._start_run()
        return fresh + form.last

    def _start_run(self) -> None:
        self._run: list[str] = []
        self._complete = 0
        """Byte tokens of the run that are whole characters."""
        self._characters = ""
        """These characters."""
        self._broken = False
        """The run is not UTF-8, and its text so far is final."""
        self._begun = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    def _add_byte(self, text: TokenText) -> str:
        if self._broken:
            return REPLACEMENT
        self._run.append(text.string)
        try:
            self._characters += self._utf8.decode(text.raw)
        except UnicodeDecodeError:
            fresh = self._joined(self._run)[self._begun :]
            self._start_run()
            self._before, self._broken = [_NEIGHBOUR], True
            return fresh
        if not self._utf8.getstate()[0]:
            self._complete = len(self._run)
        return ""

    def _joined(self, run: Sequence[str]) -> str:
        if not run:
            return ""
        return self._texts.join([*self._before, *run])[len("".join(self._before)) :]


def _byte_level() -> dict[str, int]:
    """Returns the byte of each character of byte-level BPE. Printable Latin-1 characters map to themselves; the
    characters from U+0100 map to the other bytes in order (GPT-2's table; Radford et al. 2019, section 2.2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level()
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}
