"""``LLM``: prompts in, text out, over a pipeline it launches."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import Config, load_config, resolve_model_path
from ..errors import PipelineError, RequestError, UsageError, WorkerError
from ..models.loading import load_tokenizer, read_config
from ..models.vocabulary import shared_vocabulary
from ..params import (
    FinishReason,
    RequestOutput,
    SamplingParams,
    SpeculationRecord,
    StreamEvent,
    TokenLogprob,
    completion_seed,
)
from ..pipeline.build import Plan, check_sizes
from ..pipeline.launch import LocalPipeline, Pipeline
from ..pipeline.messages import Cancel, Committed, Failed, Finished, GetTimings, Hello, Ready, Submit, Timings, Welcome
from .detokenize import Detokenizer
from .resolve import resolve

POLL_S = 0.2


class LLM:
    """A target–draft pair ready to generate.

    Args:
        config: a shipped configuration's name, a YAML file, or a ``Config``.
        overrides: ``a.b=c`` each. launch: from a plan to a running pipeline; local processes by
            default.

    Raises:
        UsageError: configuration, models or their pairing are wrong.
        WorkerError: a worker did not come up.
    """

    def __init__(
        self,
        config: Config | str | Path | dict[str, Any] = "embedded",
        *,
        overrides: Sequence[str] = (),
        launch: Callable[[Plan], Pipeline] = LocalPipeline,
    ):
        self.config = load_config(config, overrides)
        check_sizes(self.config)
        self.tokenizer, plan = make_plan(self.config)
        self._vocabulary, self._ends = plan.vocabulary, plan.ends
        self._ids = itertools.count()
        self._live: dict[int, _Request] = {}
        self._hellos: dict[str, Hello] = {}
        self._info: dict[str, Any] = {}
        self._timings: Timings | None = None
        self.degraded: str | None = None
        """Why the draft is no longer there, if it is not."""
        self._pipeline = launch(plan)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers. Safe to call twice."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.close()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt (text, or token ids), in order. With ``n`` > 1 an output is the
        prompt's first completion and ``outputs`` are all of them.

        Raises:
            RequestError: an empty prompt, one too long for the context, or as many parameters
                as there are not prompts. Nothing is started then.
            PipelineError: the pipeline broke.
        """
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(listed)
        else:
            each = list(params)
        if len(each) != len(listed):
            raise RequestError(f"{len(listed)} prompts but {len(each)} sampling parameters")
        groups = [self._make(prompt, p) for prompt, p in zip(listed, each, strict=True)]
        requests = [request for group in groups for request in group]
        try:
            for request in requests:
                self._submit(request)
            while any(request.output is None for request in requests):
                self._pump()
        finally:
            self._abandon(requests)
        outputs = [[request.output for request in group if request.output is not None] for group in groups]
        return [replace(first, others=tuple(others)) if others else first for first, *others in outputs]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[StreamEvent]:
        """Events as tokens commit; a completion's last one carries its output. Closing the iterator
        cancels."""
        requests = self._make(prompt, params or SamplingParams())
        return self._stream(requests)

    def timings(self, *, reset: bool = False) -> dict[str, float | None]:
        """Medians over recent rounds in ms: ``round_ms``, ``hit_round_ms``, ``forward_ms``, ``draft_ms``."""
        self._timings = None
        self._running().lanes["verifier"].send(GetTimings(reset=reset))
        while (timings := self._timings) is None:
            self._pump()
        return {
            "round_ms": timings.round_ms,
            "hit_round_ms": timings.hit_round_ms,
            "forward_ms": timings.forward_ms,
            "draft_ms": timings.draft_ms,
        }

    def info(self) -> dict[str, Any]:
        """What the workers said of themselves, by role."""
        return dict(self._info)

    def _running(self) -> Pipeline:
        if self._pipeline is None:
            raise PipelineError("this LLM is closed")
        return self._pipeline

    def _wait_until_ready(self) -> None:
        pipeline = self._running()
        limit_s = self.config.engine.start_timeout_s
        deadline = time.monotonic() + limit_s
        while set(self._info) != set(pipeline.lanes):
            if time.monotonic() > deadline:
                missing = ", ".join(sorted(set(pipeline.lanes) - set(self._info)))
                raise WorkerError(f"{missing} not ready after {limit_s:g} s (engine.start_timeout_s)")
            self._pump(starting=True)

    def _make(self, prompt: str | Sequence[int], params: SamplingParams) -> list[_Request]:
        """The checked requests of a prompt, one for each completion."""
        if isinstance(prompt, str):
            text, ids = prompt, self.tokenizer(prompt, add_special_tokens=True)["input_ids"]
        else:
            ids = [int(token) for token in prompt]
            text = self.tokenizer.decode(ids)
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        limit = self.config.engine.max_model_len
        if len(ids) >= limit:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; engine.max_model_len={limit} leaves room for {limit - 1}"
            )
        size = len(self.tokenizer)
        if not all(0 <= token < size for token in ids):
            raise RequestError(f"prompt token ids must be in [0, {size})")
        if params.method in ("sd", "ssd") and self.config.draft is None:
            raise RequestError(f"method {params.method} needs a draft; this configuration has none")
        params = resolve(params, self.tokenizer, vocabulary=self._vocabulary, ends=self._ends)
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(self._ends))
        return [
            _Request(
                number=next(self._ids),
                index=index,
                prompt=text,
                prompt_ids=tuple(ids),
                params=replace(params, n=1, seed=completion_seed(params.seed, index)) if params.n > 1 else params,
                ends=ends,
                detokenizer=Detokenizer(
                    self.tokenizer,
                    params.stop,
                    include_stop=params.include_stop_str_in_output,
                    min_tokens=params.min_tokens,
                ),
            )
            for index in range(params.n)
        ]

    def _submit(self, request: _Request) -> None:
        self._live[request.number] = request
        self._running().lanes["verifier"].send(
            Submit(request=request.number, prompt=list(request.prompt_ids), params=request.params)
        )

    def _stream(self, requests: list[_Request]) -> Iterator[StreamEvent]:
        try:
            for request in requests:
                self._submit(request)
            while any(request.output is None for request in requests):
                self._pump()
                for request in requests:
                    while request.events:
                        yield request.events.pop(0)
        finally:
            self._abandon(requests)

    def _abandon(self, requests: list[_Request]) -> None:
        """Forget requests; those still running are cancelled."""
        for request in requests:
            running = self._live.pop(request.number, None) is not None
            if running and self._pipeline is not None and "verifier" not in self._pipeline.check():
                with contextlib.suppress(PipelineError):
                    self._pipeline.lanes["verifier"].send(Cancel(request=request.number))

    def _pump(self, *, starting: bool = False) -> None:
        """Take in what the workers sent, waiting a little for the first message."""
        pipeline = self._running()
        seen = False
        for role, lane in pipeline.lanes.items():
            wait_s = POLL_S if role == "verifier" else 0
            while (message := lane.receive(wait_s)) is not None:
                seen, wait_s = True, 0
                self._take(role, message)
        if not seen:
            gone = pipeline.check()
            if "verifier" in gone or (starting and gone):
                raise WorkerError(f"the {gone[0]} worker died; its own messages are above")

    def _take(self, role: str, message: object) -> None:
        if isinstance(message, Committed):
            if (request := self._live.get(message.request)) is not None:
                request.commit(message)
                if request.output is not None:
                    # A stop string: the rest of the block, and what the verifier decodes until it
                    # hears of it, does not count.
                    del self._live[message.request]
                    self._running().lanes["verifier"].send(Cancel(request=message.request))
        elif isinstance(message, Finished):
            if (request := self._live.pop(message.request, None)) is not None:
                request.finish(message)
        elif isinstance(message, Timings):
            self._timings = message
        elif isinstance(message, Hello):
            self._hellos[role] = message
            # Only once both are up: until then nobody would take the message.
            if set(self._hellos) == {"verifier", "draft"}:
                rendezvous = self._hellos["verifier"].rendezvous
                assert rendezvous is not None
                self._running().lanes["draft"].send(Welcome(rendezvous=rendezvous))
        elif isinstance(message, Ready):
            self._info[role] = message.info
        elif isinstance(message, Failed):
            if message.degraded:
                self.degraded = message.message
            elif role == "draft" and set(self._info) == set(self._running().lanes):
                self.degraded = message.message  # the verifier notices by itself and goes on
            elif message.usage:
                raise UsageError(message.message)
            else:
                raise WorkerError(f"the {message.role} worker failed: {message.message}")


