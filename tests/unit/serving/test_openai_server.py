"""The OpenAI endpoints over a scripted pipeline, asked by OpenAI's own client and by hand."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from ssd.engine.request import Caller
from ssd.request.sampling_params import SamplingParams, completion_seed
from ssd.serving.openai.bodies import PARAMETERS
from ssd.serving.openai.fields import UNSUPPORTED
from ssd.testing.twins.served import Served

KEY = "a-key-of-at-least-16"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.close()


def test_completion(served: Served) -> None:
    answer = served.client().completions.create(model="tiny", prompt="def", max_tokens=9, seed=4)
    [choice] = answer.choices
    assert choice.text == served.text("def", 4, 9)
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    prompt = len(served.engine.tokenize("def"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 9)
    told = answer.model_dump()["metrics"]["speculative_decoding"]
    assert told["num_spec_tokens"] == (lookahead := served.engine.config.speculation.lookahead)
    assert sum(told["acceptance_histogram"]) == told["num_spec_steps"] > 0
    assert told["num_accepted_draft_tokens"] == sum(j * n for j, n in enumerate(told["acceptance_histogram"]))
    assert told["num_draft_tokens"] == lookahead * told["num_spec_steps"]
    assert told["mean_acceptance_length"] == 1 + told["num_accepted_draft_tokens"] / told["num_spec_steps"]


def test_streamed_text_is_the_whole_text(served: Served) -> None:
    client = served.client()
    whole = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_completion_tokens=40, seed=1
    )
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        max_completion_tokens=40,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content != ""
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert chunks[-1].model_dump()["metrics"]["speculative_decoding"] is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_no_usage_chunk_unless_asked(served: Served) -> None:
    chunks = list(served.client().completions.create(model="tiny", prompt="a b", max_tokens=5, stream=True))
    assert all(chunk.choices for chunk in chunks) and all("usage" not in c.model_fields_set for c in chunks)


def test_choices_have_seeds_of_their_own(served: Served) -> None:
    answer = served.client().completions.create(model="tiny", prompt=["x", "yz"], n=2, max_tokens=6, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    second = completion_seed(3, 1)
    expected = [served.text(p, s, 6) for p in ("x", "yz") for s in (3, second)]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage is not None and answer.usage.completion_tokens == 24
    assert answer.model_dump()["metrics"]["speculative_decoding"] is None
    streamed = ["", "", "", ""]
    for chunk in served.client().completions.create(
        model="tiny", prompt=["x", "yz"], n=2, max_tokens=6, seed=3, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_unseeded_requests_differ(served: Served) -> None:
    texts = {served.client().completions.create(model="tiny", prompt="x", max_tokens=8).choices[0].text for _ in "abc"}
    assert len(texts) == 3


def test_stop(served: Served) -> None:
    whole = served.text("stop here", 2, 30)
    stop = whole[len(whole) // 2 :][:3]
    client = served.client()
    answer = client.completions.create(model="tiny", prompt="stop here", max_tokens=30, seed=2, stop=[stop])
    assert answer.choices[0].text == whole[: whole.find(stop)]
    assert answer.choices[0].finish_reason == "stop"
    served.until(lambda: served.pipeline.busy == 0)


def test_token_prompts_and_plain_method(served: Served) -> None:
    ids = served.engine.tokenize("some text")
    client = served.client()
    one = client.completions.create(model="tiny", prompt=ids, max_tokens=5, seed=1, extra_body={"method": "none"})
    assert one.choices[0].text == served.text("some text", 1, 5)
    assert one.model_dump()["metrics"]["speculative_decoding"]["num_spec_steps"] == 0


def test_provenance(served: Served) -> None:
    answer = served.client().completions.create(
        model="tiny", prompt="q", max_tokens=20, seed=1, extra_body={"provenance": True, "method": "ssd"}
    )
    told = answer.choices[0].model_dump()["provenance"]
    assert len(told) == 20 and {t["from"] for t in told} <= {"hit", "miss", "bonus", "plain"}
    assert answer.choices[0].text.startswith("".join(t["text"] for t in told))


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gpt"}, 404, "model"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": 100000}, 400, "max_tokens"),
        ({"n": 0}, 400, "n"),
        ({"n": 129}, 400, "n"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"method": "magic"}, 400, "method"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": [99999999]}, 400, "prompt"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"logprobs": 21}, 400, "logprobs"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias"),
        ({"logit_bias": {"five": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, 400, "logit_bias"),
        ({"presence_penalty": 2.5}, 400, "presence_penalty"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"bad_words": [" "]}, 400, "bad_words"),
        ({"allowed_token_ids": []}, 400, "allowed_token_ids"),
        ({"min_tokens": 3}, 400, "min_tokens"),
        ({"response_format": {"type": "xml"}}, 400, "response_format"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"seed": 1.5}, 400, "seed"),
        ({"priority": 1}, 400, "priority"),
        ({"priority": 2**40}, 400, "priority"),
    ],
    ids=str,
)
def test_wrong_parameters_are_named(served: Served, change: dict[str, Any], status: int, param: str | None) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2, **change}
    got, _, text = served.ask("POST", "/v1/completions", body)
    error = json.loads(text)["error"]
    assert (got, error["param"]) == (status, param)
    assert error["type"] == "invalid_request_error" and error["message"]


def test_parameters_that_ask_for_nothing(served: Served) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2, "user": "me", "frequency_penalty": 0.0, "priority": 0}
    neutral = {name: values[-1] for name, values in UNSUPPORTED.items()}
    assert served.ask("POST", "/v1/completions", {**neutral, **body})[0] == 200
    assert not {p.name for p in PARAMETERS} & UNSUPPORTED.keys()


def test_sampling_parameters_reach_the_verifier(served: Served) -> None:
    asked = {
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "repetition_penalty": 1.25,
        "logit_bias": {"7": -100, "5": 1.5},
        "bad_words": [[4, 5]],
        "allowed_token_ids": [3, 4, 5],
        "min_tokens": 2,
        "include_stop_str_in_output": True,
        "stop": "zz",
    }
    seen: list[SamplingParams] = []
    make = served.engine._front.make

    def noting(prompt: Any, params: SamplingParams, *rest: Any) -> Any:
        seen.append(params)
        return make(prompt, params, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.engine._front, "make", noting)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 3, "seed": 1, **asked}
        assert served.ask("POST", "/v1/completions", body)[0] == 200
    expected = SamplingParams(**{"temperature": 1.0, "max_tokens": 3, "seed": 1, **asked})  # type: ignore[arg-type]
    assert seen == [expected]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_completions(served: Served, stream: bool) -> None:
    asked = {"model": "tiny", "prompt": "def", "max_tokens": 9, "seed": 4, "logprobs": 2}
    answer = served.client().completions.create(**asked, stream=stream)
    parts = [choice.logprobs for one in (answer if stream else [answer]) for choice in one.choices if choice.logprobs]
    tokens = [token for part in parts for token in part.tokens]
    text = served.text("def", 4, 9)
    if "\ufffd" not in text:
        assert "".join(tokens) == text
    assert [value for part in parts for value in part.token_logprobs] == [-1.5] * 9
    offsets = [offset for part in parts for offset in part.text_offset]
    assert offsets[0] == 0 and offsets == sorted(offsets)
    assert all(text[at:].startswith(token) for at, token in zip(offsets, tokens, strict=True))
    top = [likely for part in parts for likely in part.top_logprobs]
    assert all(list(likely.values()) == [-0.5, -1.5] for likely in top)
    assert all(token in likely for token, likely in zip(tokens, top, strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_chat(served: Served, stream: bool) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = served.client().chat.completions.create(
        model="tiny", messages=messages, max_tokens=7, seed=1, logprobs=True, top_logprobs=3, stream=stream
    )
    parts = [choice.logprobs for one in (answer if stream else [answer]) for choice in one.choices if choice.logprobs]
    content = [token for part in parts for token in part.content]
    assert [token.logprob for token in content] == [-1.5] * 7
    whole = served.client().chat.completions.create(model="tiny", messages=messages, max_tokens=7, seed=1)
    assert whole.choices[0].logprobs is None
    said = b"".join(bytes(token.bytes) for token in content)
    assert said.decode(errors="replace") == whole.choices[0].message.content
    for token in content:
        assert [likely.logprob for likely in token.top_logprobs] == [-0.5, -1.5, -9999.0]  # JSON has no infinity
        assert token.top_logprobs[1].token == token.token
    status, _, text = served.ask(
        "POST", "/v1/chat/completions", {"model": "tiny", "messages": messages, "top_logprobs": 3}
    )
    assert status == 400 and json.loads(text)["error"]["param"] == "top_logprobs"


def test_openai_raises_its_own_errors(served: Served) -> None:
    client = served.client()
    with pytest.raises(openai.BadRequestError, match="functions is not supported"):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],
            functions=[{"name": "f"}],
        )
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_no_template_is_said() -> None:
    server = Served("server.chat_template=null")
    try:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            server.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    finally:
        server.close()


def test_64_streams() -> None:
    server = Served()
    client = server.client()

    def one(number: int) -> bool:
        stream = client.completions.create(model="tiny", prompt=f"p {number}", max_tokens=12, seed=number, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream) == server.text(f"p {number}", number, 12)

    try:
        with ThreadPoolExecutor(64) as pool:
            assert all(pool.map(one, range(64)))
        assert server.pipeline.busy == server.engine.queued == 0
    finally:
        server.close()


@pytest.mark.parametrize("stream", [True, False])
def test_disconnecting_frees_the_slots(stream: bool) -> None:
    body = json.dumps({"model": "tiny", "prompt": ["a", "b"], "max_tokens": 500, "stream": stream})
    lines = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    slow = Served(round_s=0.05)
    try:
        with socket.create_connection(("127.0.0.1", slow.port)) as connection:
            connection.sendall((head + body).encode())
            slow.until(lambda: slow.pipeline.busy == 2)
        slow.until(lambda: slow.pipeline.busy == slow.engine.running == slow.engine.tokens_in_flight == 0)
    finally:
        slow.close()


def test_priority_reaches_the_queue(served: Served) -> None:
    make, seen = served.engine._front.make, []

    def noting(prompt: Any, params: SamplingParams, caller: Caller) -> Any:
        seen.append(caller.priority)
        return make(prompt, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.engine._front, "make", noting)
        for given in ({"priority": -3}, {}):
            body = {"model": "tiny", "prompt": "x", "max_tokens": 2, **given}
            assert served.ask("POST", "/v1/completions", body)[0] == 200
    assert seen == [-3, 0]


def test_too_much_is_429() -> None:
    server = Served("server.max_queue=1", "engine.max_batch=1", round_s=0.2)
    body = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 400}
    try:
        first = server.client().completions.create(**body, stream=True)
        next(iter(first))
        status, headers, text = server.ask("POST", "/v1/completions", body)
        assert status == 429 and headers["retry-after"] == "1"
        assert json.loads(text)["error"]["code"] == "rate_limit_exceeded"
        assert server.engine.running + server.engine.queued == 2  # none of the refused request is left
        first.close()
        server.until(lambda: server.engine.running == 0)
    finally:
        server.close()


def test_metrics(served: Served) -> None:
    def read() -> dict[str, float]:
        lines = served.ask("GET", "/metrics")[2].splitlines()
        return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}

    before = read()
    told = [
        served.client()
        .completions.create(model="tiny", prompt="m", max_tokens=25, seed=s)
        .model_dump()["metrics"]["speculative_decoding"]
        for s in range(3)
    ]
    after = read()

    def grew(name: str) -> float:
        return after[f"ssd:{name}"] - before.get(f"ssd:{name}", 0)

    assert grew("spec_decode_num_drafts_total") == sum(t["num_spec_steps"] for t in told)
    assert grew("spec_decode_num_draft_tokens_total") == sum(t["num_draft_tokens"] for t in told)
    assert grew("spec_decode_num_accepted_tokens_total") == sum(t["num_accepted_draft_tokens"] for t in told)
    assert grew('request_success_total{finished_reason="length"}') == 3
    assert grew("time_to_first_token_seconds_count") == 3
    assert grew("rounds_total") > 0 and grew("draft_forecast_seconds_total") > 0
    tokens = sum(after[k] - before.get(k, 0) for k in after if k.startswith("ssd:generation_tokens_total"))
    assert tokens == 75
    assert after["ssd:num_requests_running"] == 0


def test_a_dead_pipeline_is_unhealthy() -> None:
    server = Served()
    try:
        assert server.ask("GET", "/health")[0] == 200
        server.pipeline.killed.set()
        server.until(lambda: server.engine.failure is not None)
        assert [server.ask("GET", path)[0] for path in ("/health", "/ready")] == [503, 503]
        with pytest.raises(openai.InternalServerError):
            server.client().completions.create(model="tiny", prompt="x")
    finally:
        server.close()
