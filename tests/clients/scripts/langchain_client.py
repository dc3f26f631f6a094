"""langchain-openai."""

from __future__ import annotations

from typing import Any, Literal

from checks import MODEL, QUESTION, V1, check, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    city: Literal["Paris", "Rome"]


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Tells the weather of a city."""
    return f"Sunny in {city}."


def model(**more: Any) -> ChatOpenAI:
    fields = {"max_tokens": 96, "temperature": 0, "max_retries": 0, "timeout": 300, **more}
    return ChatOpenAI(model=MODEL, base_url=V1, api_key="none", **fields)


@check
def invoke_and_history() -> None:
    answer = model().invoke(QUESTION)
    assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] > 0
    model(max_tokens=4).invoke([HumanMessage(QUESTION), answer, HumanMessage("Thank you.")])


@check
def stream_with_usage() -> None:
    chunks = list(model(max_tokens=8, stream_usage=True).stream(QUESTION))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.usage_metadata["output_tokens"] == 8


@check
def batch() -> None:
    assert len(model(max_tokens=4).batch([QUESTION] * 4)) == 4


@check
def logprobs() -> None:
    answer = model(max_tokens=4).bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert len(answer.response_metadata["logprobs"]["content"]) == 4


@check
def structured_by_schema() -> None:
    assert isinstance(model().with_structured_output(City).invoke(QUESTION), City)


@check
def structured_by_function() -> None:
    assert isinstance(model().with_structured_output(City, method="function_calling").invoke(QUESTION), City)


@check
def bind_tools() -> None:
    messages = [HumanMessage(QUESTION)]
    answer = model().bind_tools([get_weather], tool_choice="any").invoke(messages)
    call, *_ = answer.tool_calls
    messages += [answer, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    model(max_tokens=8).bind_tools([get_weather]).invoke(messages)


@check
def stream_tools() -> None:
    chunks = list(model().bind_tools([get_weather], tool_choice="any").stream(QUESTION))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.tool_calls[0]["name"] == "get_weather"


@check
def responses() -> None:
    answer = model(use_responses_api=True).invoke(QUESTION)
    assert "Paris" in answer.text
    assert "".join(chunk.text for chunk in model(use_responses_api=True).stream(QUESTION)) == answer.text


@check
def completions() -> None:
    plain = OpenAI(model=MODEL, base_url=V1, api_key="none", max_tokens=4, temperature=0, max_retries=0)
    assert plain.invoke("The capital of France is").startswith(" Paris")


run()
