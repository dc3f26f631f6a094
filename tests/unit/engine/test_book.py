"""The book of requests: its table, and that nothing is lost or doubled whatever happens when."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ssd.engine.book import Limits, RequestBook, Step
from ssd.engine.detokenize import Detokenizer, StopRules
from ssd.engine.fair_queue import FairQueue
from ssd.engine.request import TRANSITIONS, Caller, Input, PromptTokens, Request, State
from ssd.engine.token_text import TokenTexts
from ssd.errors import OverloadedError, PipelineError
from ssd.pipeline.transport.messages import Cancel, Committed, Finished, Submit
from ssd.request.output import SpeculationRecord, StreamEvent
from ssd.request.sampling_params import SamplingParams


class Letters:
    """A tokenizer: token n is the n-th letter."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(map(self.convert_ids_to_tokens, token_ids))

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(97 + token % 26)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def request(
    number: int, *, client: str = "", stop: tuple[str, ...] = (), max_tokens: int = 12, priority: int = 0
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, stop=stop)
    return Request(
        number=number,
        prompt=PromptTokens(text="p", token_ids=(1, 2)),
        params=params,
        detokenizer=Detokenizer(TokenTexts(Letters()).stream(), StopRules.of(params)),
        context_limit=64,
        caller=Caller(client=client, priority=priority),
    )


class FakeVerifier:
    """Decodes token 7 + position for every request, in rounds of any length; answers a cancel of a
    request it does not know, as the real one does."""

    def __init__(self) -> None:
        self.inbox: deque[Submit | Cancel] = deque()
        self.outbox: deque[Committed | Finished] = deque()
        self.running: dict[int, tuple[SamplingParams, int]] = {}
        self.frees: dict[int, int] = {}

    def read(self) -> None:
        """Take in one message."""
        message = self.inbox.popleft()
        if isinstance(message, Submit):
            assert message.request not in self.running
            self.running[message.request] = message.params, 0
        else:
            self.running.pop(message.request, None)
            self.outbox.append(
                Finished(request=message.request, reason="cancelled", record=SpeculationRecord(), decode_s=0.0)
            )

    def decode(self, number: int, count: int, accepted: int) -> None:
        params, done = self.running[number]
        tokens = [7 + done + i for i in range(min(count, params.max_tokens - done))]
        accepted = min(accepted, len(tokens))
        drafted = max(accepted, 1)
        self.outbox.append(Committed(request=number, tokens=tokens, accepted=accepted, drafted=drafted, origin="hit"))
        done += len(tokens)
        self.running[number] = params, done
        if done == params.max_tokens:
            del self.running[number]
            self.outbox.append(
                Finished(request=number, reason="length", record=SpeculationRecord(tokens=done), decode_s=0.1)
            )


class Traffic(RuleBasedStateMachine):
    """Adds, cancels, decodes and delivers in any order."""

    @initialize(
        sent=st.sampled_from([None, 1, 3]), queue=st.sampled_from([None, 2]), tokens=st.sampled_from([None, 50])
    )
    def start(self, sent: int | None, queue: int | None, tokens: int | None) -> None:
        self.book = RequestBook(Limits(sent=sent, queue=queue, tokens=tokens))
        self.verifier = FakeVerifier()
        self.requests: dict[int, Request] = {}
        self.events: dict[int, list[StreamEvent]] = {}
        self.cancelled: set[int] = set()
        self.refused = 0

    def perform(self, step: Step) -> None:
        for owner, event in step.events:
            self.events[owner.number].append(event)
        assert all(role == "verifier" for role, _ in step.send)
        self.verifier.inbox.extend(message for _, message in step.send)  # type: ignore[misc]
        # Whoever went ahead had no lower value among those left behind.
        waiting = [r.priority for r in self.book.live.values() if r.state is State.QUEUED]
        sent = [self.requests[m.request].priority for _, m in step.send if isinstance(m, Submit)]
        assert not waiting or all(priority <= min(waiting) for priority in sent)

    @rule(
        client=st.sampled_from("ab"),
        stop=st.sampled_from([(), ("lm",), ("j", "hij")]),
        length=st.integers(1, 9),
        priority=st.integers(-1, 1),
    )
    def add(self, client: str, stop: tuple[str, ...], length: int, priority: int) -> None:
        number = len(self.requests) + self.refused
        new = request(number, client=client, stop=stop, max_tokens=length, priority=priority)
        before = self.book.queued, self.book.sent, self.book.tokens
        try:
            step = self.book.add([new])
        except OverloadedError:
            self.refused += 1
            assert (self.book.queued, self.book.sent, self.book.tokens) == before
            return
        self.requests[number], self.events[number] = new, []
        self.perform(step)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.requests)))
        if self.requests[number].state in (State.QUEUED, State.SENT, State.DECODING):
            self.cancelled.add(number)
        self.perform(self.book.cancel([number]))

    @precondition(lambda self: self.verifier.inbox)
    @rule()
    def verifier_reads(self) -> None:
        self.verifier.read()

    @precondition(lambda self: self.verifier.running)
    @rule(data=st.data(), count=st.integers(1, 4), accepted=st.integers(0, 4))
    def verifier_decodes(self, data: st.DataObject, count: int, accepted: int) -> None:
        self.verifier.decode(data.draw(st.sampled_from(sorted(self.verifier.running))), count, accepted)

    @precondition(lambda self: self.verifier.outbox)
    @rule()
    def deliver(self) -> None:
        self.perform(self.book.handle(self.verifier.outbox.popleft()))

    @invariant()
    def limits_hold(self) -> None:
        if not hasattr(self, "book"):
            return
        limits = self.book.limits
        assert limits.sent is None or self.book.sent <= limits.sent
        assert limits.queue is None or self.book.queued <= limits.queue
        assert limits.tokens is None or self.book.tokens <= limits.tokens
        assert self.book.tokens == sum(r.cost for r in self.book.live.values())
        waiting = sum(r.state is State.QUEUED for r in self.book.live.values())
        assert waiting == self.book.queued
        # Nobody waits while there is room.
        assert not waiting or self.book.sent == limits.sent

    def teardown(self) -> None:
        if not hasattr(self, "book"):
            return
        while self.verifier.inbox or self.verifier.running or self.verifier.outbox:
            if self.verifier.inbox:
                self.verifier.read()
            elif self.verifier.running:
                self.verifier.decode(next(iter(self.verifier.running)), 3, 2)
            else:
                self.deliver()
        assert not self.book.live
        assert self.book.tokens == self.book.queued == self.book.sent == 0
        for number, mine in self.requests.items():
            self.check(mine, self.events[number], cancelled=number in self.cancelled)

    def check(self, mine: Request, events: list[StreamEvent], *, cancelled: bool) -> None:
        outputs = [event.output for event in events if event.output is not None]
        assert mine.state is State.DONE
        assert len(outputs) == 1 and events[-1].output is outputs[0]  # one last event, and it is the last
        tokens = [token for event in events for token in event.token_ids]
        assert tokens == [7 + i for i in range(len(tokens))]  # none lost, none doubled, in order
        assert tuple(tokens) == outputs[0].token_ids
        assert "".join(event.text for event in events) == outputs[0].text
        for event in events:
            assert len(event.pieces) == len(event.provenance) == len(event.token_ids)
            assert [p == "hit" for p in event.provenance].count(True) == event.accepted
        if cancelled:
            assert outputs[0].finish_reason == "cancelled"
            return
        whole = "".join(chr(97 + (7 + i) % 26) for i in range(mine.params.max_tokens))
        cuts = [at for stop in mine.params.stop if (at := whole.find(stop)) >= 0]
        assert outputs[0].text == whole[: min(cuts)] if cuts else whole
        assert outputs[0].finish_reason == ("stop" if cuts else "length")


