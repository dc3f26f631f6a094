"""Requests for ``differential.py``: what clients send, what they send by mistake, and what only some servers know.

Each has a name, ``ENDPOINT/CASE``; ``docs/clients.md`` explains differences by these names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MODEL = "smollm2"
PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
LEFT_OUT: Any = object()
"""A value that removes the field from the request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """One request. A body of None is a GET."""

    name: str
    path: str
    body: Any = None


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
DUMPED = {
    "role": "assistant",
    "content": "Paris.",
    "refusal": None,
    "annotations": None,
    "audio": None,
    "function_call": None,
    "tool_calls": None,
}


def _schema(name: str = "answer", **schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


def _history(*messages: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": [*MESSAGES, *messages, {"role": "user", "content": "And of Italy?"}]}


BOTH: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-max-tokens": {"max_tokens": LEFT_OUT, "stop": ["."]},
    "max-tokens-1": {"max_tokens": 1},
    "max-tokens-null": {"max_tokens": None, "stop": ["."]},
    "max-tokens-negative": {"max_tokens": -1},
    "max-tokens-beyond-the-room": {"max_tokens": 1022, "stop": ["."]},
    "max-tokens-beyond-the-context": {"max_tokens": 5000, "stop": ["."]},
    "max-tokens-string": {"max_tokens": "8"},
    "max-tokens-float": {"max_tokens": 8.0},
    "max-tokens-fraction": {"max_tokens": 8.5},
    "temperature-0.8": {"temperature": 0.8, "seed": 1},
    "temperature-string": {"temperature": "0.5", "seed": 1},
    "temperature-negative": {"temperature": -1},
    "temperature-2.5": {"temperature": 2.5, "seed": 1},
    "temperature-null": {"temperature": None, "seed": 1},
    "top-p": {"temperature": 1, "top_p": 0.5, "seed": 1},
    "top-p-zero": {"top_p": 0},
    "top-p-1.5": {"top_p": 1.5},
    "top-k": {"temperature": 1, "top_k": 4, "seed": 1},
    "top-k-minus-1": {"top_k": -1},
    "top-k-minus-2": {"top_k": -2},
    "min-p": {"temperature": 1, "min_p": 0.1, "seed": 1},
    "min-p-2": {"min_p": 2},
    "seed-negative": {"temperature": 1, "seed": -1},
    "seed-string": {"seed": "seven"},
    "n-2": {"n": 2, "temperature": 1, "seed": 1},
    "n-2-greedy": {"n": 2},
    "n-null": {"n": None},
    "n-0": {"n": 0},
    "stop": {"stop": "Paris"},
    "stop-list": {"stop": ["Paris", "."]},
    "stop-null": {"stop": None},
    "stop-empty-string": {"stop": ""},
    "stop-number": {"stop": 7},
    "stop-token-ids": {"stop_token_ids": [30]},
    "include-stop": {"stop": ["."], "include_stop_str_in_output": True, "max_tokens": 8},
    "ignore-eos": {"ignore_eos": True},
    "min-tokens": {"min_tokens": 2},
    "min-tokens-above-max": {"min_tokens": 99},
    "presence-penalty": {"presence_penalty": 1},
    "presence-penalty-3": {"presence_penalty": 3},
    "frequency-penalty": {"frequency_penalty": 1},
    "frequency-penalty-3": {"frequency_penalty": 3},
    "repetition-penalty": {"repetition_penalty": 1.2},
    "repetition-penalty-0": {"repetition_penalty": 0},
    "length-penalty-1": {"length_penalty": 1.0},
    "logit-bias": {"logit_bias": {"30": 5}},
    "logit-bias-150": {"logit_bias": {"30": 150}},
    "logit-bias-word": {"logit_bias": {"word": 1}},
    "bad-words": {"bad_words": ["Paris"]},
    "allowed-token-ids": {"allowed_token_ids": [30, 31]},
    "priority-0": {"priority": 0},
    "priority-1": {"priority": 1},
    "user": {"user": "someone"},
    "request-id": {"request_id": "one"},
    "cache-salt": {"cache_salt": "salt"},
    "kv-transfer-null": {"kv_transfer_params": None},
    "unknown-field": {"no_such_field": 1},
    "unknown-field-null": {"no_such_field": None},
    "model-unknown": {"model": "no-such-model"},
    "model-left-out": {"model": LEFT_OUT},
    "model-empty": {"model": ""},
    "skip-special-tokens-false": {"skip_special_tokens": False},
    "spaces-between-special-tokens": {"spaces_between_special_tokens": False},
    "return-token-ids": {"return_token_ids": True},
    "return-tokens-as-ids": {"return_tokens_as_token_ids": True},
    "truncate-prompt-tokens": {"truncate_prompt_tokens": 3},
    "prompt-logprobs": {"prompt_logprobs": 1},
    "json-object": {"response_format": {"type": "json_object"}, "max_tokens": 16},
    "json-schema": {"response_format": _schema(**SCHEMA), "max_tokens": 32},
    "response-format-text": {"response_format": {"type": "text"}},
    "response-format-unknown": {"response_format": {"type": "yaml"}},
    "schema-name-with-space": {"response_format": _schema("an answer", **SCHEMA), "max_tokens": 32},
    "structured-choice": {"structured_outputs": {"choice": ["Paris", "Rome"]}, "max_tokens": 8},
    "structured-regex": {"structured_outputs": {"regex": "[A-Z][a-z]{3,6}"}, "max_tokens": 8},
    "structured-json": {"structured_outputs": {"json": SCHEMA}, "max_tokens": 32},
    "structured-grammar": {"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}, "max_tokens": 8},
    "structured-two-kinds": {"structured_outputs": {"choice": ["a"], "regex": "a"}},
    "structured-bad-regex": {"structured_outputs": {"regex": "["}},
    "guided-choice": {"guided_choice": ["Paris", "Rome"]},
    "stream": {"stream": True},
    "stream-usage": {"stream": True, "stream_options": {"include_usage": True}},
    "stream-continuous-usage": {
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    "stream-n-2": {"stream": True, "n": 2, "temperature": 1, "seed": 1},
    "stream-string": {"stream": "true"},
    "stream-stop": {"stream": True, "stop": ["."], "max_tokens": 16},
    "stream-token-ids": {"stream": True, "return_token_ids": True},
    "stream-options-without-stream": {"stream_options": {"include_usage": True}},
    "metadata": {"metadata": {"a": "b"}},
    "store": {"store": True},
    "prompt-cache-key": {"prompt_cache_key": "k"},
    "safety-identifier": {"safety_identifier": "x"},
    "service-tier": {"service_tier": "auto"},
    "add-special-tokens-false": {"add_special_tokens": False},
    "add-special-tokens": {"add_special_tokens": True},
}
"""Fields of both endpoints, over the plain request of each."""

COMPLETIONS: dict[str, dict[str, Any]] = {
    "logprobs-0": {"logprobs": 0},
    "logprobs-3": {"logprobs": 3},
    "logprobs-true": {"logprobs": True},
    "logprobs-negative": {"logprobs": -2},
    "stream-logprobs": {"stream": True, "logprobs": 2},
    "echo": {"echo": True},
    "echo-logprobs": {"echo": True, "logprobs": 1},
    "echo-logprobs-max-tokens-0": {"echo": True, "logprobs": 1, "max_tokens": 0},
    "echo-max-tokens-1-batch": {"echo": True, "logprobs": 1, "max_tokens": 1, "prompt": [PROMPT, "One, two"]},
    "echo-ids": {"echo": True, "logprobs": 1, "max_tokens": 1, "prompt": [[504, 3575, 282, 4649]]},
    "echo-stream": {"echo": True, "stream": True},
    "echo-stream-logprobs": {"echo": True, "stream": True, "logprobs": 1},
    "max-tokens-0": {"max_tokens": 0},
    "prompt-ids": {"prompt": [504, 3575, 282, 4649, 314]},
    "prompt-batch": {"prompt": [PROMPT, "One, two"]},
    "prompt-batch-ids": {"prompt": [[504, 3575], [282, 4649]]},
    "prompt-empty": {"prompt": ""},
    "prompt-empty-list": {"prompt": []},
    "prompt-left-out": {"prompt": LEFT_OUT},
    "prompt-number": {"prompt": 7},
    "prompt-id-outside": {"prompt": [99999999]},
    "prompt-id-negative": {"prompt": [-1]},
    "prompt-too-long": {"prompt": "word " * 3000},
    "suffix": {"suffix": "!"},
    "best-of-1": {"best_of": 1},
    "messages-instead": {"prompt": LEFT_OUT, "messages": MESSAGES},
    "max-completion-tokens": {"max_completion_tokens": 3},
}
CHAT: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": True},
    "top-logprobs": {"logprobs": True, "top_logprobs": 2},
    "top-logprobs-alone": {"top_logprobs": 2},
    "top-logprobs-99": {"logprobs": True, "top_logprobs": 99},
    "stream-logprobs": {"stream": True, "logprobs": True, "top_logprobs": 2},
    "max-completion-tokens": {"max_tokens": LEFT_OUT, "max_completion_tokens": 4},
    "both-limits": {"max_completion_tokens": 3},
    "messages-empty": {"messages": []},
    "messages-left-out": {"messages": LEFT_OUT},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, *MESSAGES]},
    "role-unknown": {"messages": [{"role": "wizard", "content": "Hello"}]},
    "role-left-out": {"messages": [{"content": "Hello"}]},
    "content-parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
    "content-part-cache-control": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "x"}}]}]
    },
    "content-image": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;,"}}]}]
    },
    "content-empty": {"messages": [{"role": "user", "content": ""}]},
    "content-number": {"messages": [{"role": "user", "content": 7}]},
    "message-name": {"messages": [{"role": "user", "content": "Hello", "name": "Ann"}]},
    "message-extra-keys": {"messages": [{"role": "user", "content": "Hello", "id": "1", "timestamp": 2}]},
    "history": _history({"role": "assistant", "content": "Paris."}),
    "history-dumped": _history(DUMPED),
    "history-tool-calls-empty": _history({"role": "assistant", "content": "Paris.", "tool_calls": []}),
    "history-reasoning": _history({"role": "assistant", "content": "Paris.", "reasoning_content": "Easy."}),
    "history-content-null": _history({"role": "assistant", "content": None, "tool_calls": [CALL]}),
    "history-tool": _history(
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
    ),
    "tools-auto": {"tools": [TOOL], "tool_choice": "auto", "max_tokens": 24},
    "tools-no-choice": {"tools": [TOOL], "max_tokens": 24},
    "tools-none": {"tools": [TOOL], "tool_choice": "none"},
    "tools-required": {"tools": [TOOL], "tool_choice": "required", "max_tokens": 48},
    "tools-named": {"tools": [TOOL], "tool_choice": NAMED, "max_tokens": 48},
    "tools-named-unknown": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "no"}}},
    "tools-empty": {"tools": []},
    "tool-choice-without-tools": {"tool_choice": "auto"},
    "stream-tools-named": {"tools": [TOOL], "tool_choice": NAMED, "stream": True, "max_tokens": 48},
    "parallel-tool-calls": {"parallel_tool_calls": True},
    "template-kwargs": {"chat_template_kwargs": {"enable_thinking": False}},
    "add-generation-prompt-false": {"add_generation_prompt": False},
    "continue-final-message": {
        "add_generation_prompt": False,
        "continue_final_message": True,
        "messages": [*MESSAGES, {"role": "assistant", "content": "The capital"}],
    },
    "continue-and-generation-prompt": {"add_generation_prompt": True, "continue_final_message": True},
    "echo": {"echo": True},
    "include-reasoning": {"include_reasoning": True},
    "reasoning-effort": {"reasoning_effort": "low"},
    "verbosity": {"verbosity": "low"},
    "documents-null": {"documents": None},
    "mm-processor-null": {"mm_processor_kwargs": None},
    "modalities-text": {"modalities": ["text"]},
    "prompt-instead": {"messages": LEFT_OUT, "prompt": PROMPT},
    "too-long": {"messages": [{"role": "user", "content": "word " * 3000}]},
    "schema-unique-items": {
        "response_format": _schema(type="array", items={"type": "boolean"}, uniqueItems=True, maxItems=2),
        "max_tokens": 16,
    },
    "schema-format-uuid4": {"response_format": _schema(type="string", format="uuid4"), "max_tokens": 8},
    "schema-not": {"response_format": _schema(**{"not": {"type": "string"}}), "max_tokens": 8},
    "schema-enum": {"response_format": _schema(enum=["a", "b"]), "max_tokens": 8},
    "schema-ref": {
        "response_format": _schema(**{"$defs": {"c": {"enum": ["a", "b"]}}, "$ref": "#/$defs/c"}),
        "max_tokens": 8,
    },
    "schema-not-a-schema": {"response_format": _schema(type="no-such-type")},
}
OTHER: dict[str, tuple[str, Any]] = {
    "models/list": ("/v1/models", None),
    "models/one": (f"/v1/models/{MODEL}", None),
    "other/health": ("/health", None),
    "other/version": ("/version", None),
    "other/no-such-path": ("/v1/no-such-path", None),
    "other/get-completions": ("/v1/completions", None),
    "tokenize/text": ("/tokenize", {"model": MODEL, "prompt": PROMPT}),
    "tokenize/strings": ("/tokenize", {"model": MODEL, "prompt": PROMPT, "return_token_strs": True}),
    "tokenize/chat": ("/tokenize", {"model": MODEL, "messages": MESSAGES}),
    "tokenize/nothing": ("/tokenize", {"model": MODEL}),
    "detokenize/ids": ("/detokenize", {"model": MODEL, "tokens": [504, 3575]}),
    "detokenize/outside": ("/detokenize", {"model": MODEL, "tokens": [-5]}),
    "responses/text": ("/v1/responses", {"model": MODEL, "input": "Hello", "max_output_tokens": 4, "temperature": 0}),
    "responses/messages": ("/v1/responses", {"model": MODEL, "input": MESSAGES, "max_output_tokens": 4}),
    "responses/stream": ("/v1/responses", {"model": MODEL, "input": "Hello", "max_output_tokens": 4, "stream": True}),
    "responses/nothing": ("/v1/responses", {"model": MODEL}),
    "messages/text": ("/v1/messages", {"model": MODEL, "max_tokens": 4, "messages": MESSAGES}),
    "messages/system": ("/v1/messages", {"model": MODEL, "max_tokens": 4, "messages": MESSAGES, "system": "Be brief."}),
    "messages/stream": ("/v1/messages", {"model": MODEL, "max_tokens": 4, "messages": MESSAGES, "stream": True}),
    "messages/no-max-tokens": ("/v1/messages", {"model": MODEL, "messages": MESSAGES}),
    "messages/count-tokens": ("/v1/messages/count_tokens", {"model": MODEL, "messages": MESSAGES}),
    "bodies/list": ("/v1/completions", []),
    "bodies/empty": ("/v1/completions", {}),
    "bodies/text": ("/v1/chat/completions", "hello"),
}
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": PROMPT}),
    "chat": ("/v1/chat/completions", {"messages": MESSAGES}),
}


def requests() -> Iterator[Sent]:
    """Yields every request, in a fixed order."""
    for endpoint, own in (("completions", COMPLETIONS), ("chat", CHAT)):
        path, plain = PLAIN[endpoint]
        for case, fields in (BOTH | own).items():
            body = {"model": MODEL, "max_tokens": 4, "temperature": 0, **plain, **fields}
            body = {key: value for key, value in body.items() if value is not LEFT_OUT}
            yield Sent(name=f"{endpoint}/{case}", path=path, body=body)
    for name, (path, body) in OTHER.items():
        yield Sent(name=name, path=path, body=body)