class _Request:
    """One completion on the front's side."""

    def __init__(
        self,
        *,
        number: int,
        index: int,
        prompt: str,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        ends: frozenset[int],
        detokenizer: Detokenizer,
    ):
        self.number, self.index, self.prompt, self.prompt_ids = number, index, prompt, prompt_ids
        self.params, self.ends, self.detokenizer = params, ends, detokenizer
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.events: list[StreamEvent] = []
        self.output: RequestOutput | None = None
        self._record = SpeculationRecord()

    def commit(self, message: Committed) -> None:
        """Take in a round's tokens. If they complete a stop string, this is the end (``output``)."""
        self._record.count_round(drafted=message.drafted, accepted=message.depth)
        if message.hit is not None:
            self._record.count_lookup(message.hit)
        # One at a time: tokens after the one that completed a stop string do not count.
        kept, text = 0, ""
        for token in message.tokens:
            kept += 1
            # The token that ends a request is none of its text, as in vLLM.
            if token not in self.ends or self.params.include_stop_str_in_output:
                text += self.detokenizer.add([token])
            if self.detokenizer.stopped:
                break
        tokens = tuple(message.tokens[:kept])
        self.token_ids.extend(tokens)
        logprobs = None
        if self.logprobs is not None and message.logprobs is not None:
            logprobs = read_logprobs(tokens, message.logprobs)
            self.logprobs.extend(logprobs)
        self.events.append(
            StreamEvent(
                text=text,
                token_ids=tokens,
                accepted=min(message.accepted, kept),
                logprobs=logprobs,
                index=self.index,
            )
        )
        if self.detokenizer.stopped:
            self._end("stop", self._record, message.decode_s)

    def finish(self, message: Finished) -> None:
        self._end(message.reason, message.record, message.decode_s)

    def _end(self, reason: FinishReason, record: SpeculationRecord, decode_s: float) -> None:
        text = self.detokenizer.finish()
        last = self.token_ids[-1] if self.token_ids else None
        stopped_by = last if reason == "stop" and last in self.params.stop_token_ids else None
        self.output = RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            text=self.detokenizer.text,
            token_ids=tuple(self.token_ids),
            finish_reason="stop" if self.detokenizer.stopped else reason,
            speculation=record,
            decode_s=decode_s,
            stop_reason=self.detokenizer.found or stopped_by,
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            index=self.index,
        )
        self.events.append(StreamEvent(text=text, token_ids=(), accepted=0, output=self.output, index=self.index))


