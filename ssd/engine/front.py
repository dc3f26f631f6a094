"""What every front shares, without I/O: the pairing, its tokenizer, the requests, and the state of the workers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.load import load_config, resolve_model_path
from ..config.sections import Config, rank_of, section_of
from ..errors import ConfigError, PipelineError, RequestError, UsageError, WorkerError
from ..grammars.compiler import Grammars
from ..models.checkpoints.generation_config import end_ids
from ..models.checkpoints.loading import check_weights, load_tokenizer, read_config
from ..models.checkpoints.pairs import Pairing, paired_with, shorter_context
from ..models.skipping import SkipSet
from ..pipeline.runtime.plan import Plan, check_sizes
from ..pipeline.transport.messages import (
    MAX_MESSAGE_BYTES,
    Committed,
    Failed,
    Finished,
    Hello,
    Message,
    Ready,
    Rejoined,
    Reopen,
    Scored,
    Welcome,
    encode,
)
from ..request import prompts
from ..request.methods import WITH_DRAFT
from ..request.sampling_params import MAX_TOKENS, SamplingParams, completion_seed
from .book import VERIFIER, Limits, RequestBook, Step
from .detokenize import Detokenizer, StopRules
from .request import Caller, PromptTokens, Request
from .resolve import resolve
from .restarts import DraftRestarts, News, ignore
from .token_text import TokenTexts

log = logging.getLogger(__name__)


class Front:
    """Reads a configuration, makes requests, takes in the workers' messages.

    ``make`` may be called from several threads at once; everything else belongs to one thread or loop.

    Args:
        overrides: ``a.b=c`` each.
        limits: What may be in flight.
        tell: Called when the draft is lost, restarting, back or given up.

    Raises:
        UsageError: The configuration, the models or their pairing are wrong.
    """

    def __init__(
        self,
        config: Config | str | Path | dict[str, Any],
        *,
        overrides: Sequence[str] = (),
        limits: Limits | None = None,
        tell: Callable[[News], None] = ignore,
    ):
        self.config = load_config(config, overrides)
        check_sizes(self.config)
        self.tokenizer, self.plan = make_plan(self.config)
        self.texts = TokenTexts(self.tokenizer)
        self.info: dict[str, Any] = {}
        """What the workers that are ready reported about themselves, by role."""
        self._book = RequestBook(limits)
        self._grammars = Grammars(lambda: self.tokenizer, vocabulary=self.plan.vocabulary, ends=self.plan.ends)
        engine = self.config.engine
        self._restarts = DraftRestarts(
            limit=engine.draft_restarts, delay_s=engine.draft_restart_delay_s, start_s=engine.start_timeout_s, tell=tell
        )
        self._hellos: dict[str, Hello] = {}
        self._welcomed: set[str] = set()
        self._lost_ranks: set[str] = set()
        """Ranks of the draft that are gone, until all its ranks are started again."""
        self._numbers = itertools.count()

    @property
    def ready(self) -> bool:
        """All workers have reported."""
        return set(self.info) == set(self.plan.roles)

    @property
    def queued(self) -> int:
        """Requests that wait here."""
        return self._book.queued

    @property
    def running(self) -> int:
        """Requests the verifier has."""
        return self._book.sent

    @property
    def tokens_in_flight(self) -> int:
        """Prompt tokens and ``max_tokens`` of all requests, waiting or running."""
        return self._book.tokens

    @property
    def degraded(self) -> str | None:
        """Why the draft is missing, and what is being done; None if it is there."""
        return self._restarts.degraded

    @property
    def restarting(self) -> bool:
        """The draft is missing and will be started again."""
        return self._restarts.pending

    @property
    def late(self) -> WorkerError:
        """The error to raise when the workers are not ready in time."""
        missing = ", ".join(sorted(set(self.plan.roles) - set(self.info)))
        limit_s = self.config.engine.start_timeout_s
        return WorkerError(f"{missing} not ready after {limit_s:g} s (engine.start_timeout_s)")

    def launched(self, *, restartable: bool) -> None:
        """Takes in that the pipeline is launched, and whether it can start its draft again."""
        if not restartable:
            self._restarts.forbid()

    def fatal(self, gone: Sequence[str]) -> WorkerError | None:
        """Returns the error to raise when these workers are gone, if any. Without its draft the verifier goes on."""
        missed = [role for role in gone if section_of(role) == "target" or not self.ready]
        return WorkerError(f"the {missed[0]} worker died; its own messages are above") if missed else None

    def restart_due(self, gone: Sequence[str]) -> Step | None:
        """Returns what to do once the launcher has started the draft again, or None if it is not to start it now.

        Args:
            gone: Workers that have died.
        """
        if not self.ready:
            return None
        for role in gone:
            if role == "draft":
                self._restarts.lost("the draft worker died")
            elif section_of(role) == "draft":
                self._lose_rank(role, f"the {role} worker died")
        if not self._restarts.due():
            return None
        for role in (VERIFIER, *self.config.draft_roles):
            self._hellos.pop(role, None)
        self._lost_ranks.clear()
        self._welcomed.difference_update(self.config.draft_roles)
        return Step(send=[(VERIFIER, Reopen(epoch=self._restarts.epoch))])

    def restart_failed(self, error: Exception) -> None:
        """Takes in that the launcher could not start the draft again."""
        self._restarts.lost(str(error) or type(error).__name__)

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a prompt. Raises: RequestError: UTF-8 cannot encode the text.

        Args:
            add_special_tokens: Add those that the tokenizer puts around a text, such as a beginning-of-text token.
        """
        asked = prompts.one(text)
        return list(self.tokenizer(asked.prompt, add_special_tokens=add_special_tokens)["input_ids"])

    def make(self, prompt: str | Sequence[int], params: SamplingParams, caller: Caller | None = None) -> list[Request]:
        """Returns the requests of a prompt, one for each completion: checked, and not yet submitted.

        Tokenizes the prompt and compiles its grammar, which may take seconds.

        Raises: RequestError: The request cannot be carried out.
        """
        prompt, params = prompts.one(prompt, params)
        ids = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        self._check_prompt(ids, params.max_tokens)
        self._check_method(params)
        if caller is not None and caller.priority and self.config.engine.scheduling != "priority":
            raise RequestError("priority is off: start with engine.scheduling=priority, or leave it out")
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
        context = self.config.engine.max_model_len
        if params.max_tokens == MAX_TOKENS:
            params = replace(params, max_tokens=max(context - len(ids), params.min_tokens))
        params = resolve(params, self.tokenizer, vocabulary=self.plan.vocabulary, ends=self.plan.ends)
        if params.structured_outputs is not None:
            self._grammars.matcher(params.structured_outputs)
        ends = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else self.plan.ends)
        requests = [
            Request(
                number=next(self._numbers),
                index=index,
                prompt=PromptTokens(text=text, token_ids=tuple(ids)),
                params=replace(params, n=1, seed=completion_seed(params.seed, index)) if params.n > 1 else params,
                ends=ends,
                detokenizer=Detokenizer(
                    self.texts.stream(ids, skip_special_tokens=params.skip_special_tokens), StopRules.of(params)
                ),
                context_limit=context,
                caller=caller,
            )
            for index in range(params.n)
        ]
        check_encodable(requests[0])  # the others differ in their seed only
        return requests

    def submit(self, requests: Sequence[Request]) -> Step:
        """Adds all completions of a prompt, or none.

        Raises: RequestError, OverloadedError: They exceed the limits; see ``RequestBook.add``.
        """
        return self._book.add(requests)

    def cancel(self, requests: Sequence[Request]) -> Step:
        """Cancels the requests that are not over."""
        return self._book.cancel([request.number for request in requests])

    def cancel_all(self) -> Step:
        """Cancels every request."""
        return self._book.cancel(list(self._book.live))

    def fail(self) -> None:
        """Forgets all requests, because the pipeline is gone. None gets another event."""
        self._book.fail()

    def take(self, role: str, message: Message) -> Step:
        """Takes in a worker's message.

        Raises: UsageError, WorkerError: The worker cannot go on. PipelineError: The message is out of turn.
        """
        if isinstance(message, Scored | Committed | Finished):
            return self._book.handle(message)
        if isinstance(message, Hello):
            return self._greet(role, message)
        if isinstance(message, Ready):
            self.info[role] = message.info
        elif isinstance(message, Rejoined):
            self._restarts.back(message.epoch)
        elif isinstance(message, Failed):
            self._take_failure(role, message)
        return Step()

    def _greet(self, role: str, message: Hello) -> Step:
        self._hellos[role] = message
        # Only once all are up: until then a worker would not receive the message.
        first, *others = self.plan.roles
        if set(self._hellos) != {first, *others}:
            return Step()
        rendezvous = self._hellos[first].rendezvous
        if rendezvous is None:
            raise PipelineError(f"the {first} worker did not say where to meet it")
        waiting = [other for other in others if other not in self._welcomed]
        self._welcomed.update(waiting)
        return Step(send=[(other, Welcome(rendezvous=rendezvous)) for other in waiting])

    def _take_failure(self, role: str, message: Failed) -> None:
        # Once all are ready the verifier notices a failed draft by itself and goes on.
        if self.ready and rank_of(message.role) and section_of(message.role) == "draft":
            self._lose_rank(message.role, message.message)
        elif message.degraded or (role == "draft" and self.ready):
            self._restarts.lost(message.message, message.epoch)
        elif message.usage:
            raise UsageError(message.message)
        else:
            raise WorkerError(f"the {message.role} worker failed: {message.message}")

    def _lose_rank(self, role: str, why: str) -> None:
        """Takes in the loss of a rank of the draft other than the first. The others go on, unless all are being
        started again."""
        if self._restarts.state == "starting":
            self._restarts.lost(why)
        elif role not in self._lost_ranks:
            self._lost_ranks.add(role)
            first, *_ = why.splitlines() or [""]
            log.warning("the %s is lost; nobody prepares its share of the outcomes: %s", role, first)

    def _check_prompt(self, ids: Sequence[int], max_tokens: int) -> None:
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        limit = self.config.engine.max_model_len
        room = limit - min(max_tokens, 1)
        if len(ids) > room:
            raise RequestError(f"the prompt has {len(ids)} tokens; engine.max_model_len={limit} leaves room for {room}")
        if max(ids) >= self.plan.vocabulary:
            raise RequestError(f"prompt token ids must be in [0, {self.plan.vocabulary}); got {max(ids)}")

    def _check_method(self, params: SamplingParams) -> None:
        if params.method in WITH_DRAFT and self.config.draft is None:
            raise RequestError(f"method {params.method} needs a draft; this configuration has none")
        if params.method == "self" and self.config.speculation.self_draft is None:
            raise RequestError(
                "method self needs a draft within the target; set speculation.self={} (or speculation.method=self)"
            )


