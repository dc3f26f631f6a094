"""The HTTP calls of Open WebUI 0.12.4 to a server of the OpenAI API, with the library it uses.

The package itself (a web application with a database, 100 MB without its dependencies) is not installed. Bodies follow
its ``routers/openai.py`` (models, chat, responses), ``routers/tasks.py`` (titles, tags, follow-up questions) and
``utils/middleware.py`` (tools).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from checks import MODEL, QUESTION, V1, check, run

HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer none"}
ASKED = [{"role": "user", "content": QUESTION}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


def asked(ask: Callable[[aiohttp.ClientSession], Awaitable[Any]]) -> Any:
    async def within() -> Any:
        async with aiohttp.ClientSession(trust_env=True, timeout=aiohttp.ClientTimeout(total=300)) as session:
            return await ask(session)

    return asyncio.run(within())


def post(path: str, **payload: Any) -> Any:
    """Returns the JSON answer, or the list of a stream's events."""

    async def ask(session: aiohttp.ClientSession) -> Any:
        async with session.request("POST", f"{V1}{path}", data=json.dumps(payload), headers=HEADERS) as answer:
            text = await answer.text()
            assert answer.status == 200, text
            if "text/event-stream" not in answer.headers["Content-Type"]:
                return json.loads(text)
            lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
            return [json.loads(line) for line in lines if line != "[DONE]"]

    return asked(ask)


@check
def models() -> None:
    async def ask(session: aiohttp.ClientSession) -> Any:
        async with session.get(f"{V1}/models", headers=HEADERS) as answer:
            assert answer.status == 200
            return await answer.json()

    assert MODEL in [model["id"] for model in asked(ask)["data"]]


@check
def chat() -> None:
    events = post(
        "/chat/completions",
        stream=True,
        model=MODEL,
        messages=[{"role": "system", "content": "Be brief."}, *ASKED],
        stream_options={"include_usage": True},
    )
    assert any(choice["delta"].get("content") for event in events for choice in event["choices"])
    assert events[-1]["usage"]["completion_tokens"] > 0


@check
def chat_with_the_parameters_of_its_settings() -> None:
    post(
        "/chat/completions",
        stream=True,
        model=MODEL,
        messages=[*ASKED, {"role": "assistant", "content": ""}, {"role": "user", "content": "Please."}],
        temperature=0.8,
        top_p=0.9,
        min_p=0.0,
        max_tokens=8,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        seed=1,
        stop=["###"],
        reasoning_effort="low",
        logit_bias={"30": 1},
        response_format={"type": "text"},
    )


@check
def task_titles() -> None:
    prompt = 'Write a title of two words for this chat. Answer as JSON: { "title": "your title" }'
    answer = post(
        "/chat/completions",
        model=MODEL,
        messages=[{"role": "user", "content": prompt}],
        stream=False,
        max_tokens=1000,
    )
    assert answer["choices"][0]["message"]["content"]


@check
def native_tools() -> None:
    events = post("/chat/completions", stream=True, model=MODEL, messages=ASKED, tools=[TOOL], max_tokens=32)
    assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls")
    call = {
        "index": 0,
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    replayed = [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
    ]
    post("/chat/completions", stream=True, model=MODEL, messages=replayed, tools=[TOOL], max_tokens=8)


@check
def responses() -> None:
    content = [{"type": "input_text", "text": QUESTION}]
    events = post(
        "/responses",
        model=MODEL,
        stream=True,
        instructions="Be brief.",
        input=[{"type": "message", "role": "user", "content": content}],
        max_output_tokens=16,
    )
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] in ("response.completed", "response.incomplete")


run()
