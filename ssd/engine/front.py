"""What every front shares, without I/O: the pairing, its tokenizer, the book of requests, and what
the workers said of themselves."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config.load import load_config, resolve_model_path
from ..config.sections import Config, rank_of, section_of
from ..errors import ConfigError, RequestError, UsageError, WorkerError
from ..models.loading import load_tokenizer, read_config
from ..models.skipping import SkipSet
from ..models.vocabulary import shared_vocabulary
from ..pipeline.runtime.plan import Plan, check_sizes
from ..pipeline.sampling.grammar import Grammars
from ..pipeline.transport.messages import (
    Committed,
    Failed,
    Finished,
    Hello,
    Message,
    Ready,
    Rejoined,
    Reopen,
    RoundReport,
    Timings,
    Welcome,
)
from ..request.output import StreamEvent
from ..request.sampling_params import SamplingParams, completion_seed
from .book import Limits, Request, RequestBook, Step
from .detokenize import Detokenizer
from .resolve import resolve
from .restarts import DraftRestarts

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What follows from a worker's message."""

    events: list[tuple[Request, StreamEvent]] = field(default_factory=list)
    send: list[tuple[str, Message]] = field(default_factory=list)
    """By role, in order."""


def taken(step: Step) -> Taken:
    return Taken(events=step.events, send=[("verifier", message) for message in step.send])