def check_encodable(request: Request) -> None:
    """Checks before a request is booked that it can be sent to the verifier.

    Raises: RequestError: A value does not fit a message, or all of them together are too large for one.
    """
    try:
        size = len(encode(request.message))
    except (OverflowError, TypeError, ValueError, PipelineError) as error:
        raise RequestError(f"the request cannot be sent to the verifier: {' '.join(str(error).split())}") from error
    if size > MAX_MESSAGE_BYTES:
        raise RequestError(f"the request has {size} bytes; at most {MAX_MESSAGE_BYTES} can be sent to the verifier")


def make_plan(config: Config) -> tuple[Any, Plan]:
    """Returns the tokenizer and the plan of a pairing, checked without loading weights.

    Raises:
        UsageError: A model is missing, or the tokenizers do not match.
    """
    target = resolve_model_path(config.target.model)
    tokenizer = load_tokenizer(target)
    for model in (config.target, config.draft):
        if model is not None and model.model:  # a draft may be a function
            path = resolve_model_path(model.model)
            check_weights(path, read_config(path), weights=model.weights, device=model.device, adapter=model.adapter)
    text = read_config(target).get_text_config()
    if (wanted := config.speculation.self_draft) is not None:
        layers = getattr(text, "num_hidden_layers", 0)  # BLT has several stacks, and no number of layers
        SkipSet.of(wanted.skip_attention, wanted.skip_mlp, layers)  # fails as the verifier would
        if config.target.tensor_parallel > 1:
            raise ConfigError(
                "method self runs on one rank; set target.tensor_parallel=1 (or take away speculation.self)"
            )
    pairing, context = Pairing.alone(tokenizer, text.vocab_size), None
    if config.draft is not None and config.draft.propose is None:
        draft = resolve_model_path(config.draft.model)
        pairing = paired_with(draft, tokenizer, text.vocab_size, shared=config.draft.vocabulary == "shared")
        context = shorter_context(read_config(draft), config.engine.max_model_len)
        if context is not None and context < 4 * config.speculation.depth + 4:
            raise ConfigError(
                f"the draft knows {context} positions, too few for speculation.lookahead={config.speculation.depth}"
            )
    ends = end_ids(target, read_config(target), tokenizer, vocabulary=pairing.size)
    plan = Plan(
        config=config,
        vocabulary=pairing.size,
        ends=ends,
        mapped=pairing.map is not None,
        draft_context=context,
    )
    return tokenizer, plan
