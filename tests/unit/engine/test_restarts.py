"""A lost draft comes back: when it is tried, and that rounds go on with the same tokens meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from ssd import LLM, SamplingParams
from ssd.engine.async_engine import AsyncEngine
from ssd.engine.request import Request
from ssd.engine.restarts import STEADY_S, DraftRestarts, News
from ssd.errors import LinkError, WorkerError
from ssd.pipeline.draft.worker import DraftWorker
from ssd.pipeline.round.frames import Frames, SpeculationSet
from ssd.pipeline.round.round import Round
from ssd.pipeline.round.verdict import Verdict
from ssd.pipeline.runtime import build_draft as draft_building
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.transport.messages import RoundReport
from ssd.pipeline.transport.rendezvous import VerifierSide, draft_side
from ssd.pipeline.verifier.draft_side import Rejoin
from ssd.pipeline.verifier.worker import VerifierWorker
from ssd.request.output import StreamEvent

Configure = Callable[..., dict[str, Any]]

SOON_S = 60.0
PROMPT = list(range(20, 60))
LONG = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.8, seed=3)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def restarts(clock: Clock) -> DraftRestarts:
    return DraftRestarts(limit=2, delay_s=1.0, start_s=30.0, clock=clock)


def test_each_try_waits_twice_as_long_until_the_last(clock: Clock) -> None:
    news: list[str] = []
    restarts = DraftRestarts(limit=2, delay_s=1.0, start_s=30.0, tell=news.append, clock=clock)
    for number, delay_s in ((1, 1.0), (2, 2.0)):
        restarts.lost("it died\nhere")
        restarts.lost("the same again")
        assert restarts.pending
        assert restarts.degraded == f"it died\nhere (restart {number} of 2 is under way)"
        clock.now += 0.99 * delay_s
        assert not restarts.due()
        clock.now += 0.02 * delay_s
        assert restarts.due()
        assert not restarts.due()
        assert restarts.epoch == number
    restarts.lost("for good")
    restarts.lost("the same again")
    assert restarts.degraded == "for good (not restarted again: engine.draft_restarts=2)"
    assert not restarts.pending
    clock.now += 1e6
    assert not restarts.due()
    assert news == ["lost", "restarting"] * 2 + ["given_up"]


def test_what_is_of_another_epoch_does_not_count(restarts: DraftRestarts, clock: Clock) -> None:
    restarts.lost("broken link", epoch=0)
    clock.now += 1
    assert restarts.due()
    restarts.lost("the verifier hears late of the first loss", epoch=0)
    restarts.back(0)
    assert restarts.state == "starting"
    restarts.back(1)
    assert restarts.degraded is None
    restarts.lost("late", epoch=0)
    assert restarts.degraded is None


def test_a_try_that_takes_too_long_is_the_next_loss(restarts: DraftRestarts, clock: Clock) -> None:
    restarts.lost("it died")
    clock.now += 1
    assert restarts.due()
    clock.now += 29.9
    assert not restarts.due()
    assert restarts.state == "starting"
    clock.now += 0.1
    assert not restarts.due()
    assert "not ready in 30 s" in str(restarts.degraded)
    clock.now += 2
    assert restarts.due()
    assert restarts.epoch == 2


def test_a_draft_that_stays_starts_the_count_anew(restarts: DraftRestarts, clock: Clock) -> None:
    for _ in range(4):
        restarts.lost("it died")
        clock.now += 1
        assert restarts.due()
        restarts.back(restarts.epoch)
        clock.now += STEADY_S
    restarts.lost("it died")
    clock.now += 1
    assert restarts.due()
    restarts.back(restarts.epoch)
    restarts.lost("at once")
    assert restarts.tries == 1 and restarts.pending


def test_none_allowed(clock: Clock) -> None:
    restarts = DraftRestarts(limit=0, delay_s=1.0, start_s=1.0, clock=clock)
    restarts.lost("it died")
    assert restarts.degraded == "it died"
    assert not restarts.pending and not restarts.due()


# A whole pipeline in this process.


@pytest.fixture
def config(tiny_config: Configure) -> dict[str, Any]:
    return tiny_config(
        engine={"max_batch": 2, "max_model_len": 480, "draft_restart_delay_s": 0.05, "link_timeout_s": 5.0},
        speculation={"siblings": 1, "forecast": {"budget": 10}},
    )


class Breaking:
    """Drafts that break in the round they are told to, whichever of them it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.rounds: list[int] = []
        """Of each draft, in the order they came."""
        self.now = threading.Event()
        self.how: Callable[[], object] = lambda: 1 / 0
        self.plain_round_s = 0.0
        """What a round without a draft takes longer."""
        speculate = DraftWorker.speculate
        made = DraftWorker.__init__

        def init(worker: DraftWorker, *args: Any, **more: Any) -> None:
            made(worker, *args, **more)
            worker.number = len(self.rounds)  # type: ignore[attr-defined]
            self.rounds.append(0)

        def breaking(worker: DraftWorker, *given: Any, **more: Any) -> SpeculationSet:
            self.rounds[worker.number] += 1  # type: ignore[attr-defined]
            if self.now.is_set():
                self.now.clear()
                self.how()
            return speculate(worker, *given, **more)

        verify = VerifierWorker.verify

        def slowed(worker: VerifierWorker, round: Round) -> Verdict:
            if not any(map(round.roles.speculates, range(len(round.roles.arms)))):
                time.sleep(self.plain_round_s)
            return verify(worker, round)

        monkeypatch.setattr(VerifierWorker, "verify", slowed)
        monkeypatch.setattr(DraftWorker, "__init__", init)
        monkeypatch.setattr(DraftWorker, "speculate", breaking)


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Breaking:
    return Breaking(monkeypatch)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + SOON_S
    while left := {thread for thread in threading.enumerate() if thread.name.startswith("ssd-")} - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def answers(llm: LLM, method: str, **more: Any) -> tuple[int, ...]:
    return llm.generate([PROMPT], replace(LONG, method=method, **more))[0].token_ids


