"""From a request body to an answer: prompts and choices, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...engine.async_engine import AsyncEngine
from ...engine.stream import RequestStream
from ...errors import RequestError, SSDError
from ...request.output import RequestOutput, StreamEvent, TokenLogprob
from ...request.sampling_params import SamplingParams
from .bodies import (
    COMPLETION_MAX_TOKENS,
    MAX_CHOICES,
    ChatBody,
    CompletionBody,
    read_body,
    refused,
    sampling_params,
    seeds,
    structured_by,
)
from .chat import ChatTemplate
from .errors import APIError, as_api_error
from .logprobs import TokenBytes, chat_logprobs, completion_logprobs

AHEAD = 64
"""Events of all choices made ready for a reader; what follows waits with the requests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One HTTP request, checked."""

    chat: bool
    model: str
    prompts: list[list[int]]
    choices: list[tuple[int, SamplingParams]]
    """Index into ``prompts`` and parameters."""
    stream: bool
    usage: bool
    """A stream ends with a usage chunk."""
    provenance: bool
    priority: int = 0
    structured_by: str = "structured_outputs"
    """The field that asked for structured output, if one did."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def head(self) -> dict[str, Any]:
        """Fields every answer and chunk has."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": f"{kind}.chunk" if self.chat and self.stream else kind,
            "created": self.created,
            "model": self.model,
        }


def completion_job(raw: Any, engine: AsyncEngine, model: str) -> Job:
    """Of a /v1/completions body. Raises: APIError."""
    body: Any = read_body(CompletionBody, raw)
    _check_model(body.model, model)
    given = body.prompt
    listed = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not listed:
        raise APIError(400, "prompt must not be an empty list", param="prompt")
    prompts = [engine.tokenize(one) if isinstance(one, str) else one for one in listed]
    wanted = body.max_tokens or COMPLETION_MAX_TOKENS
    return _job(False, body, engine, model, prompts, wanted)


def chat_job(raw: Any, engine: AsyncEngine, model: str, template: ChatTemplate) -> Job:
    """Of a /v1/chat/completions body. Raises: APIError."""
    body: Any = read_body(ChatBody, raw)
    _check_model(body.model, model)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise APIError(400, "give max_tokens or max_completion_tokens, not both", param="max_completion_tokens")
    prompt = template.tokens([message.plain() for message in body.messages])
    return _job(True, body, engine, model, [prompt], body.max_completion_tokens or body.max_tokens)


def _check_model(asked: str, served: str) -> None:
    if asked != served:
        raise APIError(
            404,
            f"the model {asked!r} does not exist; this server has {served!r}",
            param="model",
            code="model_not_found",
        )


def _job(
    chat: bool, body: Any, engine: AsyncEngine, model: str, prompts: list[list[int]], max_tokens: int | None
) -> Job:
    n, context = body.n or 1, engine.config.engine.max_model_len
    if len(prompts) * n > MAX_CHOICES:
        raise APIError(400, f"prompts × n must be at most {MAX_CHOICES}", param="n")
    choices: list[tuple[int, SamplingParams]] = []
    for index, prompt in enumerate(prompts):
        room = context - len(prompt)
        if max_tokens is not None and len(prompt) and (room < 1 or max_tokens > room):
            raise APIError(
                400,
                f"this model's context is {context} tokens (engine.max_model_len); the prompt has {len(prompt)} and "
                f"{max_tokens} were asked for",
                param="messages" if chat else "prompt",
                code="context_length_exceeded",
            )
        wanted = max_tokens if max_tokens is not None else max(1, room)
        choices += [(index, sampling_params(body, max_tokens=wanted, seed=seed)) for seed in seeds(body, n)]
    return Job(
        chat=chat,
        model=model,
        prompts=prompts,
        choices=choices,
        stream=bool(body.stream),
        usage=bool(body.stream_options and body.stream_options.include_usage),
        provenance=bool(body.provenance),
        priority=body.priority or 0,
        structured_by=structured_by(body),
    )


class Generation:
    """The requests of a job, running.

    Raises:
        APIError: the engine refuses a parameter. OverloadedError, PipelineError: as
            ``AsyncEngine.submit``. None of them runs then.
    """

    def __init__(self, engine: AsyncEngine, job: Job, client: str):
        self.job = job
        self._lookahead = engine.config.speculation.depth if engine.config.draft is not None else 0
        self._texts = TokenBytes(engine.tokenizer)
        self._characters: Counter[int] = Counter()
        """By choice, of the tokens whose log-probabilities went out."""
        self.streams: list[RequestStream] = []
        try:
            for prompt, params in job.choices:
                ids = job.prompts[prompt]
                self.streams.append(engine.submit(ids, params, client=client, priority=job.priority))
                self.streams[-1].request.label = job.head["id"]
        except RequestError as error:
            self.cancel()
            raise refused(error, job.structured_by) from None
        except SSDError:
            self.cancel()
            raise

    def cancel(self) -> None:
        for stream in self.streams:
            stream.cancel()

    async def whole(self) -> dict[str, Any]:
        """The answer as one object. Raises: SSDError, APIError."""
        try:
            choices = []
            outputs = []
            for index, stream in enumerate(self.streams):
                tokens: list[dict[str, Any]] = []
                output = None
                async for event in stream:
                    tokens += _told(event)
                    output = event.output
                assert output is not None
                _check_end(output)
                outputs.append(output)
                text = (
                    {"message": {"role": "assistant", "content": output.text}}
                    if self.job.chat
                    else {"text": output.text}
                )
                logprobs = self._logprobs(index, output.logprobs)
                choice = {"index": index, **text, "logprobs": logprobs, "finish_reason": output.finish_reason}
                choices.append({**choice, "provenance": tokens} if self.job.provenance else choice)
        finally:
            self.cancel()
        return {**self.job.head, "choices": choices, "usage": self._usage(outputs), "metrics": self._metrics(outputs)}

    async def chunks(self) -> AsyncIterator[bytes]:
        """Server-sent events. An error after the beginning is an event of its own."""
        events: asyncio.Queue[tuple[int, StreamEvent | Exception]] = asyncio.Queue(AHEAD)

        async def forward(index: int, stream: RequestStream) -> None:
            try:
                async for event in stream:
                    await events.put((index, event))
            except SSDError as error:
                await events.put((index, error))

        tasks = [asyncio.create_task(forward(i, stream)) for i, stream in enumerate(self.streams)]
        outputs: dict[int, RequestOutput] = {}
        try:
            if self.job.chat:
                for index in range(len(self.streams)):
                    yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)
            while len(outputs) < len(self.streams):
                index, event = await events.get()
                if isinstance(event, Exception):
                    raise event
                logprobs = self._logprobs(index, event.logprobs)
                if event.text or logprobs or (self.job.provenance and event.token_ids):
                    extra = {"provenance": _told(event), "drafted": event.drafted} if self.job.provenance else {}
                    text = {"delta": {"content": event.text}} if self.job.chat else {"text": event.text}
                    yield self._chunk(index, {**text, **extra}, None, logprobs)
                if event.output is not None:
                    _check_end(event.output)
                    outputs[index] = event.output
                    yield self._chunk(
                        index, {"delta": {}} if self.job.chat else {"text": ""}, event.output.finish_reason
                    )
            if self.job.usage:
                listed = [outputs[index] for index in range(len(self.streams))]
                usage, metrics = self._usage(listed), self._metrics(listed)
                yield sse({**self.job.head, "choices": [], "usage": usage, "metrics": metrics})
            yield b"data: [DONE]\n\n"
        except (SSDError, APIError) as error:
            yield sse(as_api_error(error).body)
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        """Of the next tokens of a choice."""
        if not tokens:
            return None
        if self.job.chat:
            return chat_logprobs(tokens, self._texts)
        offset = self._characters[index]
        self._characters[index] += sum(self._texts.characters(token.token_id) for token in tokens)
        return completion_logprobs(tokens, self._texts, offset)

    def _chunk(
        self, index: int, content: dict[str, Any], finish_reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> bytes:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self.job.usage else {}
        return sse({**self.job.head, "choices": [choice], **usage})

    def _usage(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        prompt = sum(map(len, self.job.prompts))
        completion = sum(len(output.token_ids) for output in outputs)
        cached: dict[int, int] = {}  # by prompt: the later completions of one find what the first computed
        for (index, _), output in zip(self.job.choices, outputs, strict=True):
            cached[index] = min(cached.get(index, output.num_cached_tokens), output.num_cached_tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }

    def _metrics(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """vLLM's per-request metrics, of requests with one choice, and our own beside them."""
        if len(outputs) != 1:
            return {"speculative_decoding": None}
        [output], [stream] = outputs, self.streams
        record, request = output.speculation, stream.request
        return {
            "speculative_decoding": speculation_metrics(request.steps.by_draft_length, self._lookahead),
            "ssd": {
                "rounds": record.rounds,
                "lookups": record.lookups,
                "hits": record.hits,
                "hit_rate": record.hit_rate,
                "decode_s": output.decode_s,
                "seed": request.params.seed,
            },
        }


