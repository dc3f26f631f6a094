"""LiteLLM, as the OpenAI and the hosted_vllm provider."""

from __future__ import annotations

import os
from typing import Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from checks import MODEL, QUESTION, URL, V1, check, run
from pydantic import BaseModel

ASKED = [{"role": "user", "content": QUESTION}]
AT = {"model": f"openai/{MODEL}", "api_base": V1, "api_key": "none", "num_retries": 0, "timeout": 300}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


class City(BaseModel):
    city: Literal["Paris", "Rome"]


@check
def completion_and_history() -> None:
    answer = litellm.completion(messages=ASKED, temperature=0, max_tokens=64, **AT)
    assert "Paris" in answer.choices[0].message.content
    again = [*ASKED, answer.choices[0].message.model_dump(), {"role": "user", "content": "Thank you."}]
    litellm.completion(messages=again, max_tokens=4, **AT)


@check
def stream_with_usage() -> None:
    chunks = list(
        litellm.completion(messages=ASKED, max_tokens=8, stream=True, stream_options={"include_usage": True}, **AT)
    )
    assert chunks[-1].usage.completion_tokens > 0


@check
def text_completion() -> None:
    answer = litellm.text_completion(
        prompt="The capital of France is",
        max_tokens=4,
        temperature=0,
        **AT | {"model": f"text-completion-openai/{MODEL}"},
    )
    assert answer.choices[0].text.startswith(" Paris")


@check
def response_format() -> None:
    answer = litellm.completion(messages=ASKED, response_format=City, max_tokens=48, temperature=0, **AT)
    City.model_validate_json(answer.choices[0].message.content)


@check
def tools() -> None:
    answer = litellm.completion(
        messages=ASKED, tools=[TOOL], tool_choice="required", max_tokens=96, temperature=0, **AT
    )
    assert answer.choices[0].message.tool_calls[0].function.name == "get_weather"
    litellm.completion(messages=ASKED, tools=[TOOL], max_tokens=8, **AT)


@check
def hosted_vllm() -> None:
    at = AT | {"model": f"hosted_vllm/{MODEL}"}
    answer = litellm.completion(messages=ASKED, max_tokens=8, top_k=5, reasoning_effort="low", drop_params=True, **at)
    assert answer.choices[0].message.content


@check
def responses() -> None:
    answer = litellm.responses(input=QUESTION, max_output_tokens=64, temperature=0, **AT)
    assert "Paris" in answer.output[0].content[0].text


@check
def anthropic_bridge() -> None:
    at = AT | {"model": f"anthropic/{MODEL}", "api_base": URL}
    answer = litellm.completion(messages=ASKED, max_tokens=64, temperature=0, **at)
    assert "Paris" in answer.choices[0].message.content


@check
def errors() -> None:
    try:
        litellm.completion(messages=ASKED, temperature=-1, **AT)
    except litellm.BadRequestError as error:
        assert "temperature" in str(error)
    else:
        raise AssertionError("temperature -1 is not refused")


run()
