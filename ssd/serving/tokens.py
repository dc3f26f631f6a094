"""Routes about tokens, as vLLM has them: /tokenize and /detokenize."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.requests import ClientDisconnect

from ..engine.async_engine import AsyncEngine
from ..request.checks import MAX_TOKEN_ID
from .http import strict_json
from .http.bodies import Fields, read_fields
from .http.errors import APIError
from .openai.jobs import JobReader
from .openai.routes import CLIENT_GONE


class TokenizeOptions(Fields):
    return_token_strs: bool | None = None


class TextBody(TokenizeOptions):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class TokensBody(Fields):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]]


class Tokens:
    """Tokenizes prompts exactly as completions and chat completions do, and decodes token ids. Safe to call from any
    thread.

    Args:
        jobs: reads the bodies of those endpoints.
    """

    def __init__(self, engine: AsyncEngine, jobs: JobReader):
        self._tokenizer, self._jobs = engine.tokenizer, jobs
        self._length = engine.config.engine.max_model_len
        self._largest = max(engine.tokenizer.get_vocab().values())

    def tokenize(self, raw: bytes) -> dict[str, Any]:
        """Answers a /tokenize body: one with ``prompt``, or a chat body with ``messages``. Raises: APIError."""
        given = _object(raw)
        if "messages" in given:
            options = read_fields(TokenizeOptions, given)
            ids = self._jobs.chat_prompt({k: v for k, v in given.items() if k not in TokenizeOptions.model_fields})
        else:
            options = body = read_fields(TextBody, given)
            self._jobs.check_model(body.model)
            ids = list(self._tokenizer(body.prompt, add_special_tokens=body.add_special_tokens)["input_ids"])
        strings = self._tokenizer.convert_ids_to_tokens(ids) if options.return_token_strs else None
        return {"count": len(ids), "max_model_len": self._length, "tokens": ids, "token_strs": strings}

    def detokenize(self, raw: bytes) -> dict[str, Any]:
        """Answers a /detokenize body. Raises: APIError."""
        body = read_fields(TokensBody, _object(raw))
        self._jobs.check_model(body.model)
        if wrong := [token for token in body.tokens if token > self._largest]:
            raise APIError(
                400, f"tokens must be in [0, {self._largest}]; got {wrong[0]}", param="tokens", code="invalid_value"
            )
        text = self._tokenizer.decode(body.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return {"prompt": text}


def add_tokens(app: FastAPI, tokens: Tokens) -> None:
    async def run(request: Request, answer: Callable[[bytes], dict[str, Any]]) -> Response:
        try:
            raw = await request.body()
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(await asyncio.to_thread(answer, raw))

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await run(request, tokens.tokenize)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await run(request, tokens.detokenize)


def _object(raw: bytes) -> dict[str, Any]:
    given = strict_json.parse(raw)
    if not isinstance(given, dict):
        raise APIError(400, "the body must be a JSON object")
    strict_json.check(given)
    return given
