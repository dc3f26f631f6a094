"""Scored prompts, echoes and token ids over HTTP, with the embedded pair: the target's own log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from operator import itemgetter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssd.config.load import resolve_model_path
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.testing.twins.served import Served

Ask = Callable[..., dict[str, Any]]
TEXTS = ["def main(argv):", "import os\n\nclass Tree:", "x", "a longer prompt, with a comma and 12 numbers " * 12]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served("target.compile=false", "draft.compile=false", launch=InprocPipeline)
    server.until(lambda: server.engine.ready)
    yield server
    server.close()


@pytest.fixture(scope="module")
def expected(served: Served) -> Callable[[list[int]], torch.Tensor]:
    """Log-softmax ``[T, V]`` of transformers' own forward of the target."""
    path = resolve_model_path(served.engine.config.target.model)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def make(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    return make


@pytest.fixture
def ask(served: Served) -> Ask:
    def post(path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
        status, _, text = served.ask("POST", path, {"model": "tiny", "temperature": 0, **body})
        assert status == 200, text
        return json.loads(text)

    return post


def events(served: Served, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    status, _, text = served.ask("POST", path, {"model": "tiny", "temperature": 0, "stream": True, **body})
    assert status == 200, text
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def gathered(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices of a stream of text completions, joined."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            whole = choices.setdefault(part["index"], {"text": "", "logprobs": None, "token_ids": []})
            whole["text"] += part["text"]
            whole["token_ids"] += part.get("token_ids", [])
            for name, values in (part["logprobs"] or {}).items():
                whole["logprobs"] = whole["logprobs"] or {}
                whole["logprobs"].setdefault(name, []).extend(values)
            for name in ("finish_reason", "stop_reason", "prompt_token_ids"):
                if part.get(name) is not None:
                    whole[name] = part[name]
    return choices


def raw(token: str) -> bytes:
    """The bytes of a token, which may be a part of a character."""
    return bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()


def parse_logprobs(answer: dict[str, Any], contexts: list[int], generated: int) -> list[tuple[float, bool]]:
    """What lm-evaluation-harness reads: sum and greediness of the continuation, without generated tokens."""
    found = []
    for choice, context in zip(sorted(answer["choices"], key=itemgetter("index")), contexts, strict=True):
        end = -generated or None
        values = choice["logprobs"]["token_logprobs"][context:end]
        tops = choice["logprobs"]["top_logprobs"][context:end]
        found.append((sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))))
    return found


@pytest.mark.parametrize("max_tokens", [1, 0])
@pytest.mark.parametrize("method", ["none", "sd", "ssd"])
def test_loglikelihoods_of_an_evaluation_harness(
    method: str, max_tokens: int, served: Served, ask: Ask, expected: Callable[..., torch.Tensor]
) -> None:
    """The very request of its local-completions backend: a list of id lists, logprobs 1, echo."""
    pairs = [
        ("def f(x):\n    return", " x"),
        ("import", " os"),
        ("for i in", " range(10):"),
        ("a", "b c d"),
        ("(", ")"),
    ]
    encoded = [(served.engine.tokenize(context), served.engine.tokenize(rest)) for context, rest in pairs]
    answer = ask(
        prompt=[context + rest for context, rest in encoded],
        max_tokens=max_tokens,
        logprobs=1,
        seed=1234,
        echo=True,
        method=method,
    )
    found = parse_logprobs(answer, [len(context) for context, _ in encoded], max_tokens)
    for (context, rest), (total, greedy) in zip(encoded, found, strict=True):
        rows = expected(context + rest)[len(context) - 1 : -1]
        assert total == pytest.approx(float(rows.gather(1, torch.tensor(rest)[:, None]).sum()), abs=1e-3)
        assert greedy == (rows.argmax(-1).tolist() == rest)
    assert {greedy for _, greedy in found} == {True, False}
    for choice, (context, rest) in zip(answer["choices"], encoded, strict=True):
        assert choice["finish_reason"] == "length"
        assert {len(values) for values in choice["logprobs"].values()} == {len(context + rest) + max_tokens}


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
@pytest.mark.parametrize("max_tokens", [0, 1, 9])
def test_echo(max_tokens: int, as_ids: bool, text: str, served: Served, ask: Ask) -> None:
    prompt = served.engine.tokenize(text) if as_ids else text
    plain = ask(prompt=text, max_tokens=max(max_tokens, 1), logprobs=2)["choices"][0]
    answer = ask(prompt=prompt, max_tokens=max_tokens, logprobs=2, echo=True)
    [choice] = answer["choices"]
    ids, told = served.engine.tokenize(text), choice["logprobs"]
    generated = plain["text"] if max_tokens else ""
    assert choice["text"] == text + generated == b"".join(map(raw, told["tokens"])).decode(errors="replace")
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert all(value <= 0 for value in told["token_logprobs"][1:])
    assert told["tokens"] == [served.engine.tokenizer.decode([token]) for token in ids] + (
        plain["logprobs"]["tokens"] if max_tokens else []
    )
    for (start, end), token in zip(pairwise([*told["text_offset"], len(choice["text"])]), told["tokens"], strict=True):
        assert choice["text"][start:end] == token or token.startswith("bytes:")
    if max_tokens:
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            assert told[name][len(ids) :] == plain["logprobs"][name]
    assert answer["usage"]["prompt_tokens"] == len(ids) and answer["usage"]["completion_tokens"] == max_tokens
    # Streamed: the same.
    [streamed] = gathered(events(served, prompt=prompt, max_tokens=max_tokens, logprobs=2, echo=True)).values()
    assert (streamed["text"], streamed["logprobs"]) == (choice["text"], told)
    # Without log-probabilities: the text alone.
    [bare] = ask(prompt=prompt, max_tokens=max_tokens, echo=True)["choices"]
    [stream] = gathered(events(served, prompt=prompt, max_tokens=max_tokens, echo=True)).values()
    assert bare["text"] == stream["text"] == choice["text"] and bare["logprobs"] is stream["logprobs"] is None


def test_echo_of_several_choices(served: Served, ask: Ask) -> None:
    body = {"prompt": TEXTS[:2], "n": 2, "max_tokens": 5, "temperature": 1, "seed": 3, "logprobs": 0, "echo": True}
    choices = ask(**body)["choices"]
    plain = ask(**{**body, "echo": False})["choices"]
    assert [c["text"] for c in choices] == [
        TEXTS[c["index"] // 2] + p["text"] for c, p in zip(choices, plain, strict=True)
    ]
    assert len({c["text"] for c in choices}) == 4
    streamed = gathered(events(served, **body))
    for choice in choices:
        assert (streamed[choice["index"]]["text"], streamed[choice["index"]]["logprobs"]) == (
            choice["text"],
            choice["logprobs"],
        )


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("method", ["none", "ssd"])
def test_prompt_logprobs(
    method: str, count: int, served: Served, ask: Ask, expected: Callable[..., torch.Tensor]
) -> None:
    """vLLM's shape: of each token what could have stood in its place."""
    text = TEXTS[1]
    ids = served.engine.tokenize(text)
    answer = ask(prompt=text, max_tokens=2, prompt_logprobs=count, method=method)
    told = answer["choices"][0]["prompt_logprobs"]
    chat = ask(
        "/v1/chat/completions", messages=[{"role": "user", "content": text}], max_tokens=2, prompt_logprobs=count
    )
    assert "prompt_logprobs" not in chat["choices"][0] and chat["prompt_logprobs"][0] is None
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert told[0] is None and len(told) == len(ids)
    for token, given, row in zip(ids[1:], told[1:], expected(ids), strict=False):
        best = row.topk(max(count, 1)).indices[:count].tolist()
        assert [int(key) for key in given] == [token, *(id for id in best if id != token)]
        for key, value in given.items():
            assert value["logprob"] == pytest.approx(float(row[int(key)]), abs=1e-3)
            assert value["rank"] == 1 + int((row > row[int(key)]).sum())
            assert value["decoded_token"] == served.engine.tokenizer.decode([int(key)])


def test_token_ids(served: Served, ask: Ask) -> None:
    ids = served.engine.tokenize(TEXTS[0])
    body = {"prompt": TEXTS[0], "max_tokens": 12, "return_token_ids": True}
    [choice] = ask(**body)["choices"]
    assert choice["prompt_token_ids"] == ids and len(choice["token_ids"]) == 12
    assert served.engine.tokenizer.decode(choice["token_ids"]) == choice["text"]
    chunks = events(served, **body)
    [streamed] = gathered(chunks).values()
    assert streamed["token_ids"] == choice["token_ids"] and streamed["prompt_token_ids"] == ids
    assert ["prompt_token_ids" in chunk["choices"][0] for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    talk = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "return_token_ids": True}
    chat = ask("/v1/chat/completions", **talk)
    assert len(chat["prompt_token_ids"]) == chat["usage"]["prompt_tokens"]
    chunks = events(served, "/v1/chat/completions", **talk)
    assert chunks[0]["prompt_token_ids"] == chat["prompt_token_ids"] and "prompt_token_ids" not in chunks[1]
    assert [t for c in chunks for t in c["choices"][0].get("token_ids", [])] == chat["choices"][0]["token_ids"]
    assert "token_ids" not in ask(prompt="x", max_tokens=1)["choices"][0]


def test_tokens_called_by_their_ids(served: Served, ask: Ask) -> None:
    ids = served.engine.tokenize(TEXTS[0])
    body = {"prompt": TEXTS[0], "max_tokens": 3, "logprobs": 2, "return_tokens_as_token_ids": True}
    [choice] = ask(**body, return_token_ids=True)["choices"]
    named, told = [f"token_id:{token}" for token in choice["token_ids"]], choice["logprobs"]
    assert told["tokens"] == named and all(name.startswith("token_id:") for top in told["top_logprobs"] for name in top)
    [echoed] = ask(**body, echo=True)["choices"]
    assert echoed["logprobs"]["tokens"] == [*(f"token_id:{token}" for token in ids), *named]
    assert echoed["logprobs"]["text_offset"][len(ids)] == len(TEXTS[0])
    chat = ask(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=3,
        logprobs=True,
        top_logprobs=1,
        return_tokens_as_token_ids=True,
        return_token_ids=True,
    )["choices"][0]
    assert [one["token"] for one in chat["logprobs"]["content"]] == [f"token_id:{token}" for token in chat["token_ids"]]
    assert bytes(b for one in chat["logprobs"]["content"] for b in one["bytes"]).decode() == chat["message"]["content"]


def test_a_prompt_as_long_as_the_context(served: Served, ask: Ask) -> None:
    limit = served.engine.config.engine.max_model_len
    ids = (served.engine.tokenize(TEXTS[3]) * limit)[:limit]
    [choice] = ask(prompt=ids, max_tokens=0, echo=True, logprobs=1)["choices"]
    assert len(choice["logprobs"]["tokens"]) == limit and choice["finish_reason"] == "length"
    for body in ({"max_tokens": 0, "prompt": [*ids, 5]}, {"max_tokens": 1, "prompt": ids}, {"prompt": ids}):
        status, _, text = served.ask("POST", "/v1/completions", {"model": "tiny", **body})
        assert status == 400 and json.loads(text)["error"]["code"] == "context_length_exceeded"


def test_stop_reason(served: Served, ask: Ask) -> None:
    [whole] = ask(prompt=TEXTS[0], max_tokens=20, return_token_ids=True)["choices"]
    assert whole["stop_reason"] is None and whole["finish_reason"] == "length"
    stop, token = whole["text"][8:11], whole["token_ids"][3]
    for body, reason in (({"stop": [stop]}, stop), ({"stop_token_ids": [token]}, token)):
        [choice] = ask(prompt=TEXTS[0], max_tokens=20, **body)["choices"]
        [streamed] = gathered(events(served, prompt=TEXTS[0], max_tokens=20, **body)).values()
        assert choice["stop_reason"] == streamed["stop_reason"] == reason and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"return_token_ids": 1}, "return_token_ids"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"echo": True, "suffix": "x"}, "suffix"),
    ],
    ids=str,
)
def test_what_is_refused(body: dict[str, Any], param: str, served: Served) -> None:
    status, _, text = served.ask("POST", "/v1/completions", {"model": "tiny", "prompt": "x", **body})
    assert (status, json.loads(text)["error"]["param"]) == (400, param)


def test_models_as_vllm_lists_them(served: Served) -> None:
    [model] = json.loads(served.ask("GET", "/v1/models")[2])["data"]
    assert model["root"] == served.engine.config.target.model and model["parent"] is None
    assert model["permission"][0]["object"] == "model_permission" and model["permission"][0]["allow_logprobs"] is True
