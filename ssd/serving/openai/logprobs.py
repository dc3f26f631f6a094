"""Log-probabilities in OpenAI's two response schemas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...engine.token_text import TokenTexts
from ...request.output import TokenLogprob

LEAST = -9999.0
"""OpenAI's value for a token without probability: JSON has no infinity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadToken:
    """A token in its place."""

    name: str
    """The text it adds. A special token that the text leaves out has its name instead."""
    raw: bytes
    """What it adds to the text: the tokens' bytes joined are the text."""

    @property
    def distinct(self) -> str:
        """The text, or ``bytes:\\xf0\\x9f`` for a part of a character, so that tokens stay distinct."""
        try:
            self.raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.raw)
        return self.name


class TokenReader:
    """Reads the tokens of a text in order, each in its place.

    Args:
        prompt: What stands before the text.
    """

    def __init__(self, texts: TokenTexts, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True):
        self._stream = texts.stream(prompt, skip_special_tokens=skip_special_tokens)
        self._final = 0

    @property
    def offset(self) -> int:
        """Complete characters of the text so far: where the next token's text begins."""
        return self._final + len(self._stream.open)

    def __getitem__(self, token: int) -> ReadToken:
        """Returns a token as it would be read next."""
        raw = self._stream.raw(token)
        return ReadToken(name=self._stream.marker(token) or raw.decode(errors="replace"), raw=raw)

    def add(self, token: int) -> None:
        """Goes on to the place after a token."""
        self._final += len(self._stream.add(token))


def chat_logprobs(tokens: Sequence[TokenLogprob], reader: TokenReader) -> dict[str, Any]:
    """Returns ``choices[].logprobs`` of a chat completion.

    Args:
        reader: Stands before the tokens, and is moved behind them.
    """

    def one(token: int, logprob: float) -> dict[str, Any]:
        read = reader[token]
        return {"token": read.name, "logprob": max(logprob, LEAST), "bytes": list(read.raw)}

    content = []
    for token in tokens:
        content.append({**one(token.token_id, token.logprob), "top_logprobs": [one(*likely) for likely in token.top]})
        reader.add(token.token_id)
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenLogprob], reader: TokenReader) -> dict[str, Any]:
    """Returns ``choices[].logprobs`` of a text completion. ``text_offset`` counts characters of the text.

    Args:
        reader: Stands before the tokens, and is moved behind them.
    """
    offsets, names, likeliest = [], [], []
    for token in tokens:
        offsets.append(reader.offset)
        names.append(reader[token.token_id].distinct)
        likeliest.append(_likeliest(token, reader))
        reader.add(token.token_id)
    return {
        "text_offset": offsets,
        "tokens": names,
        "token_logprobs": [max(token.logprob, LEAST) for token in tokens],
        "top_logprobs": likeliest,
    }


def _likeliest(token: TokenLogprob, reader: TokenReader) -> dict[str, float]:
    """Returns the most probable tokens, best first. The token itself is always among them, so there may be one
    more than asked for, as in OpenAI's API."""
    found: dict[str, float] = {}
    for id, value in (*token.top, (token.token_id, token.logprob)):
        found.setdefault(reader[id].distinct, max(value, LEAST))
    return found