def read_logprobs(tokens: Sequence[int], columns: Sequence[Sequence[Any]]) -> tuple[TokenLogprob, ...]:
    """Of the first tokens of a ``Committed`` message, from its ``logprobs``."""
    return tuple(
        TokenLogprob(token_id=token, logprob=value, rank=rank, top=tuple(zip(ids, values, strict=True)))
        for token, value, rank, ids, values in zip(tokens, *columns, strict=False)
    )


def make_plan(config: Config) -> tuple[Any, Plan]:
    """Tokenizer and plan of a pairing, checked without loading weights.

    Raises:
        UsageError: missing models, mismatched tokenizers.
    """
    from transformers import GenerationConfig

    target = resolve_model_path(config.target.model)
    tokenizer = load_tokenizer(target)

    def head(folder: Path) -> int:
        return read_config(folder).get_text_config().vocab_size

    sizes = [head(target)]
    other = tokenizer
    if config.draft is not None:
        draft = resolve_model_path(config.draft.model)
        other = load_tokenizer(draft)
        sizes.append(head(draft))
    vocabulary = shared_vocabulary(tokenizer, other, sizes[0], sizes[-1])
    ends = {tokenizer.eos_token_id}
    if (target / "generation_config.json").is_file():
        given = GenerationConfig.from_pretrained(target, local_files_only=True).eos_token_id
        ends |= set(given) if isinstance(given, list) else {given}
    return tokenizer, Plan(config=config, vocabulary=vocabulary, ends=tuple(sorted(ends - {None})))
