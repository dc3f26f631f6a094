"""Log-probabilities in OpenAI's two response schemas, and what else an answer says about its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...engine.request import Request
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


@dataclass(frozen=True, kw_only=True, slots=True)
class IdToken(ReadToken):
    """A token that is called by its id, ``token_id:7``."""

    @property
    def distinct(self) -> str:
        return self.name


class IdReader(TokenReader):
    """Reads tokens that are called by their ids."""

    def __getitem__(self, token: int) -> ReadToken:
        return IdToken(name=f"token_id:{token}", raw=super().__getitem__(token).raw)


class Schema(Protocol):
    """How an endpoint writes log-probabilities."""

    @staticmethod
    def logprobs(tokens: Sequence[TokenLogprob], reader: TokenReader) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenDetails:
    """What an answer says about the prompt and the tokens, beside its text and ``logprobs``."""

    echoed: tuple[str, ...] = ()
    """The texts of the job's prompts, if each choice begins with its prompt."""
    prompt_logprobs: bool = False
    token_ids: bool = False
    called_by_id: bool = False
    """Whether log-probabilities call tokens by their ids."""


class ChoiceTokens:
    """The tokens of one choice, as its answer shows them. Parts of the answer are read in order.

    Args:
        request: Of the choice. Its prompt is scored before its first event.
        prompt: Which of the job's prompts it completes.
    """

    def __init__(self, texts: TokenTexts, request: Request, details: TokenDetails, prompt: int):
        self._texts, self._request, self._details = texts, request, details
        self._echoed = details.echoed[prompt] if details.echoed else None
        """The prompt's text, until it is read."""
        params, ids, kind = request.params, request.prompt_ids, IdReader if details.called_by_id else TokenReader
        skip = params.skip_special_tokens
        if self._echoed is not None:
            skip = skip and _decoded(texts, ids) == self._echoed  # otherwise the prompt spells special tokens out
            ids = ()
        self._reader = kind(texts, ids, skip_special_tokens=skip)

    def read(self, schema: Schema, tokens: Sequence[TokenLogprob] | None) -> tuple[str, dict[str, Any] | None]:
        """Reads the next tokens.

        Returns: the text that stands before theirs, which is the echoed prompt or ``""``, and ``logprobs`` of both.
        """
        before, self._echoed = self._echoed, None
        if before is None or self._request.logprobs is None or self._request.prompt_logprobs is None:
            return before or "", schema.logprobs(tokens, self._reader) if tokens else None
        first, *_ = self._request.prompt_ids
        told = {
            "text_offset": [0],
            "tokens": [self._reader[first].distinct],
            "token_logprobs": [None],
            "top_logprobs": [None],
        }
        self._reader.add(first)
        scored = [token for token in self._request.prompt_logprobs if token is not None]
        for name, values in completion_logprobs([*scored, *(tokens or ())], self._reader).items():
            told[name] += values
        return before, told

    def ids(self, tokens: Sequence[int]) -> dict[str, Any]:
        """Returns ``token_ids`` of a part of the answer, if asked for."""
        return {"token_ids": list(tokens)} if self._details.token_ids else {}

    def prompt_ids(self) -> dict[str, Any]:
        """Returns ``prompt_token_ids``, if asked for."""
        return {"prompt_token_ids": list(self._request.prompt_ids)} if self._details.token_ids else {}

    def prompt_scores(self) -> dict[str, Any]:
        """Returns ``prompt_logprobs`` as vLLM does, if asked for: for each token of the prompt what could have stood
        there, the token itself first."""
        if not self._details.prompt_logprobs or self._request.prompt_logprobs is None:
            return {}
        told, reader = list[dict[str, Any] | None](), TokenReader(self._texts, skip_special_tokens=False)
        for token, scored in zip(self._request.prompt_ids, self._request.prompt_logprobs, strict=True):
            told.append(None if scored is None else _candidates(scored, reader))
            reader.add(token)
        return {"prompt_logprobs": told}


def _decoded(texts: TokenTexts, tokens: Sequence[int]) -> str:
    stream = texts.stream()
    return "".join([stream.add(token) for token in tokens]) + stream.tail


def _candidates(scored: TokenLogprob, reader: TokenReader) -> dict[str, Any]:
    """Returns a token and the most probable ones in its place, by id."""
    ranked = [(scored.token_id, scored.logprob, scored.rank)]
    ranked += [(id, value, rank) for rank, (id, value) in enumerate(scored.top, 1) if id != scored.token_id]
    return {
        str(id): {"logprob": max(value, LEAST), "rank": rank, "decoded_token": reader[id].name}
        for id, value, rank in ranked
    }


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
