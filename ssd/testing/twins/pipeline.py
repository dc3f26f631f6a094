"""A pipeline without models whose verifier follows a script, for tests of fronts and servers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...pipeline.runtime.plan import Plan
from ...pipeline.transport.lanes import ControlLane, InprocLane
from ...pipeline.transport.messages import (
    Cancel,
    Committed,
    Failed,
    Finished,
    Message,
    Ready,
    RoundReport,
    Scored,
    Shutdown,
    Submit,
    Watch,
)
from ...request.output import SpeculationRecord

IDLE_S = 0.02


def scripted_token(prompt: list[int] | tuple[int, ...], seed: int, position: int, vocabulary: int) -> int:
    """Returns the token after ``position`` generated ones; never 0, the embedded pair's end of text."""
    return 1 + (7 * sum(prompt) + 13 * seed + 31 * position) % (vocabulary - 1)


def scripted_logprobs(tokens: list[int], count: int) -> list[list]:
    """Returns columns of ``Committed.logprobs``; each token is the second most probable, after its successor."""
    top = [[token + 1, token, 0][:count] for token in tokens]
    return [[-1.5] * len(tokens), [2] * len(tokens), top, [[-0.5, -1.5, float("-inf")][:count] for _ in tokens]]


@dataclass(kw_only=True, slots=True)
class _Slot:
    submit: Submit
    done: int = 0
    record: SpeculationRecord = field(default_factory=SpeculationRecord)


class ScriptedPipeline:
    """A pipeline with slots, rounds, cancelling, and a verifier that can die.

    Args:
        round_s: duration of a round.
        answer: returns all tokens of an answer, which then ends by itself. None: ``scripted_token`` until the limit.
    """

    def __init__(self, plan: Plan, *, round_s: float = 0.002, answer: Callable[[Submit], Sequence[int]] | None = None):
        self._vocabulary, self._round_s, self._answer = plan.vocabulary, round_s, answer
        self._lookahead = plan.config.speculation.depth
        self._slots: list[_Slot | None] = [None] * plan.config.engine.max_batch
        self._waiting: deque[Submit] = deque()
        self._watched = False
        self.killed = threading.Event()
        self.most_waiting = 0
        """Largest number of requests that waited for a slot at the same time."""
        self.lanes: dict[str, ControlLane] = {}
        for role in plan.roles:
            self.lanes[role], theirs = InprocLane.pair()
            theirs.send(Ready(role=role, info={"model": "scripted"}))
            if role == "verifier":
                self._lane = theirs
        self._thread = threading.Thread(target=self._run, name="ssd-scripted", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> int:
        """Number of slots in use."""
        return sum(slot is not None for slot in self._slots)

    def check(self) -> list[str]:
        return [] if self._thread.is_alive() else ["verifier"]

    def close(self) -> None:
        self.lanes["verifier"].send(Shutdown())
        self._thread.join(10.0)

    def lose_draft(self) -> None:
        self._lane.send(Failed(role="draft", message="scripted loss", degraded=True))

    def _run(self) -> None:
        while not self.killed.is_set():
            idle = not self._waiting and not self.busy
            message = self._lane.receive(IDLE_S if idle else 0)
            while message is not None:
                if isinstance(message, Shutdown):
                    return
                self._take(message)
                message = self._lane.receive(0)
            for index, slot in enumerate(self._slots):
                if slot is None and self._waiting:
                    self._slots[index] = self._begin(self._waiting.popleft())
            if self.busy:
                time.sleep(self._round_s)
                self._round()

    def _begin(self, submit: Submit) -> _Slot | None:
        """Scores the prompt if that is asked for. None: there is nothing to generate."""
        count, following = submit.params.prompt_logprobs, submit.prompt[1:]
        if count is not None and following:
            self._lane.send(Scored(request=submit.request, logprobs=scripted_logprobs(following, count)))
        if submit.params.max_tokens:
            return _Slot(submit=submit)
        self._lane.send(Finished(request=submit.request, reason="length", record=SpeculationRecord(), decode_s=0.0))
        return None

    def _take(self, message: Message) -> None:
        if isinstance(message, Submit):
            self._waiting.append(message)
            self.most_waiting = max(self.most_waiting, len(self._waiting))
        elif isinstance(message, Watch):
            self._watched = message.on
        elif isinstance(message, Cancel):
            record = SpeculationRecord()
            for index, slot in enumerate(self._slots):
                if slot is not None and slot.submit.request == message.request:
                    record, self._slots[index] = slot.record, None
            self._waiting = deque(s for s in self._waiting if s.request != message.request)
            self._lane.send(Finished(request=message.request, reason="cancelled", record=record, decode_s=0.0))

    def _round(self) -> None:
        began, rows = time.perf_counter(), self.busy
        for index, slot in enumerate(self._slots):
            if slot is None:
                continue
            submit, params = slot.submit, slot.submit.params
            drafted = 0 if params.method == "none" or slot.done == 0 else self._lookahead
            accepted = (slot.done + submit.request) % (drafted + 1)
            answer = None if self._answer is None else self._answer(submit)
            limit = params.max_tokens if answer is None else min(params.max_tokens, len(answer))
            count = min(accepted + 1, limit - slot.done)
            tokens = [
                scripted_token(submit.prompt, params.seed, i, self._vocabulary) if answer is None else answer[i]
                for i in range(slot.done, slot.done + count)
            ]
            accepted = min(accepted, count)
            slot.done += count
            slot.record.rounds += 1
            slot.record.tokens += count
            slot.record.drafted += drafted
            slot.record.accepted += accepted
            self._lane.send(
                Committed(
                    request=submit.request,
                    tokens=tokens,
                    accepted=accepted,
                    depth=accepted,
                    drafted=drafted,
                    logprobs=None if params.logprobs is None else scripted_logprobs(tokens, params.logprobs),
                    origin="plain" if not drafted else "hit" if slot.record.rounds % 3 else "miss",
                    committed_s=time.perf_counter(),
                )
            )
            if slot.done >= limit:
                self._slots[index] = None
                reason = "length" if answer is None or limit < len(answer) else "stop"
                self._lane.send(
                    Finished(request=submit.request, reason=reason, record=slot.record, decode_s=slot.done * 1e-3)
                )
        if self._watched:
            self._lane.send(
                RoundReport(
                    began_s=began,
                    forward_s=self._round_s / 2,
                    wait_s=self._round_s / 4,
                    draft_s=self._round_s / 2,
                    jit_s=None,
                    round_s=self._round_s,
                    rows=rows,
                    lookups=rows,
                    hits=rows // 2,
                )
            )