class Front:
    """Reads a configuration, makes requests, takes in the workers' messages.

    Raises:
        UsageError: configuration, models or their pairing are wrong.
    """

    def __init__(
        self,
        config: Config | str | Path | dict[str, Any],
        *,
        overrides: Sequence[str] = (),
        limits: Limits | None = None,
    ):
        self.config = load_config(config, overrides)
        check_sizes(self.config)
        self.tokenizer, self.plan = make_plan(self.config)
        self.book = RequestBook(limits)
        self.grammars = Grammars(lambda: self.tokenizer, vocabulary=self.plan.vocabulary, ends=self.plan.ends)
        self.info: dict[str, Any] = {}
        """What the workers that are ready said of themselves, by role."""
        engine = self.config.engine
        self.restarts = DraftRestarts(
            limit=engine.draft_restarts, delay_s=engine.draft_restart_delay_s, start_s=engine.start_timeout_s
        )
        self.timings: Timings | None = None
        self.round: RoundReport | None = None
        self.rounds: list[RoundReport] | None = None
        """All rounds, while a list is here to take them."""
        self._hellos: dict[str, Hello] = {}
        self._welcomed: set[str] = set()
        self._lost_ranks: set[str] = set()
        """Of the draft; until all its ranks are started again."""
        self._numbers = itertools.count()

    @property
    def ready(self) -> bool:
        return set(self.info) == set(self.plan.roles)

    def fatal(self, gone: Sequence[str]) -> WorkerError | None:
        """What to raise when these workers are gone, if anything: without its draft the verifier goes on."""
        missed = [role for role in gone if section_of(role) == "target" or not self.ready]
        return WorkerError(f"the {missed[0]} worker died; its own messages are above") if missed else None

    def restart_due(self, gone: Sequence[str]) -> Taken | None:
        """What to tell the workers once the launcher has started the draft again, if it is to do so now.
        ``gone``: workers that are."""
        if not self.ready:
            return None
        for role in gone:
            if role == "draft":
                self.restarts.lost("the draft worker died")
            elif section_of(role) == "draft":
                self._lose_rank(role, f"the {role} worker died")
        if not self.restarts.due():
            return None
        for role in ("verifier", *self.config.draft_roles):
            self._hellos.pop(role, None)
        self._lost_ranks.clear()
        self._welcomed.difference_update(self.config.draft_roles)
        return Taken(send=[("verifier", Reopen(epoch=self.restarts.epoch))])

    def _lose_rank(self, role: str, why: str) -> None:
        """Another rank of the draft than the first: the rest go on; while they all are started again, none does."""
        if self.restarts.state == "starting":
            self.restarts.lost(why)
        elif role not in self._lost_ranks:
            self._lost_ranks.add(role)
            first, *_ = why.splitlines() or [""]
            log.warning("the %s is lost, its share of the outcomes is prepared by nobody: %s", role, first)

    @property
    def late(self) -> WorkerError:
        """What to raise when the workers are not ready in time."""
        missing = ", ".join(sorted(set(self.plan.roles) - set(self.info)))
        limit_s = self.config.engine.start_timeout_s
        return WorkerError(f"{missing} not ready after {limit_s:g} s (engine.start_timeout_s)")

    def tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=True)["input_ids"])

    def make(
        self, prompt: str | Sequence[int], params: SamplingParams, client: str = "", priority: int = 0
    ) -> list[Request]:
        """The requests of a prompt, one for each completion, checked, not yet in the book.

        Raises: RequestError.
        """
        if isinstance(prompt, str):
            text, ids = prompt, self.tokenize(prompt)
        else:
            text, ids = None, [int(token) for token in prompt]
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
        if params.method == "self" and self.config.speculation.self_draft is None:
            raise RequestError(
                "method self needs a draft within the target; set speculation.self={} (or speculation.method=self)"
            )
        if priority and self.config.engine.scheduling != "priority":
            raise RequestError("priority is off: start with engine.scheduling=priority, or leave it out")
        text = self.tokenizer.decode(ids) if text is None else text
        params = resolve(params, self.tokenizer, vocabulary=self.plan.vocabulary, ends=self.plan.ends)
        if params.structured_outputs is not None:
            self.grammars.matcher(params.structured_outputs)
        ends = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else self.plan.ends)
        return [
            Request(
                number=next(self._numbers),
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
                context_limit=limit,
                client=client,
                priority=priority,
            )
            for index in range(params.n)
        ]

    def take(self, role: str, message: Message) -> Taken:
        """Raises: UsageError or WorkerError: the worker cannot go on; PipelineError: it is out of turn."""
        if isinstance(message, Committed | Finished):
            return taken(self.book.handle(message))
        if isinstance(message, RoundReport):
            self.round = message
            if self.rounds is not None:
                self.rounds.append(message)
        elif isinstance(message, Timings):
            self.timings = message
        elif isinstance(message, Hello):
            self._hellos[role] = message
            # Only once all are up: until then somebody would not take the message.
            first, *others = self.plan.roles
            if set(self._hellos) == {first, *others}:
                rendezvous = self._hellos[first].rendezvous
                assert rendezvous is not None
                waiting = [other for other in others if other not in self._welcomed]
                self._welcomed.update(waiting)
                return Taken(send=[(other, Welcome(rendezvous=rendezvous)) for other in waiting])
        elif isinstance(message, Ready):
            self.info[role] = message.info
        elif isinstance(message, Rejoined):
            self.restarts.back(message.epoch)
        elif isinstance(message, Failed):
            # A draft that fails once all are ready: the verifier notices by itself and goes on.
            if self.ready and rank_of(message.role) and section_of(message.role) == "draft":
                self._lose_rank(message.role, message.message)
            elif message.degraded or (role == "draft" and self.ready):
                self.restarts.lost(message.message, message.epoch)
            elif message.usage:
                raise UsageError(message.message)
            else:
                raise WorkerError(f"the {message.role} worker failed: {message.message}")
        return Taken()


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

    text = read_config(target).get_text_config()
    if (wanted := config.speculation.self_draft) is not None:
        SkipSet.of(wanted.skip_attention, wanted.skip_mlp, text.num_hidden_layers)  # raises what the verifier would
        if config.target.tensor_parallel > 1:
            raise ConfigError(
                "method self runs on one rank; set target.tensor_parallel=1 (or take away speculation.self)"
            )
    sizes = [text.vocab_size]
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
