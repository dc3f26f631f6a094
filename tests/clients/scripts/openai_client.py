"""OpenAI's own library: every way of asking."""

from __future__ import annotations

import asyncio
import json
from typing import Literal

import openai
from checks import MODEL, QUESTION, V1, check, run
from pydantic import BaseModel

client = openai.OpenAI(base_url=V1, api_key="none", max_retries=0, timeout=300)
ASKED = [{"role": "user", "content": QUESTION}]


class City(BaseModel):
    city: Literal["Paris", "Rome"]
    large: bool


class get_weather(BaseModel):
    """Tells the weather of a city."""

    city: Literal["Paris", "Rome"]


PLAIN_TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather.", "parameters": get_weather.model_json_schema()},
}


@check
def models() -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


@check
def completions() -> None:
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0)
    assert answer.choices[0].text.startswith(" Paris")
    several = client.completions.create(model=MODEL, prompt=["One, two", "A, B"], max_tokens=3, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


@check
def completions_logprobs_and_echo() -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=1, temperature=0, logprobs=2, echo=True
    )
    told = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith("The capital of France is")
    assert "".join(told.tokens) == answer.choices[0].text
    assert told.token_logprobs[0] is None and all(value <= 0 for value in told.token_logprobs[1:])


@check
def completions_stream() -> None:
    whole = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=16, temperature=0)
    chunks = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=16, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


@check
def chat() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASKED, temperature=0, max_tokens=64)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@check
def chat_stream_with_usage() -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=ASKED,
            temperature=0,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].usage.completion_tokens == 8 and not chunks[-1].choices


@check
def chat_logprobs() -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASKED, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    told = answer.choices[0].logprobs.content
    assert "".join(token.token for token in told) == answer.choices[0].message.content
    assert all(len(token.top_logprobs) == 3 for token in told)


@check
def chat_history_from_model_dump() -> None:
    messages = list(ASKED)
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=32)
    messages.append(answer.choices[0].message.model_dump())
    messages.append({"role": "user", "content": "Thank you."})
    client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=4)
    messages[1] = answer.choices[0].message  # the object itself, as the documentation shows
    client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=4)


@check
def chat_parse() -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=ASKED, response_format=City, temperature=0)
    assert isinstance(answer.choices[0].message.parsed, City)


@check
def chat_stream_parse() -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=ASKED, response_format=City, temperature=0, max_tokens=64
    ) as stream:
        kinds = {event.type for event in stream}
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)
    assert {"chunk", "content.delta", "content.done"} <= kinds


@check
def tools_required() -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASKED, tools=[PLAIN_TOOL], tool_choice="required", temperature=0, max_tokens=96
    )
    [choice] = answer.choices
    assert choice.message.tool_calls, choice
    assert choice.message.tool_calls[0].function.name == "get_weather"
    assert json.loads(choice.message.tool_calls[0].function.arguments)["city"] in ("Paris", "Rome")


@check
def tools_named_and_replayed() -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASKED,
        tools=[PLAIN_TOOL],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
        max_tokens=96,
    )
    message = answer.choices[0].message
    assert message.tool_calls, answer.choices[0]
    told = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny."}
    client.chat.completions.create(
        model=MODEL, messages=[*ASKED, message, told], tools=[PLAIN_TOOL], temperature=0, max_tokens=8
    )


@check
def tools_auto() -> None:
    client.chat.completions.create(model=MODEL, messages=ASKED, tools=[PLAIN_TOOL], temperature=0, max_tokens=8)


@check
def tools_parse() -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=ASKED,
        tools=[openai.pydantic_function_tool(get_weather)],
        tool_choice="required",
        temperature=0,
        max_tokens=96,
    )
    assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, get_weather)


@check
def tools_stream() -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=ASKED,
        tools=[openai.pydantic_function_tool(get_weather)],
        tool_choice="required",
        temperature=0,
        max_tokens=96,
    ) as stream:
        kinds = {event.type for event in stream}
        call, *_ = stream.get_final_completion().choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, get_weather)
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds


@check
def responses() -> None:
    answer = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=64)
    assert "Paris" in answer.output_text
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    second = client.responses.create(
        model=MODEL, input="Thank you.", previous_response_id=answer.id, temperature=0, max_output_tokens=4
    )
    assert second.usage.input_tokens > answer.usage.input_tokens


@check
def responses_stream() -> None:
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=16) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text != ""


@check
def responses_parse() -> None:
    answer = client.responses.parse(model=MODEL, input=QUESTION, text_format=City, temperature=0, max_output_tokens=64)
    assert isinstance(answer.output_parsed, City)


@check
def responses_tools() -> None:
    tool = {"type": "function", "strict": True, **openai.pydantic_function_tool(get_weather)["function"]}
    answer = client.responses.create(
        model=MODEL, input=QUESTION, tools=[tool], tool_choice="required", temperature=0, max_output_tokens=96
    )
    call, *_ = [item for item in answer.output if item.type == "function_call"]
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    told = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    client.responses.create(
        model=MODEL, input=[told], previous_response_id=answer.id, tools=[tool], temperature=0, max_output_tokens=8
    )


@check
def errors() -> None:
    for kind, fields in (
        (openai.NotFoundError, {"model": "no-such-model"}),
        (openai.BadRequestError, {"model": MODEL, "temperature": -1}),
    ):
        try:
            client.chat.completions.create(messages=ASKED, **fields)
        except kind as error:
            assert error.body["message"] and error.type
        else:
            raise AssertionError(f"{fields} is not refused")


@check
def eight_at_once() -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=V1, api_key="none", max_retries=0, timeout=300) as several:
            answers = await asyncio.gather(
                *(
                    several.chat.completions.create(model=MODEL, messages=ASKED, temperature=0, max_tokens=8)
                    for _ in range(8)
                )
            )
        assert len({answer.choices[0].message.content for answer in answers}) == 1

    asyncio.run(ask())


run()
