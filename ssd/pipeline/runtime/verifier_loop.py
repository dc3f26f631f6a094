"""The spine of the project: one iteration of ``verifier_loop`` is a round. The loop moves frames and messages; the
worker decides. ``draft_loop`` is the other half."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable

from ...errors import LinkError, PipelineError
from ...request.output import FinishReason, SpeculationRecord
from ..round.frames import Next
from ..round.verdict import Verdict
from ..transport.lane_ends import Teller
from ..transport.lanes import ControlLane
from ..transport.messages import (
    Cancel,
    Committed,
    Failed,
    Finished,
    GetTimings,
    Hello,
    Message,
    Rejoined,
    Reopen,
    RoundReport,
    Shutdown,
    Submit,
    Timings,
    Watch,
)
from ..verifier.draft_side import DraftSide, Rejoin
from ..verifier.sequence import Sequence
from ..verifier.worker import VerifierWorker

IDLE_POLL_S = 0.5
TIMED_ROUNDS = 4096


class RoundTimer:
    """Durations of recent rounds, in seconds."""

    def __init__(self) -> None:
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=TIMED_ROUNDS))
        self.watching: dict[str, float] | None = None
        """Durations of the round under way, while a front watches."""

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name].append(seconds)
        if self.watching is not None:
            self.watching[name] = seconds

    def report(self, began_s: float, now_s: float, verdict: Verdict, worker: VerifierWorker) -> RoundReport:
        """Of the round that ends now; a new one begins. Only while watching."""
        spent, self.watching = self.watching or {}, {}
        return RoundReport(
            began_s=began_s,
            forward_s=spent.get("forward", 0.0),
            wait_s=spent.get("exchange"),
            draft_s=spent.get("draft"),
            jit_s=spent.get("jit"),
            round_s=now_s - began_s,
            rows=len(verdict.commits),
            lookups=worker.lookups,
            hits=worker.hits,
            tokens=sum(len(commit.tokens) for commit in verdict.commits),
        )

    def take(self, *, reset: bool) -> Timings:
        medians = {
            f"{name}_ms": statistics.median(self._seconds[name]) * 1e3 if self._seconds[name] else None
            for name in ("round", "hit_round", "forward", "draft")
        }
        if reset:
            self._seconds.clear()
        return Timings(**medians)


def verifier_loop(
    worker: VerifierWorker,
    front: ControlLane,
    draft: DraftSide | None,
    rejoin: Rejoin | None = None,
    *,
    alive: Callable[[], bool] = lambda: True,
) -> None:
    """Serve requests from the front until it says shut down or is gone. ``rejoin``: lets another draft in
    when the front says so."""
    if draft is None:
        worker.drafting = False
    timer, teller = RoundTimer(), Teller(front, worker.clock)
    last_end: float | None = None
    while True:
        quiet = worker.idle and not (draft is not None and draft.in_round)
        message = teller.receive(IDLE_POLL_S if quiet else 0)
        while message is not None:
            if isinstance(message, Shutdown):
                if draft is not None:
                    draft.stop()
                return
            if isinstance(message, Reopen) and rejoin is not None:
                draft = _reopen(worker, teller, draft, rejoin, message.epoch)
            _answer(worker, teller, timer, message)
            message = teller.receive(0)
        if not alive():
            return
        if draft is None and rejoin is not None:
            draft = _take_back(worker, teller, rejoin)
        worker.admit()
        told = worker.introduce()
        try:
            for message in told:
                assert draft is not None
                draft.tell(message)
        except PipelineError as error:
            assert draft is not None
            draft = _lose(worker, teller, draft, error)
        # After telling the draft: both prefill side by side, and neither holds up the rows that run for
        # more than a chunk.
        if worker.prefill() or told:
            last_end = None  # prefills are no part of a round
        while worker.refused:
            teller.send(_finished(worker.refused.pop(), "error"))
        if not worker.decoding and not (draft is not None and draft.in_round):
            last_end = None
            continue
        began = worker.clock()
        verdict = worker.verify()
        if verdict.commits:
            timer.add("forward", verdict.forward_s)
        if verdict.drafted_s:
            timer.add("draft", verdict.drafted_s)
        all_hit = False
        try:
            all_hit = _finish_round(worker, teller, draft, verdict, timer)
        except LinkError as error:
            assert draft is not None
            draft = _lose(worker, teller, draft, error)
            worker.advance(verdict, None)
        if not verdict.commits:  # only prompts, or the draft being told that all is over
            last_end = None
            continue
        now = worker.clock()
        if last_end is not None:
            waited_s, draft_s = (draft.take_waited_s(), draft.drafted_s) if draft is not None else (0.0, 0.0)
            worker.observe(verdict, seconds=now - last_end, waited_s=waited_s, draft_s=draft_s)
            if worker.self_draft is not None:
                worker.self_draft.observe(verdict, now - last_end)
            timer.add("round", now - last_end)
            if all_hit:
                timer.add("hit_round", now - last_end)
        elif draft is not None:
            draft.take_waited_s()
        last_end = now
        if timer.watching is not None:
            teller.send(timer.report(began, now, verdict, worker))


def _lose(worker: VerifierWorker, front: Teller, draft: DraftSide, error: PipelineError) -> None:
    """Go on without the draft, and say why."""
    worker.lose_draft()
    draft.link.close()
    front.send(Failed(role="draft", message=str(error), degraded=True, epoch=draft.frames.epoch))


def _reopen(worker: VerifierWorker, front: Teller, draft: DraftSide | None, rejoin: Rejoin, epoch: int) -> None:
    """Await the draft of this epoch; the one before is over."""
    if draft is not None:
        _lose(worker, front, draft, LinkError("another takes its place"))
    try:
        front.send(Hello(role="verifier", rendezvous=rejoin.reopen(epoch).to_dict()))
    except LinkError as error:
        front.send(Failed(role="draft", message=str(error), degraded=True, epoch=epoch))


def _take_back(worker: VerifierWorker, front: Teller, rejoin: Rejoin) -> DraftSide | None:
    """The awaited draft, if it is linked by now. Whatever speculates is introduced to it next."""
    try:
        draft = rejoin.arrived()
    except PipelineError as error:
        front.send(Failed(role="draft", message=str(error), degraded=True, epoch=rejoin.epoch))
        return None
    if draft is not None:
        worker.drafting = True
        front.send(Rejoined(epoch=rejoin.epoch))
    return draft


def _finish_round(
    worker: VerifierWorker, front: Teller, draft: DraftSide | None, verdict: Verdict, timer: RoundTimer
) -> bool:
    """Exchange, look up, report. True if every speculating row hit."""

    def report() -> None:
        _report(front, verdict, worker)

    if draft is None or not draft.in_round:
        worker.advance(verdict, None)
        report()
        return False
    next_ = Next.ROUND if worker.speculating else Next.IDLE
    reported = False

    def meanwhile() -> None:
        nonlocal reported
        reported = True
        report()
        worker.prepare()

    began = worker.clock()
    try:
        speculation, spent_us = draft.exchange(verdict, next_, meanwhile)
    finally:
        if not reported:
            report()
    if verdict.commits:
        timer.add("exchange", worker.clock() - began)
        timer.add("draft", spent_us / 1e6)
    missed = worker.advance(verdict, speculation)
    draft.in_round = next_ is Next.ROUND
    waiting = any(missed)
    if waiting and draft.in_round:
        began = worker.clock()
        worker.fill(missed, *draft.receive_trees())
        timer.add("jit", worker.clock() - began)
    draft.round += 1
    return not waiting and worker.speculating


def _report(front: Teller, verdict: Verdict, worker: VerifierWorker) -> None:
    now, told = worker.clock(), list[Message]()
    for commit in verdict.commits:
        sequence = commit.sequence
        decode_s = now - sequence.started_s
        told.append(
            Committed(
                request=commit.request,
                tokens=commit.tokens,
                accepted=commit.accepted,
                depth=commit.depth,
                drafted=commit.drafted,
                hit=commit.hit,
                origin=commit.origin,
                committed_s=now,
                decode_s=decode_s,
                cached=sequence.reused,
                logprobs=None if commit.logprobs is None else list(commit.logprobs),
            )
        )
        if commit.finished is not None:
            told.append(_finished(sequence, commit.finished, decode_s))
    ends = (commit.finished is not None or commit.sequence.record.rounds == 1 for commit in verdict.commits)
    front.tell(told, at_once=any(ends))


def _finished(sequence: Sequence, reason: FinishReason, decode_s: float = 0.0) -> Finished:
    return Finished(
        request=sequence.request, reason=reason, record=sequence.record, decode_s=decode_s, error=sequence.error
    )


def _answer(worker: VerifierWorker, front: Teller, timer: RoundTimer, message: object) -> None:
    if isinstance(message, Submit):
        worker.submit(message)
    elif isinstance(message, GetTimings):
        front.send(timer.take(reset=message.reset))
    elif isinstance(message, Watch):
        timer.watching = {} if message.on else None
    elif isinstance(message, Cancel):
        row = worker.cancel(message.request)
        record = row.record if row is not None else SpeculationRecord()
        front.send(Finished(request=message.request, reason="cancelled", record=record, decode_s=0.0))
