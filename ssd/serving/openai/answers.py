"""Answers in OpenAI's two schemas: chat completions and text completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from ...request.output import RequestOutput, StreamEvent, TokenLogprob
from ..parsers import parts as parsed
from ..parsers.parts import Answer, Part
from .logprobs import TokenReader, chat_logprobs, completion_logprobs


class Schema(Protocol):
    """Where the two endpoints' answers differ."""

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    """``object`` of a whole answer."""
    chunk_kind: ClassVar[str]
    """``object`` of a chunk of a stream."""
    prompt_field: ClassVar[str]
    """The request field with the prompt."""
    prompt_in_choices: ClassVar[bool]
    """Whether each choice says what is asked about its prompt; otherwise the answer does."""
    opening: ClassVar[dict[str, Any] | None]
    """Content of each choice's first chunk, if a stream begins with one."""
    closing: ClassVar[dict[str, Any]]
    """Content of the chunk with the finish reason."""

    @staticmethod
    def whole(answer: Answer) -> dict[str, Any]:
        """Returns the content of a choice of a whole answer."""
        ...

    @staticmethod
    def part(parts: Sequence[Part]) -> dict[str, Any]:
        """Returns the content of a choice of a chunk."""
        ...

    @staticmethod
    def logprobs(tokens: Sequence[TokenLogprob], reader: TokenReader) -> dict[str, Any]:
        """Returns ``logprobs`` of a choice for its next tokens, and moves the reader behind them."""
        ...


class Chat:
    """/v1/chat/completions."""

    id_prefix: ClassVar = "chatcmpl"
    kind: ClassVar = "chat.completion"
    chunk_kind: ClassVar = "chat.completion.chunk"
    prompt_field: ClassVar = "messages"
    prompt_in_choices: ClassVar = False
    opening: ClassVar[dict[str, Any] | None] = {"delta": {"role": "assistant", "content": ""}}
    closing: ClassVar[dict[str, Any]] = {"delta": {}}

    @staticmethod
    def whole(answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if not answer.text and (answer.calls or answer.reasoning):
            message["content"] = None
        if answer.reasoning:
            message |= _reasoning(answer.reasoning)
        if answer.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in answer.calls
            ]
        return {"message": message}

    @staticmethod
    def part(parts: Sequence[Part]) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        text, reasoning = "", ""
        for part in parts:
            match part:
                case parsed.Text():
                    text += part.text
                case parsed.Reasoning():
                    reasoning += part.text
                case parsed.Call():
                    function = {"name": part.name, "arguments": ""}
                    calls[part.index] = {"index": part.index, "id": part.id, "type": "function", "function": function}
                case parsed.Arguments():
                    call = calls.setdefault(part.index, {"index": part.index, "function": {"arguments": ""}})
                    call["function"]["arguments"] += part.text
        if reasoning:
            delta |= _reasoning(reasoning)
        if text or not parts:
            delta["content"] = text
        if calls:
            delta["tool_calls"] = list(calls.values())
        return {"delta": delta}

    @staticmethod
    def logprobs(tokens: Sequence[TokenLogprob], reader: TokenReader) -> dict[str, Any]:
        return chat_logprobs(tokens, reader)


class Text:
    """/v1/completions."""

    id_prefix: ClassVar = "cmpl"
    kind: ClassVar = "text_completion"
    chunk_kind: ClassVar = "text_completion"
    prompt_field: ClassVar = "prompt"
    prompt_in_choices: ClassVar = True
    opening: ClassVar[dict[str, Any] | None] = None
    closing: ClassVar[dict[str, Any]] = {"text": ""}

    @staticmethod
    def whole(answer: Answer) -> dict[str, Any]:
        return {"text": answer.text}

    @staticmethod
    def part(parts: Sequence[Part]) -> dict[str, Any]:
        return {"text": Answer.of(parts).text}

    @staticmethod
    def logprobs(tokens: Sequence[TokenLogprob], reader: TokenReader) -> dict[str, Any]:
        return completion_logprobs(tokens, reader)


def _reasoning(text: str) -> dict[str, str]:
    """Returns vLLM's field with reasoning, under its present and its former name."""
    return {"reasoning": text, "reasoning_content": text}


def provenance(event: StreamEvent) -> list[dict[str, Any]]:
    """Each token of an event and where it came from; ``at_ms`` is on the verifier's monotonic clock."""
    return [
        {"id": token, "text": piece, "from": origin, "at_ms": round(event.committed_s * 1e3, 3)}
        for token, piece, origin in zip(event.token_ids, event.pieces, event.provenance, strict=True)
    ]


def usage(prompts: Sequence[Sequence[int]], owners: Sequence[int], outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """OpenAI's ``usage``. Counts are tokens.

    Args:
        prompts: token ids. owners: for each output, the index of its prompt.
    """
    prompt = sum(map(len, prompts))
    completion = sum(len(output.token_ids) for output in outputs)
    cached: dict[int, int] = {}  # by prompt: its later choices find what the first one computed
    for index, output in zip(owners, outputs, strict=True):
        cached[index] = min(cached.get(index, output.num_cached_tokens), output.num_cached_tokens)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
    }
