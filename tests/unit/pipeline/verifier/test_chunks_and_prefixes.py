"""Chunked prefill between rounds, and prefix caching: nobody waits longer than a chunk, and every
token is what it would have been alone and without a cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd import LLM, SamplingParams
from ssd.config.load import load_config
from ssd.decoding.text.prefix import common_prefix
from ssd.decoding.trees.shape import ABSENT
from ssd.engine.front import make_plan
from ssd.pipeline.round.round import Round
from ssd.pipeline.runtime.build_draft import build_draft
from ssd.pipeline.runtime.build_verifier import build_verifier
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.runtime.plan import Plan
from ssd.pipeline.runtime.verifier_loop import VerifierLoop
from ssd.pipeline.transport import front_lane
from ssd.pipeline.transport.messages import Admit, Cancel, Committed, Finished, Message, Shutdown, Submit
from ssd.pipeline.verifier.prompts import PrefixCache
from ssd.pipeline.verifier.worker import VerifierWorker
from ssd.testing.twins.rounds import play

Configure = Callable[..., dict[str, Any]]
CHUNK = 16  # of tiny_config
LONG = 5 * CHUNK + 7
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
WARM = replace(GREEDY, temperature=0.9, seed=3)


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(4, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def plan_of(config: dict[str, Any]) -> Plan:
    return make_plan(load_config(config))[1]


class Script:
    """A front that says its lines when it is time, and hears what the verifier says, in one thread."""

    def __init__(self, lines: list[tuple[Callable[[list[Any]], bool], Message]]):
        self.lines, self.log = lines, list[Any]()

    def receive(self, timeout_s: float) -> Message | None:
        if self.lines and self.lines[0][0](self.log):
            return self.lines.pop(0)[1]
        assert not timeout_s or self.lines, "the verifier idles, and nothing is left to say"
        return None

    def send(self, message: Message, *, more: bool = False) -> None:
        self.log.append(message)

    def close(self) -> None:
        return

    def tokens(self, request: int) -> list[int]:
        return [t for m in self.log if isinstance(m, Committed) and m.request == request for t in m.tokens]


def perform(worker: VerifierWorker, script: Script) -> None:
    """The real loop, with chunks among the messages."""
    compute = worker.runner.prefill

    def prefill(slot: int, tokens: list[int], start: int = 0) -> None:
        script.log.append(("chunk", slot, start, len(tokens)))
        compute(slot, tokens, start=start)

    worker.runner.prefill = prefill  # type: ignore[method-assign]
    VerifierLoop(worker, script).run()


def committed(request: int, rounds: int) -> Callable[[list[Any]], bool]:
    return lambda log: sum(isinstance(m, Committed) and m.request == request for m in log) >= rounds


def finished(*requests: int) -> Callable[[list[Any]], bool]:
    return lambda log: {m.request for m in log if isinstance(m, Finished)} >= set(requests)


def test_running_rows_get_a_round_between_two_chunks(tiny_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_lane, "TELL_S", 0.0)  # every round is told of at once
    plan = plan_of(tiny_config(draft=None, speculation={"method": "none"}, engine={"max_batch": 3}))
    asked = {0: ids(5), 1: ids(LONG, seed=1), 2: ids(2 * CHUNK, seed=2)}
    alone = {}
    for request, prompt in asked.items():
        script = Script([(lambda _: True, Submit(request=0, prompt=prompt, params=WARM)), (finished(0), Shutdown())])
        perform(build_verifier(plan)[0], script)
        alone[request] = script.tokens(0)
    script = Script(
        [
            (lambda _: True, Submit(request=0, prompt=asked[0], params=WARM)),
            (committed(0, 3), Submit(request=1, prompt=asked[1], params=WARM)),
            (lambda log: ("chunk", 1, CHUNK, CHUNK) in log, Submit(request=2, prompt=asked[2], params=WARM)),
            (finished(0, 1, 2), Shutdown()),
        ]
    )
    perform(build_verifier(plan)[0], script)
    chunks = [i for i, entry in enumerate(script.log) if isinstance(entry, tuple) and entry[1] != 0]
    assert len(chunks) == 6 + 2
    for before, after in itertools.pairwise(chunks):
        between = [m.request for m in script.log[before:after] if isinstance(m, Committed)]
        assert between.count(0) == 1
    # First come, first served; the widths are those of a prompt that is alone.
    whole = [("chunk", 1, start, CHUNK) for start in range(0, 5 * CHUNK, CHUNK)] + [("chunk", 1, 5 * CHUNK, 6)]
    assert [script.log[i] for i in chunks] == [*whole, ("chunk", 2, 0, CHUNK), ("chunk", 2, CHUNK, CHUNK - 1)]
    assert {request: script.tokens(request) for request in asked} == alone


def test_a_prompt_cancelled_between_chunks_leaves_its_slot(tiny_config: Configure) -> None:
    plan = plan_of(tiny_config(draft=None, speculation={"method": "none"}, engine={"max_batch": 1}))
    script = Script(
        [
            (lambda _: True, Submit(request=0, prompt=ids(LONG), params=GREEDY)),
            (lambda log: len(log) == 2, Cancel(request=0)),
            (finished(0), Submit(request=1, prompt=ids(3 * CHUNK), params=GREEDY)),
            (finished(1), Shutdown()),
        ]
    )
    worker, _ = build_verifier(plan)
    perform(worker, script)
    assert script.log[2].reason == "cancelled"
    # What was computed for it serves the next one, which begins alike.
    assert [entry for entry in script.log[3:] if isinstance(entry, tuple)] == [("chunk", 0, 2 * CHUNK, CHUNK - 1)]
    assert next(m.cached for m in script.log if isinstance(m, Committed)) == 2 * CHUNK


def test_the_draft_computes_one_chunk_a_round(tiny_config: Configure) -> None:
    plan = plan_of(tiny_config(engine={"max_batch": 2}))
    verifier, draft = build_verifier(plan)[0], build_draft(plan)[0]
    counted, compute = [], draft.runner.prefill

    def prefill(slot: int, tokens: list[int], start: int = 0) -> None:
        counted.append((slot, len(tokens)))
        compute(slot, tokens, start=start)

    draft.runner.prefill = prefill  # type: ignore[method-assign]
    prompt = ids(9)
    draft.admit(Admit(slot=0, tokens=prompt, params=GREEDY, forecasts=True))
    assert (draft.speculate().guesses[0] != ABSENT).all()
    counted.clear()
    draft.admit(Admit(slot=1, tokens=ids(LONG, seed=1), params=GREEDY, forecasts=True))
    waits = [True, True]
    for chunk in range(6):
        draft._prefilled = False  # as an exchange leaves it
        speculation = draft.speculate()
        drafted = draft.draft_now(waits).trees
        assert len(counted) == chunk + 1  # one for both
        assert (speculation.guesses[0] != ABSENT).all()
        assert ABSENT not in drafted[0]
        assert bool((speculation.guesses[1] != ABSENT).any()) == (set(drafted[1]) != {ABSENT}) == (chunk == 5)
    assert counted == [(1, CHUNK)] * 5 + [(1, 6)]
    assert verifier.slots.idle


@pytest.mark.parametrize(("fallback", "verify"), [("jit", "coupled"), ("none", "coupled"), ("jit", "rejection")])
def test_rounds_with_prompts_of_many_chunks(fallback: str, verify: str, tiny_config: Configure) -> None:
    """Draft and verifier agree on who waits, whoever has its keys first."""
    plan = plan_of(
        tiny_config(engine={"max_batch": 2}, speculation={"fallback": fallback, "verify": verify, "siblings": 1})
    )
    asked = [ids(4), ids(LONG), ids(CHUNK, seed=4), ids(LONG), ids(LONG)[:70] + ids(9, seed=5), ids(1)]
    params = [replace(GREEDY, max_tokens=12 + i, method=m) for i, m in enumerate(["ssd", "sd"] * 3)]
    played = play(build_verifier(plan)[0], build_draft(plan)[0], plan, asked, params)
    for prompt, wanted, history in zip(asked, params, played, strict=True):
        [alone] = play(build_verifier(plan)[0], build_draft(plan)[0], plan, [prompt], [replace(wanted, method="none")])
        assert history.tokens == alone.tokens
    assert any(r.source == "hit" for history in played for r in history.rounds)


def shared_prompts() -> list[list[int]]:
    """Of one beginning, of another, the same twice, a part of one, one token."""
    head, other = ids(2 * CHUNK + 5, seed=8), ids(3 * CHUNK, seed=9)
    return [
        head + ids(20, seed=1),
        head + ids(30, seed=2),
        other + ids(3, seed=3),
        head + ids(20, seed=1),
        other[:CHUNK] + ids(9, seed=4),
        (head + ids(20, seed=1))[:40],
        ids(1),
        other + ids(40, seed=5),
        head + ids(30, seed=2),
    ]


@pytest.mark.parametrize(("batch", "dtype"), [(1, "float32"), (4, "bfloat16")])
def test_cached_prefixes_change_no_token(dtype: str, batch: int, tiny_config: Configure) -> None:
    asked = shared_prompts()
    params = [replace(WARM if i % 2 else GREEDY, max_tokens=8 + i) for i in range(len(asked))]
    seen: dict[tuple[bool, str], list[tuple[int, ...]]] = {}
    for caching in (False, True):
        engine = {"max_batch": batch, "prefix_caching": caching}
        with LLM(tiny_config(dtype=dtype, engine=engine), launch=InprocPipeline) as llm:
            for method in ("none", "ssd"):
                outputs = llm.generate(asked, [replace(p, method=method) for p in params])
                seen[caching, method] = [o.token_ids for o in outputs]
                cached = [o.num_cached_tokens for o in outputs]
                assert all(c % CHUNK == 0 or c == len(ids) - 1 for c, ids in zip(cached, asked, strict=True))
                assert bool(sum(cached)) == caching
                if caching and batch == 4:  # it waits until the first one, which is the same, is whole
                    assert cached[3] == len(asked[3]) - 1
            assert llm.degraded is None
    assert len(set(map(tuple, seen.values()))) == 1


def test_a_copied_prefix_has_the_same_bits(tiny_config: Configure) -> None:
    """Also while garbage rows of decode forwards go to every slot that is free or prefilling."""
    plan = plan_of(tiny_config(draft=None, speculation={"method": "none"}, engine={"max_batch": 3}))
    caches = []
    for caching in (False, True):
        worker, _ = build_verifier(plan)
        worker.slots.prompts.prefixes = PrefixCache(3, CHUNK, enabled=caching)
        asked = [ids(LONG, seed=1), ids(LONG, seed=1)[:60] + ids(20, seed=2), ids(LONG, seed=1)]
        # It must still run when the others come: they find its prompt in a slot that is not free.
        running = replace(GREEDY, max_tokens=160)
        lines: list[Any] = [(lambda _: True, Submit(request=0, prompt=asked[0], params=running))]
        lines += [(committed(0, 2), Submit(request=i, prompt=asked[i], params=WARM)) for i in (1, 2)]
        script = Script([*lines, (finished(0, 1, 2), Shutdown())])
        perform(worker, script)
        chunks = sum(isinstance(entry, tuple) for entry in script.log)
        assert chunks == (6 + 2 if caching else 6 + 5 + 6)
        main = worker.runner.cache.main
        caches.append([[t[slot, :, : len(asked[slot]) - 1] for part in main for t in part] for slot in range(3)])
    for plain, cached in zip(*caches, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(plain, cached, strict=True))


prompts = st.lists(st.integers(0, 2), max_size=20)


@given(st.lists(st.tuples(prompts, st.integers(0, 3), st.booleans()), max_size=25))
def test_what_a_slot_is_said_to_hold_it_holds(moves: list[tuple[list[int], int, bool]]) -> None:
    """Against a model of the cache itself, whose every position remembers the whole prefix it was made for."""
    prefixes, busy = PrefixCache(4, 4), set[int]()
    made: list[list[tuple[int, ...]]] = [[()] * 20 for _ in range(4)]
    for tokens, leaves, whole in moves:
        busy.discard(leaves)
        free = [slot for slot in range(4) if slot not in busy]
        if not free:
            continue
        before = [list(held) for held in prefixes.held]
        slot, length = prefixes.place(tokens, free)
        source, found = prefixes.find(tokens)
        assert slot in free and found >= length
        if any(before[s] == tokens[: len(before[s])] for s in free):
            assert before[slot] == tokens[: len(before[slot])]  # nobody's prefix was lost
        made[slot][:found] = made[source][:found]
        assert all(made[slot][i] == tuple(tokens[: i + 1]) for i in range(found))
        assert found == len(tokens) or found % 4 == 0
        assert found >= max(common_prefix(tokens, held) for held in prefixes.held) // 4 * 4
        prefixes.hold(slot, tokens[:found])
        end = len(tokens) if whole else min(len(tokens), found + 4)
        made[slot][found:end] = [tuple(tokens[: i + 1]) for i in range(found, end)]
        prefixes.hold(slot, tokens[:end])
        busy.add(slot)


def test_the_least_recently_used_prefix_makes_room() -> None:
    prefixes = PrefixCache(3, 4)
    for start in (10, 20, 30):
        slot, _ = prefixes.place(list(range(start, start + 8)), [s for s in range(3) if not prefixes.held[s]])
        prefixes.hold(slot, list(range(start, start + 8)))
    prefixes.find(list(range(10, 18)))
    assert prefixes.place([1, 2, 3], [0, 1, 2]) == (1, 0)
    assert prefixes.place([*list(range(30, 38)), 5], [0, 2]) == (2, 8)  # it continues what stands there


arrivals = st.lists(
    st.tuples(
        st.integers(0, 8),  # which prompt
        st.integers(1, 6),  # tokens
        st.sampled_from([0.0, 0.9]),
        st.integers(0, 3),  # rounds after the one before
        st.none() | st.integers(0, 8),  # cancelled after so many rounds
    ),
    min_size=1,
    max_size=8,
)


@pytest.fixture(scope="module")
def worker(tiny_config: Configure) -> VerifierWorker:
    """One for all examples: what one leaves behind, the next one finds."""
    plan = plan_of(tiny_config(draft=None, speculation={"method": "none"}, engine={"max_batch": 3}))
    return build_verifier(plan)[0]


@settings(max_examples=20, deadline=None)
@given(arrivals)
def test_no_slot_leaks_and_no_neighbour_matters(
    worker: VerifierWorker, wanted: list[tuple[int, int, float, int, int | None]]
) -> None:
    """Whoever comes when, and goes: every request has the tokens it has alone, or their beginning."""

    round = Round.empty(3)

    def step() -> None:
        nonlocal round
        round = worker.begin(round, None)
        live = [row for _, row in worker.slots.admitted]
        assert len({row.request for row in live}) == len(live) <= 3
        assert len(live) == 3 or not worker.slots.prompts.waiting
        worker.prefill()
        verdict = worker.verify(round)
        round = worker.advance(round, verdict, None)
        for commit in verdict.commits:
            said[commit.request].extend(commit.tokens)
            if commit.finished:
                over.append(commit.request)

    def submit(number: int, prompt: int, count: int, temperature: float) -> None:
        params = SamplingParams(max_tokens=count, temperature=temperature, seed=prompt, ignore_eos=True)
        worker.submit(Submit(request=number, prompt=shared_prompts()[prompt], params=params))
        said[number] = []

    said, over = dict[int, list[int]](), list[int]()
    now, cancels = 0, dict[int, int]()
    for number, (prompt, count, temperature, later, gone) in enumerate(wanted):
        for _ in range(later):
            step()
            now += 1
        submit(number, prompt, count, temperature)
        if gone is not None:
            cancels[number] = now + gone
        for other, due in list(cancels.items()):
            if due <= now:
                worker.cancel(other)
                del cancels[other]
    while not worker.slots.idle:
        step()
    assert len(over) == len(set(over))
    together = dict(said)
    for number, (prompt, count, temperature, _, gone) in enumerate(wanted):
        submit(100, prompt, count, temperature)
        while not worker.slots.idle:
            step()
        assert together[number] == said[100][: len(together[number])]
        assert len(together[number]) == count or gone is not None