Traffic.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestTraffic = Traffic.TestCase


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("what", list(Input))
def test_what_is_not_in_the_table_is_out_of_turn(state: State, what: Input) -> None:
    mine = request(3)
    mine.state = state
    if (state, what) in TRANSITIONS:
        mine.move(what)
        assert mine.state is TRANSITIONS[state, what]
    else:
        with pytest.raises(PipelineError, match=r"request 3 is .* out of turn"):
            mine.move(what)


def test_every_state_is_reached_and_left() -> None:
    assert {state for state, _ in TRANSITIONS} == set(State) - {State.DONE}
    assert set(TRANSITIONS.values()) == set(State) - {State.QUEUED}


def test_tokens_for_a_request_the_verifier_does_not_have() -> None:
    book = RequestBook(Limits(sent=1))
    book.add([request(0)])
    book.add([request(1)])
    with pytest.raises(PipelineError, match="request 1 is queued"):
        book.handle(Committed(request=1, tokens=[7], accepted=0))


def test_failing_forgets_everything() -> None:
    book = RequestBook(Limits(sent=1))
    for number in range(3):
        book.add([request(number)])
    assert [lost.number for lost in book.fail()] == [0, 1, 2]
    assert not book.live and book.tokens == book.queued == book.sent == 0
    assert book.handle(Committed(request=0, tokens=[7], accepted=0)) == Step()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans())))
def test_clients_take_turns(moves: list[tuple[str, bool]]) -> None:
    queue, pushed, popped = FairQueue(), {client: deque() for client in "abc"}, Counter()
    for number, (client, pop) in enumerate(moves):
        queue.push(client, number)
        pushed[client].append(number)
        if pop:
            waiting = [name for name in "abc" if pushed[name]]
            got = queue.pop()
            owner = next(name for name in waiting if pushed[name][0] == got)  # in order within a client
            pushed[owner].popleft()
            popped[owner] += 1
    assert len(queue) == sum(map(len, pushed.values()))
    rest = []
    while len(queue):
        got = queue.pop()
        rest.append(next(name for name in "abc" if pushed[name] and pushed[name][0] == got))
        pushed[rest[-1]].popleft()
    # While several clients wait, nobody is served twice before all were served once.
    for index in range(len(rest) - 1):
        assert rest[index] != rest[index + 1] or len(set(rest[index:])) == 1
    with pytest.raises(IndexError):
        queue.pop()


@given(st.lists(st.tuples(st.integers(-2, 2), st.sampled_from("ab"), st.sampled_from(["push", "pop", "remove"]))))
def test_lowest_priority_first_in_order_within_a_client(moves: list[tuple[int, str, str]]) -> None:
    queue, waiting = FairQueue(), list[tuple[int, str, int]]()
    for number, (priority, client, what) in enumerate(moves):
        if what == "push" or not waiting:
            queue.push(client, number, priority)
            waiting.append((priority, client, number))
        elif what == "remove":
            level, owner, gone = waiting.pop(number % len(waiting))
            queue.remove(owner, gone, level)
        else:
            got = queue.pop()
            [mine] = [entry for entry in waiting if entry[2] == got]
            assert mine[0] == min(entry[0] for entry in waiting)
            assert got == min(entry[2] for entry in waiting if entry[:2] == mine[:2])
            waiting.remove(mine)
        assert len(queue) == len(waiting)