def until_back(llm: LLM) -> None:
    """Requests run until the draft is there again."""
    deadline = time.monotonic() + SOON_S
    while llm.degraded:
        assert time.monotonic() < deadline, llm.degraded
        answers(llm, "ssd", max_tokens=8)


def test_an_answer_that_outlives_its_draft_speculates_again(config: dict[str, Any], breaking: Breaking) -> None:
    """Decoding goes on meanwhile. The running row is introduced to the new draft, which computes the keys
    of its tokens by itself."""
    params = replace(LONG, max_tokens=400)
    with LLM(config, launch=InprocPipeline) as llm:
        expected = answers(llm, "none", max_tokens=400)
        got, meanwhile, accepted_after = [], 0, 0
        breaking.plain_round_s = 0.05  # so that the answer lasts until the draft is back
        breaking.now.set()
        lost = False
        for event in llm.stream(PROMPT, replace(params, method="ssd")):
            got += event.token_ids
            lost = lost or llm.degraded is not None
            meanwhile += llm.degraded is not None
            accepted_after += event.accepted if lost and not llm.degraded else 0
        assert tuple(got) == expected
        assert lost and meanwhile
        assert llm.degraded is None, "the answer was over before the draft was back"
        assert accepted_after > 0
        assert len(breaking.rounds) == 2
        output = llm.generate([PROMPT], replace(LONG, method="ssd"))[0]
        assert output.token_ids == expected[: LONG.max_tokens]
        assert output.speculation.hits > 0


def test_too_slow_is_lost_too(config: dict[str, Any], breaking: Breaking) -> None:
    config["engine"]["link_timeout_s"] = 3.0
    released = threading.Event()
    breaking.how = lambda: released.wait(SOON_S)
    with LLM(config, launch=InprocPipeline) as llm:
        expected = answers(llm, "none")
        breaking.now.set()
        assert answers(llm, "ssd") == expected
        until_back(llm)
        assert answers(llm, "ssd") == expected
        assert breaking.rounds[1] > 0
        released.set()  # it finds its link closed


def test_in_the_end_it_stays_plain(config: dict[str, Any], breaking: Breaking) -> None:
    config["engine"]["draft_restarts"] = 2
    with LLM(config, launch=InprocPipeline) as llm:
        expected = answers(llm, "none")
        for _ in range(2):
            breaking.now.set()
            assert answers(llm, "ssd") == expected
            until_back(llm)
        breaking.now.set()
        assert answers(llm, "ssd") == expected
        assert str(llm.degraded).endswith("(not restarted again: engine.draft_restarts=2)")
        assert answers(llm, "ssd") == expected
        assert len(breaking.rounds) == 3