def speculation_metrics(by_draft_length: dict[int, list[int]], lookahead: int) -> dict[str, Any]:
    """``metrics.speculative_decoding`` as vLLM defines it (docs/features/speculative_decoding/acceptance_metrics.md).

    Args:
        by_draft_length: ``[k][j]`` steps that accepted j of k draft tokens. lookahead: K.
    """
    histogram = [0] * (max([lookahead, *by_draft_length]) + 1)
    for counts in by_draft_length.values():
        for accepted, count in enumerate(counts):
            histogram[accepted] += count
    steps = sum(histogram)
    accepted = sum(j * count for j, count in enumerate(histogram))
    drafted = sum(k * sum(counts) for k, counts in by_draft_length.items())
    return {
        "mean_acceptance_length": 1 + accepted / steps if steps else None,
        "draft_acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_histogram": histogram,
        "acceptance_histogram_by_draft_length": {str(k): counts for k, counts in sorted(by_draft_length.items())},
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": lookahead,
    }


def sse(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _told(event: StreamEvent) -> list[dict[str, Any]]:
    """How each token of an event came to be."""
    return [
        {"id": token, "text": piece, "from": provenance, "at_ms": round(event.committed_s * 1e3, 3)}
        for token, piece, provenance in zip(event.token_ids, event.pieces, event.provenance, strict=True)
    ]


def _check_end(output: RequestOutput) -> None:
    if output.finish_reason == "cancelled":
        raise APIError(503, "the server is shutting down", code="engine_unavailable")
    if output.finish_reason == "error":
        raise APIError(500, output.error or "the request failed", code="generation_failed")
