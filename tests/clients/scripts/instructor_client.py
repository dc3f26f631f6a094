"""instructor: its default mode (tools) and the others."""

from __future__ import annotations

import os
from typing import Any, Literal

import instructor
import openai
from checks import MODEL, QUESTION, V1, check, run
from pydantic import BaseModel


class City(BaseModel, extra="forbid"):  # or the model may add properties until it is cut
    city: Literal["Paris", "Rome"]
    large: bool


def ask(client: Any, **fields: Any) -> None:
    answer = client.chat.completions.create(
        response_model=City,
        messages=[{"role": "user", "content": QUESTION}],
        max_retries=0,
        temperature=0,
        max_tokens=96,
        **fields,
    )
    assert isinstance(answer, City)


def client(**fields: Any) -> Any:
    return instructor.from_openai(openai.OpenAI(base_url=V1, api_key="none", max_retries=0, timeout=300), **fields)


@check
def default_mode() -> None:
    ask(client(), model=MODEL)


@check
def from_provider() -> None:
    os.environ.update(OPENAI_BASE_URL=V1, OPENAI_API_KEY="none")
    ask(instructor.from_provider(f"openai/{MODEL}"))


@check
def json_schema_mode() -> None:
    ask(client(mode=instructor.Mode.JSON_SCHEMA), model=MODEL)


@check
def tools_strict_mode() -> None:
    ask(client(mode=instructor.Mode.TOOLS_STRICT), model=MODEL)


@check
def partial_stream() -> None:
    parts = list(
        client().chat.completions.create_partial(
            response_model=City,
            messages=[{"role": "user", "content": QUESTION}],
            model=MODEL,
            temperature=0,
            max_tokens=96,
        )
    )
    assert parts[-1].city in ("Paris", "Rome")


run()
