"""``LLM``: prompts in, text out, over a pipeline it launches."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import Config, load_config, resolve_model_path
from ..errors import PipelineError, RequestError, UsageError, WorkerError
from ..models.loading import load_tokenizer, read_config
from ..models.vocabulary import shared_vocabulary
from ..params import RequestOutput, SamplingParams, SpeculationRecord, StreamEvent
from ..pipeline.build import Plan, check_sizes
from ..pipeline.launch import LocalPipeline, Pipeline
from ..pipeline.messages import Cancel, Committed, Failed, Finished, GetTimings, Hello, Ready, Submit, Timings, Welcome
from .detokenize import Detokenizer

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
        """Complete every prompt (text, or token ids), in order.

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
        requests = [self._make(prompt, p) for prompt, p in zip(listed, each, strict=True)]
        try:
            for request in requests:
                self._submit(request)
            while any(request.output is None for request in requests):
                self._pump()
        finally:
            self._abandon(requests)
        return [request.output for request in requests if request.output is not None]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[StreamEvent]:
        """Events as tokens commit; the last one carries the output. Closing the iterator cancels."""
        request = self._make(prompt, params or SamplingParams())
        return self._stream(request)

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

    def _make(self, prompt: str | Sequence[int], params: SamplingParams) -> _Request:
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
        return _Request(
            number=next(self._ids),
            prompt=text,
            prompt_ids=tuple(ids),
            params=params,
            detokenizer=Detokenizer(self.tokenizer, params.stop),
        )

    def _submit(self, request: _Request) -> None:
        self._live[request.number] = request
        self._running().lanes["verifier"].send(
            Submit(request=request.number, prompt=list(request.prompt_ids), params=request.params)
        )

    def _stream(self, request: _Request) -> Iterator[StreamEvent]:
        self._submit(request)
        try:
            while request.output is None:
                self._pump()
                while request.events:
                    yield request.events.pop(0)
        finally:
            self._abandon([request])

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
                if request.detokenizer.stopped and not request.cancelled:
                    request.cancelled = True
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
    """One request on the front's side."""

    def __init__(
        self, *, number: int, prompt: str, prompt_ids: tuple[int, ...], params: SamplingParams, detokenizer: Detokenizer
    ):
        self.number, self.prompt, self.prompt_ids, self.params = number, prompt, prompt_ids, params
        self.detokenizer = detokenizer
        self.token_ids: list[int] = []
        self.events: list[StreamEvent] = []
        self.output: RequestOutput | None = None
        self.cancelled = False
        self._began = time.perf_counter()

    def commit(self, message: Committed) -> None:
        if self.detokenizer.stopped:
            return
        # One at a time: tokens after the one that completed a stop string do not count.
        kept: list[int] = []
        text = ""
        for token in message.tokens:
            kept.append(token)
            text += self.detokenizer.add([token])
            if self.detokenizer.stopped:
                break
        self.token_ids.extend(kept)
        self.events.append(StreamEvent(text=text, token_ids=tuple(kept), accepted=min(message.accepted, len(kept))))

    def finish(self, message: Finished) -> None:
        text = self.detokenizer.finish()
        record: SpeculationRecord = message.record
        self.output = RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            text=self.detokenizer.text,
            token_ids=tuple(self.token_ids),
            finish_reason="stop" if self.detokenizer.stopped else message.reason,
            speculation=record,
            decode_s=message.decode_s or time.perf_counter() - self._began,
        )
        self.events.append(StreamEvent(text=text, token_ids=(), accepted=0, output=self.output))


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
