"""Fields that other servers and clients know: each is accepted, refused by name, or ignored and named."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from ssd.serving.openai.bodies import ChatBody, CompletionBody
from ssd.serving.openai.fields import CONSTRAINTS, HARMLESS, MAX_LOGGED, MAX_SHOWN, UNSUPPORTED, UnknownFields
from ssd.testing.twins.served import Served

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
NEEDED: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    TEXT: {"model": "tiny", "prompt": "x", "max_tokens": 2},
}
HEADER = "x-ssd-ignored-parameters"

VLLM_COMMON = """
    model frequency_penalty logit_bias logprobs max_tokens n presence_penalty response_format seed stop stream
    stream_options temperature top_p user use_beam_search top_k min_p repetition_penalty watermarking length_penalty
    stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words echo
    add_special_tokens structured_outputs priority request_id session_id return_tokens_as_token_ids return_token_ids
    routed_experts_prompt_start return_token_offsets mm_payload return_mm_kwargs cache_salt kv_transfer_params
    ec_transfer_params vllm_xargs repetition_detection stream_interval thinking_token_budget
"""
"""Fields of both request classes of vLLM 0.32.0 (vllm/entrypoints/openai/*/protocol.py)."""
VLLM = {
    CHAT: """
        messages top_logprobs max_completion_tokens tools tool_choice reasoning_effort include_reasoning
        parallel_tool_calls add_generation_prompt continue_final_message documents chat_template chat_template_kwargs
        media_io_kwargs mm_processor_kwargs return_prompt_text
    """,
    TEXT: "prompt suffix prompt_embeds",
}
OPENAI = {
    CHAT: chat_create_params.CompletionCreateParamsBase.__annotations__,
    TEXT: completion_create_params.CompletionCreateParamsBase.__annotations__,
}
FIELDS = [
    (path, name) for path in (CHAT, TEXT) for name in sorted({*VLLM_COMMON.split(), *VLLM[path].split(), *OPENAI[path]})
]
KNOWN = {CHAT: ChatBody.model_fields, TEXT: CompletionBody.model_fields}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.close()


@pytest.fixture(scope="module")
def refusing() -> Iterator[Served]:
    server = Served("server.unknown_parameters=refuse")
    yield server
    server.close()


def ask(server: Served, path: str, change: dict[str, Any]) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and body of the answer to a small request with these fields."""
    status, headers, text = server.ask("POST", path, {**NEEDED[path], **change})
    return status, headers, json.loads(text)


def check_named(status: int, answer: dict[str, Any], name: str) -> None:
    """The answer refuses the field ``name`` in one line."""
    assert status == 400, answer
    assert answer["error"]["param"] == name
    assert name in answer["error"]["message"] and "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(("path", "name"), FIELDS, ids=[f"{path.split('/')[2]}-{name}" for path, name in FIELDS])
def test_every_field_of_openai_and_vllm_has_a_place(refusing: Served, path: str, name: str) -> None:
    """Null asks for nothing. A value that no field has is accepted without effect, or refused by name."""
    assert name in KNOWN[path] or name in UNSUPPORTED or name in HARMLESS
    if name not in ("messages", "prompt"):
        status, headers, answer = ask(refusing, path, {name: None})
        assert status == 200 and HEADER not in headers, answer
    status, _, answer = ask(refusing, path, {name: {"odd": [1.5]}})
    if name in HARMLESS and name not in KNOWN[path]:
        assert status == 200, answer
    elif name == "chat_template_kwargs":
        assert status == 200
    else:
        check_named(status, answer, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("add_special_tokens", True),
        ("best_of", 1),
        ("echo", False),
        ("early_stopping", False),
        ("include_reasoning", True),
        ("kv_transfer_params", {}),
        ("length_penalty", 1.0),
        ("length_penalty", 1),
        ("max_completion_tokens", 2),
        ("mm_processor_kwargs", {}),
        ("modalities", ["text"]),
        ("parallel_tool_calls", True),
        ("priority", 0),
        ("return_token_ids", False),
        ("return_tokens_as_token_ids", False),
        ("skip_special_tokens", True),
        ("spaces_between_special_tokens", True),
        ("suffix", ""),
        ("thinking_token_budget", -1),
        ("tool_choice", "auto"),
        ("tool_choice", "none"),
        ("tools", []),
        ("truncation_side", "left"),
        ("use_beam_search", False),
        ("vllm_xargs", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_neutral_values_are_accepted(served: Served, path: str, name: str, value: Any) -> None:
    status, headers, answer = ask(served, path, {name: value})
    assert status == 200 and HEADER not in headers, answer


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("metadata", [{"a": 1, "b": None, "c": 2.5, "d": True, "e": "x"}, {}, "text"]),
        ("prompt_cache_key", ["key", 5, ""]),
        ("prompt_cache_retention", ["24h", "in-memory"]),
        ("request_id", ["abc", 7]),
        ("safety_identifier", ["me", {"a": 1}]),
        ("service_tier", ["auto", "default", "flex", "priority", "unheard-of"]),
        ("store", [True, False, "yes"]),
        ("user", ["me", 17, ["x"]]),
        ("verbosity", ["low", "medium", "high"]),
        ("prediction", [{"type": "content", "content": "x"}]),
        ("stream_interval", [1, 10]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_harmless_fields_are_accepted_whatever_they_say(
    served: Served, path: str, name: str, values: list[Any]
) -> None:
    expected = ask(served, path, {"seed": 1})[2]["choices"]
    for value in values:
        status, headers, answer = ask(served, path, {name: value, "seed": 1})
        assert status == 200 and HEADER not in headers, answer
        assert answer["choices"] == expected


@pytest.mark.parametrize(
    ("path", "name", "value", "said"),
    [
        (CHAT, "audio", {"voice": "alloy", "format": "wav"}, "text"),
        (CHAT, "modalities", ["text", "audio"], "text"),
        (CHAT, "web_search_options", {}, "not supported"),
        (CHAT, "functions", [{"name": "f"}], "tools"),
        (CHAT, "mm_processor_kwargs", {"num_crops": 4}, "text"),
        (CHAT, "reasoning_effort", "hgih", "'high'"),
        (TEXT, "best_of", 3, "use n"),
        (TEXT, "suffix", "x", "end of a prompt"),
        (TEXT, "use_beam_search", True, "not supported"),
        (TEXT, "length_penalty", 2.0, "beam search"),
        (TEXT, "length_penalty", True, "beam search"),
        (TEXT, "cache_salt", "secret", "engine.prefix_caching"),
        (TEXT, "repetition_detection", {"max_pattern_size": 4}, "not supported"),
        (TEXT, "thinking_token_budget", 5, "not supported"),
        (TEXT, "prompt_embeds", "AAAA", "token ids"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_name(served: Served, path: str, name: str, value: Any, said: str) -> None:
    status, _, answer = ask(served, path, {name: value})
    check_named(status, answer, name)
    assert said in answer["error"]["message"]


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_constraints_of_other_servers_are_never_ignored(served: Served, path: str, name: str) -> None:
    status, _, answer = ask(served, path, {name: "x"})
    check_named(status, answer, name)
    assert CONSTRAINTS[name] in answer["error"]["message"]
    assert ask(served, path, {name: None})[0] == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_unknown_fields_are_ignored_and_named(served: Served, path: str, stream: bool) -> None:
    body = {**NEEDED[path], "stream": stream, "seed": 1}
    expected = served.ask("POST", path, body)
    assert HEADER not in expected[1]
    status, headers, text = served.ask(
        "POST", path, {**body, "temprature": 0.5, "mirostat": 2, "n_\n\u00e9\U0001f600": {}}
    )
    assert status == 200
    assert headers[HEADER] == ('"temprature"; did-you-mean="temperature", "mirostat", "n_\\n\\u00e9\\ud83d\\ude00"')
    if not stream:
        assert json.loads(text)["choices"] == json.loads(expected[2])["choices"]


def test_unknown_fields_of_stream_options_are_named(served: Served) -> None:
    status, headers, _ = served.ask(
        "POST", TEXT, {**NEEDED[TEXT], "stream": True, "stream_options": {"chunky": True, "include_usage": True}}
    )
    assert (status, headers[HEADER]) == (200, '"stream_options.chunky"')


def test_unknown_fields_are_logged_once(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            ask(served, TEXT, {"logged_once": 1})
    assert [record.getMessage() for record in caplog.records].count(
        "unknown request parameter 'logged_once' is ignored (server.unknown_parameters)"
    ) == 1


def test_many_unknown_fields_cost_little(served: Served) -> None:
    """Neither header nor log grows with what clients send, and no hint is looked for behind the header's end."""
    began = time.monotonic()
    status, headers, _ = ask(served, TEXT, {f"temperatur{number}": number for number in range(20_000)})
    assert status == 200 and time.monotonic() - began < 5
    assert headers[HEADER].count("did-you-mean") == MAX_SHOWN and headers[HEADER].endswith(", ...")
    assert ask(served, TEXT, {"x" * 100_000: 1})[1][HEADER] == f'"{"x" * 64}"'
    fields = UnknownFields("ignore")
    fields.take([f"field{number}" for number in range(2 * MAX_LOGGED)], ["model"])
    assert len(fields._logged) == MAX_LOGGED


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"temprature": 1}, "temprature", "unknown parameter 'temprature' (did you mean 'temperature'?)"),
        ({"stop": "z", "mirostat": 2}, "mirostat", "unknown parameter 'mirostat'"),
        ({"x" * 100_000: 1}, "x" * 64, "unknown parameter"),
        ({"line\nbreak": 1}, "line\\nbreak", "unknown parameter"),
        (
            {"stream": True, "stream_options": {"chunky": True}},
            "stream_options",
            "unknown parameter 'stream_options.chunky'",
        ),
    ],
    ids=["typo", "other", "long", "line-break", "nested"],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_unknown_fields_can_be_refused(
    refusing: Served, path: str, change: dict[str, Any], param: str, said: str
) -> None:
    status, headers, answer = ask(refusing, path, change)
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, param, "unknown_parameter")
    assert said in answer["error"]["message"] and "\n" not in answer["error"]["message"] and HEADER not in headers
    assert ask(refusing, path, {"user": "me", "store": True, "length_penalty": 1.0})[0] == 200


@pytest.mark.parametrize("given", [{}, {"model": ""}, {"model": None}], ids=["left-out", "empty", "null"])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_model_may_be_left_out(served: Served, path: str, given: dict[str, Any]) -> None:
    needed = {name: value for name, value in NEEDED[path].items() if name != "model"}
    status, _, text = served.ask("POST", path, {**needed, **given})
    assert (status, json.loads(text)["model"]) == (200, "tiny")
    status, _, answer = ask(served, path, {"model": "tinier"})
    assert (status, answer["error"]["param"]) == (404, "model")


@pytest.mark.parametrize("seed", [-1, -1.0], ids=str)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_seed_minus_one_is_random(served: Served, path: str, seed: Any) -> None:
    answers = [ask(served, path, {"seed": seed, "max_tokens": 8})[2] for _ in range(3)]
    seeds = {answer["metrics"]["ssd"]["seed"] for answer in answers}
    assert len(seeds) == 3 and all(0 <= one < 2**63 for one in seeds)
    for answer in answers:  # the seed that is shown gives the same answer again
        again = ask(served, path, {"seed": answer["metrics"]["ssd"]["seed"], "max_tokens": 8})[2]
        assert again["choices"] == answer["choices"]
    fixed = [ask(served, path, {"seed": one})[2]["metrics"]["ssd"]["seed"] for one in (-2, -2, 0, 5)]
    assert fixed == [2**63 - 2, 2**63 - 2, 0, 5]


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 2.0), ("n", 1.0), ("top_k", -1.0), ("min_tokens", 1.0), ("seed", 7.0), ("priority", 0.0)],
    ids=str,
)
def test_whole_numbers_may_have_a_fraction_of_zero(served: Served, name: str, value: float) -> None:
    as_integer, as_float = (ask(served, TEXT, {"seed": 1, name: one}) for one in (int(value), value))
    assert as_float[0] == 200 and as_float[2]["choices"] == as_integer[2]["choices"]
    for wrong in (value + 0.5, str(int(value)), True, [value]):
        status, _, answer = ask(served, TEXT, {name: wrong})
        check_named(status, answer, name)


@pytest.mark.parametrize(
    ("path", "change", "param", "said"),
    [
        (TEXT, {"frequency_penalty": 3}, "frequency_penalty", "frequency_penalty must be a number in [-2, 2]"),
        (TEXT, {"stop": ["x"] * 17}, "stop", "at most 16"),
        (TEXT, {"stop": [1]}, "stop", "stop.0: Input should be a valid string"),
        (TEXT, {"stop": 5}, "stop", "a valid string or a valid list"),
        (TEXT, {"bad_words": [["x"]]}, "bad_words", "bad_words.0.0: Input should be a valid integer"),
        (TEXT, {"prompt": ["a", 5]}, "prompt", "prompt.1: Input should be a valid string"),
        (TEXT, {"prompt": [5, -1]}, "prompt", "prompt.1: Input should be greater than or equal to 0"),
        (TEXT, {"prompt": ""}, "prompt", "the prompt is empty"),
        (TEXT, {"prompt": ["x", ""]}, "prompt", "prompt 1 is empty"),
        (TEXT, {"prompt": [[5], []]}, "prompt", "prompt 1 is empty"),
        (TEXT, {"prompt": [10**6]}, "prompt", "prompt token ids must be"),
        (TEXT, {"prompt": [[5], [10**6]]}, "prompt", "prompt token ids must be"),
        (TEXT, {"response_format": {"type": "json_schema"}}, "response_format", "response_format.json_schema: Field"),
        (TEXT, {"structured_outputs": {"json": 5}}, "structured_outputs", "a valid string or a valid dictionary"),
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, {"messages": "x"}, "messages", "a valid list"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages", "messages.0.content: Input should be"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_errors_say_what_is_wrong(served: Served, path: str, change: dict[str, Any], param: str, said: str) -> None:
    status, _, answer = ask(served, path, change)
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert said in answer["error"]["message"]