def test_a_draft_that_cannot_be_started(config: dict[str, Any], breaking: Breaking) -> None:
    config["engine"]["draft_restarts"] = 2

    class Poor(InprocPipeline):
        tried = 0

        def restart(self, role: str) -> None:
            Poor.tried += 1
            raise WorkerError("no process left")

    with LLM(config, launch=Poor) as llm:
        expected = answers(llm, "none")
        breaking.now.set()
        deadline = time.monotonic() + SOON_S
        while Poor.tried < 2 or llm._front.restarting:
            assert answers(llm, "ssd", max_tokens=20) == expected[:20]
            assert time.monotonic() < deadline
        assert llm.degraded == "no process left (not restarted again: engine.draft_restarts=2)"


def test_closing_while_it_is_restarted(config: dict[str, Any], breaking: Breaking, monkeypatch: Any) -> None:
    building, go_on = threading.Event(), threading.Event()
    build_draft = draft_building.build_draft

    def slow(*args: Any) -> Any:
        if breaking.rounds:
            building.set()
            go_on.wait(SOON_S)
        return build_draft(*args)

    monkeypatch.setattr(draft_building, "build_draft", slow)
    llm = LLM(config, launch=InprocPipeline)
    breaking.now.set()
    breaking.plain_round_s = 0.05
    for _ in llm.stream(PROMPT, replace(LONG, method="ssd", max_tokens=400)):
        if building.is_set():
            break
    assert building.is_set()
    threading.Timer(0.5, go_on.set).start()
    llm.close()


def test_a_draft_of_an_old_epoch_is_not_let_in(config: dict[str, Any]) -> None:
    """It knows the former lane and the former link, and finds nobody at either."""
    side = VerifierSide(timeout_s=20.0)
    old = side.rendezvous
    rejoin = Rejoin(side, lambda epoch: Frames(batch=1, branches=1, nodes=2, epoch=epoch))
    failures: list[LinkError] = []
    linked = threading.Event()

    def come(rendezvous: Any, timeout_s: float) -> None:
        try:
            link, lane = draft_side(rendezvous, timeout_s=timeout_s)
            linked.set()
            link.close()
            lane.close()
        except LinkError as error:
            failures.append(error)

    try:
        new = rejoin.reopen(1)
        assert (new.epoch, new.port) == (1, old.port) and new.lane != old.lane
        late = threading.Thread(target=come, args=(old, 1.0))
        late.start()
        late.join(SOON_S)
        assert rejoin.arrived() is None and len(failures) == 1
        threading.Thread(target=come, args=(new, 20.0)).start()
        deadline = time.monotonic() + SOON_S
        while (draft := rejoin.arrived()) is None:
            assert time.monotonic() < deadline
        assert linked.wait(SOON_S) and draft.frames.epoch == 1
        draft.link.close()
        assert rejoin.arrived() is None
    finally:
        rejoin.close()
        side.close()


class Listening:
    """An observer that keeps the draft's news."""

    def __init__(self) -> None:
        self.news: list[str] = []

    def event(self, request: Request, event: StreamEvent) -> None:
        return

    def round(self, report: RoundReport) -> None:
        return

    def draft(self, news: News) -> None:
        self.news.append(news)


def test_an_engine_restarts_it_while_nobody_asks(config: dict[str, Any], breaking: Breaking) -> None:
    """``AsyncEngine`` watches by itself, and tells what happens; closing while a draft comes is clean."""
    params = replace(LONG, method="ssd")

    async def body() -> None:
        observer = Listening()
        news = observer.news
        engine = AsyncEngine(config, launch=InprocPipeline, observer=observer)
        async with engine:
            expected = (await engine.generate(PROMPT, replace(LONG, method="none"))).token_ids
            breaking.now.set()
            assert (await engine.generate(PROMPT, params)).token_ids == expected
            async with asyncio.timeout(SOON_S):
                while news != ["lost", "restarting", "back"]:
                    await asyncio.sleep(0.01)
            assert engine.degraded is None and not engine.restarting
            output = await engine.generate(PROMPT, params)
            assert output.token_ids == expected and output.speculation.hits > 0
            breaking.now.set()
            await engine.generate(PROMPT, params)
            async with asyncio.timeout(SOON_S):
                while news[3:5] != ["lost", "restarting"]:
                    await asyncio.sleep(0.01)

    asyncio.run(body())
