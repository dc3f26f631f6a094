"""The spine of the project: one turn of ``VerifierLoop.run`` is a round.

The loop moves frames and messages and takes times; ``VerifierWorker`` decides. ``draft_loop`` is the other half.
"""

from __future__ import annotations

from collections.abc import Callable

from ...errors import LinkError, PipelineError
from ...request.output import FinishReason, Origin, SpeculationRecord
from ..round.candidates import CandidateOrigin
from ..round.lookup import Found, lookup
from ..round.round import Round
from ..round.times import RoundTimes, StopWatch, TimeHistory
from ..round.verdict import Commit, Verdict
from ..transport.front_lane import FrontLane
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
from ..verifier.sequence import TargetSequence
from ..verifier.worker import VerifierWorker

IDLE_POLL_S = 0.5
BLOCKED_POLL_S = 0.005
"""While requests wait for their grammars to be compiled."""
ORIGINS: dict[CandidateOrigin, Origin] = {
    "none": "plain",
    "prepared": "hit",
    "jit": "miss",
    "ngram": "miss",
    "self": "miss",
}


class VerifierLoop:
    """Serves the requests of one front.

    Args:
        worker: the verifier.
        front: lane to the front.
        draft: the draft; None if there is none.
        rejoin: lets another draft in when the front says so; None where no draft can come back.
        alive: whether there is still a front to serve.
    """

    def __init__(
        self,
        worker: VerifierWorker,
        front: ControlLane,
        draft: DraftSide | None = None,
        rejoin: Rejoin | None = None,
        *,
        alive: Callable[[], bool] = lambda: True,
    ):
        self._worker, self._front = worker, FrontLane(front, worker.clock)
        self._draft, self._rejoin, self._alive = draft, rejoin, alive
        self._round = Round.empty(worker.runner.batch)
        self._history, self._watched = TimeHistory(), False
        self._last_end_s: float | None = None
        """When the last round ended; None if something else, such as a prefill, came after it."""

    def run(self) -> None:
        """Run rounds until the front says shut down or is gone."""
        worker = self._worker
        while self._serve_messages() and self._alive():
            self._take_back_draft()
            self._begin()
            prefilled = worker.prefill()
            if prefilled.computed or self._round.introduced:
                self._last_end_s = None
            if prefilled.scored is not None:
                self._front.send(prefilled.scored)
            for row in prefilled.ended:
                self._front.send(_finished(row, "length" if row.error is None else "error"))
            if worker.slots.decoding or self._drafting:
                self._run_round()
            else:
                self._last_end_s = None

    @property
    def _drafting(self) -> bool:
        """Whether the draft is in a round, and waits for an exchange."""
        return self._draft is not None and self._draft.in_round

    def _serve_messages(self) -> bool:
        """Take in what the front says; while there is nothing to do, wait for it. False: shut down."""
        slots, wait_s = self._worker.slots, 0.0
        if not self._drafting and (slots.idle or slots.blocked):
            wait_s = IDLE_POLL_S if slots.idle else BLOCKED_POLL_S
        message = self._front.receive(wait_s)
        while message is not None:
            if isinstance(message, Shutdown):
                if self._draft is not None:
                    self._draft.stop()
                return False
            self._answer(message)
            message = self._front.receive(0)
        return True

    def _answer(self, message: Message) -> None:
        if isinstance(message, Submit):
            self._worker.submit(message)
        elif isinstance(message, GetTimings):
            self._front.send(Timings(**self._history.medians_ms(reset=message.reset)))
        elif isinstance(message, Watch):
            self._watched = message.on
        elif isinstance(message, Cancel):
            row = self._worker.cancel(message.request)
            record = row.record if row is not None else SpeculationRecord()
            self._front.send(Finished(request=message.request, reason="cancelled", record=record, decode_s=0.0))
        elif isinstance(message, Reopen) and self._rejoin is not None:
            self._reopen(self._rejoin, message.epoch)

    def _begin(self) -> None:
        """Decide the roles of the next round, and tell the draft of sequences that it does not know. It prefills them
        beside us."""
        worker, draft = self._worker, self._draft
        self._round = worker.begin(self._round, None if draft is None else draft.known)
        if draft is None:
            return
        try:
            draft.introduce(worker.introductions(self._round), worker.known(self._round.roles))
        except PipelineError as error:
            self._lose_draft(draft, error)
            self._round = worker.begin(self._round, None)

    def _run_round(self) -> None:
        worker, watch, times = self._worker, StopWatch(self._worker.clock), RoundTimes()
        verdict = worker.verify(self._round)
        watch.lap()
        times.forward_s, times.draft_s = verdict.forward_s, verdict.self_draft_s or None
        found = self._exchange(verdict, watch, times)
        following = worker.advance(self._round, verdict, found)
        if following.waiting:
            following = self._draft_on_demand(following, watch, times)
        self._round = following
        if not verdict.commits:  # only prompts, or the draft learns that all is over
            self._last_end_s = None
            return
        watch.lap()
        last_end_s, self._last_end_s = self._last_end_s, watch.now_s
        round_s = None if last_end_s is None else watch.now_s - last_end_s
        if round_s is not None:
            worker.observe(following, verdict, times, round_s, drafting=self._draft is not None)
        self._history.add(times, round_s=round_s, all_hit=following.all_prepared)
        if self._watched:
            self._front.send(_round_report(watch, verdict, following, times))

    def _exchange(self, verdict: Verdict, watch: StopWatch, times: RoundTimes) -> Found | None:
        """Exchange outcomes for the speculation set and look them up. The front is told meanwhile, and the next noise
        is made. None: no draft took part."""
        draft = self._draft
        if draft is None or not draft.in_round:
            self._report(verdict)
            return None
        pending, lost = None, None
        try:
            pending = draft.post(verdict)
        except PipelineError as error:
            lost = error
        posting_s = watch.lap()
        self._report(verdict)
        self._worker.prepare()
        busy_s = watch.lap()
        try:
            if pending is not None:
                speculation, times.draft_s = draft.finish(pending)
                times.waited_s = posting_s + watch.lap()
                times.exchange_s = busy_s + times.waited_s
                return lookup(verdict.nodes, verdict.bonus, speculation)
        except PipelineError as error:
            lost = error
        if lost is not None:
            self._lose_draft(draft, lost)
        return None

    def _draft_on_demand(self, following: Round, watch: StopWatch, times: RoundTimes) -> Round:
        """Wait for the candidates of the rows that missed."""
        draft = self._draft
        if draft is None or not draft.in_round:
            return following
        watch.lap()
        try:
            trees, drafted_from = draft.receive_trees()
        except LinkError as error:
            self._lose_draft(draft, error)
            return following
        times.jit_s = watch.lap()
        times.waited_s += times.jit_s
        return self._worker.fill(following, trees, drafted_from, times.jit_s)

    def _lose_draft(self, draft: DraftSide, error: PipelineError) -> None:
        """Go on without the draft, and tell the front why. Tokens never depend on the draft: only speed is lost."""
        self._draft = None
        draft.link.close()
        self._front.send(Failed(role="draft", message=str(error), degraded=True, epoch=draft.frames.epoch))

    def _reopen(self, rejoin: Rejoin, epoch: int) -> None:
        """Await the draft of this epoch in place of the one before."""
        if self._draft is not None:
            self._lose_draft(self._draft, LinkError("another takes its place"))
        try:
            self._front.send(Hello(role="verifier", rendezvous=rejoin.reopen(epoch).to_dict()))
        except LinkError as error:
            self._front.send(Failed(role="draft", message=str(error), degraded=True, epoch=epoch))

    def _take_back_draft(self) -> None:
        """Let the awaited draft in, if it is linked by now. It learns of all sequences that speculate next."""
        if self._draft is not None or self._rejoin is None:
            return
        try:
            self._draft = self._rejoin.arrived()
        except PipelineError as error:
            epoch = self._rejoin.epoch
            self._front.send(Failed(role="draft", message=str(error), degraded=True, epoch=epoch))
        if self._draft is not None:
            self._front.send(Rejoined(epoch=self._rejoin.epoch))

    def _report(self, verdict: Verdict) -> None:
        """Tell the front what became certain."""
        now_s, messages = self._worker.clock(), list[Message]()
        for commit in verdict.commits:
            messages.append(_committed(commit, now_s))
            if commit.finished is not None:
                messages.append(
                    Finished(
                        request=commit.request,
                        reason=commit.finished,
                        record=commit.record,
                        decode_s=now_s - commit.started_s,
                        error=commit.error,
                    )
                )
        awaited = (commit.finished is not None or commit.record.rounds == 1 for commit in verdict.commits)
        self._front.tell(messages, at_once=any(awaited))


def _committed(commit: Commit, now_s: float) -> Committed:
    return Committed(
        request=commit.request,
        tokens=commit.tokens,
        accepted=commit.accepted,
        depth=commit.depth,
        drafted=commit.drafted,
        hit=commit.hit,
        origin=ORIGINS[commit.origin],
        committed_s=now_s,
        decode_s=now_s - commit.started_s,
        cached=commit.cached,
        logprobs=None if commit.logprobs is None else list(commit.logprobs),
    )


def _finished(sequence: TargetSequence, reason: FinishReason) -> Finished:
    return Finished(request=sequence.request, reason=reason, record=sequence.record, decode_s=0.0, error=sequence.error)


def _round_report(watch: StopWatch, verdict: Verdict, following: Round, times: RoundTimes) -> RoundReport:
    return RoundReport(
        began_s=watch.began_s,
        forward_s=times.forward_s,
        wait_s=times.exchange_s,
        draft_s=times.draft_s,
        jit_s=times.jit_s,
        round_s=watch.elapsed_s,
        rows=len(verdict.commits),
        lookups=following.lookups,
        hits=following.hits,
        tokens=sum(len(commit.tokens) for commit in verdict.commits),
    )
