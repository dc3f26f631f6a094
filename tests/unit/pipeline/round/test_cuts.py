"""Where a request ends, at every offset of a block: tokens, text, log-probabilities, counts together.

A scripted target says one text, a scripted draft is right for so many tokens a round, so blocks
have a known length. Front, verifier and loop are the real ones.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ssd import LLM, RequestOutput, SamplingParams, SpeculationRecord
from ssd.engine.book import RequestBook, Step
from ssd.models.rows import RowPlan
from ssd.pipeline.round.candidates import Candidates
from ssd.pipeline.round.lookup import Found
from ssd.pipeline.round.round import Round
from ssd.pipeline.round.verdict import Verdict
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.runtime.plan import Plan
from ssd.pipeline.runtime.verifier_loop import VerifierLoop
from ssd.pipeline.sampling.slots import SlotSampling
from ssd.pipeline.transport.lanes import InprocLane
from ssd.pipeline.transport.messages import Committed, Finished, Ready, Shutdown
from ssd.pipeline.verifier.decider import Decider
from ssd.pipeline.verifier.options import VerifierOptions
from ssd.pipeline.verifier.sequence import TargetSequence
from ssd.pipeline.verifier.worker import VerifierWorker
from ssd.testing.models.tiny import save_tiny, tiny_tokenizer

SIZE = 700  # all bytes: characters beyond ASCII take several tokens
TEXT = "say 🐍 né日\nthe end 🐍🐍 or not"
PROMPT = 50
CONTEXT = 4096
OTHER_END = 699
BLOCKS = [(1, 1), (2, 1), (3, 0), (3, 3), (5, 4)]
"""Lookahead K, and how many of the K candidates are right."""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(SIZE)


@cache
def script() -> tuple[int, ...]:
    """The prompt's one token, the text, and ever the same afterwards."""
    text = tokenizer().encode(TEXT)
    return PROMPT, *text, *itertools.repeat(text[-1], CONTEXT)


LENGTH = len(tokenizer().encode(TEXT))


@cache
def decode(ids: tuple[int, ...]) -> str:
    return tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@cache
def logits_at(position: int, ends: tuple[tuple[int, int], ...]) -> Tensor:
    """Of the token after the one at ``position``. ``ends``: other tokens than the script's."""
    logits = torch.randn(SIZE, generator=torch.Generator().manual_seed(position))
    logits[dict(ends).get(position + 1, script()[position + 1])] += 20
    return logits


class ScriptedRunner:
    batch, vocabulary, device, compile, chunk = 8, SIZE, torch.device("cpu"), False, 16
    graphs, counts = None, (8,)

    def __init__(self) -> None:
        self.changed: tuple[tuple[int, int], ...] = ()

    def compiled(self, body: Callable[..., Any]) -> Callable[..., Any]:
        return body

    def context_for(self, longest: int) -> int:
        return longest

    def announce(self, *_forward: Any) -> None:
        return

    def logits(self, plan: RowPlan, tokens: Tensor, lengths: Tensor, context: int, slots: None) -> Tensor:
        time.sleep(0.002)  # a forward takes a while: the front gets its turn
        rows = [[logits_at(length + offset, self.changed) for offset in plan.offsets] for length in lengths.tolist()]
        return torch.stack([torch.stack(row) for row in rows])

    def prefill(self, slot: int, tokens: list[int], start: int) -> None:
        raise AssertionError("prompts have one token")


class ScriptedVerifier(VerifierWorker):
    """With candidates of which the first ``right`` are the target's."""

    right = 0
    cancelled_at: list[int]
    """How many tokens each cancelled request had."""

    def advance(self, round: Round, verdict: Verdict, found: Found | None) -> Round:
        candidates = {}
        for row in self.slots.rows:
            if row is not None:
                tokens, changed = [], self.runner.changed  # type: ignore[attr-defined]
                for node in range(1, self.shape.nodes):
                    logits = logits_at(len(row.tokens) + node - 1, changed)
                    tokens.append((int(logits.argmax()) + (node > self.right)) % SIZE)
                candidates[row.request] = Candidates(tokens=tokens, origin="prepared")
        return replace(super().advance(round, verdict, found), candidates=candidates)

    def cancel(self, request: int) -> TargetSequence | None:
        row = super().cancel(request)
        if row is not None:
            self.cancelled_at.append(row.generated)
        return row


class ScriptedPipeline:
    def __init__(self, plan: Plan, right: int):
        lane, theirs = InprocLane.pair()
        self.lanes: Any = {"verifier": lane}
        self.runner = ScriptedRunner()
        runner: Any = self.runner
        options = VerifierOptions(
            shape=plan.shape,
            governed=False,
            method="none",
            jit=True,
            strict=True,
            lookaheads=plan.lookaheads,
            ends=frozenset(plan.ends),
            max_model_len=plan.config.engine.max_model_len,
        )
        sampling = SlotSampling(runner.batch, SIZE, runner.device, horizon=plan.shape.depth + 1)
        decider = Decider(runner, plan.shape, sampling)
        self.worker = ScriptedVerifier(runner, options, sampling=sampling, decider=decider)
        self.worker.right, self.worker.cancelled_at = right, []
        theirs.send(Ready(role="verifier", info={}))
        self._thread = threading.Thread(target=VerifierLoop(self.worker, theirs).run, daemon=True)
        self._thread.start()

    def check(self) -> list[str]:
        return [] if self._thread.is_alive() else ["verifier"]

    def close(self) -> None:
        self.lanes["verifier"].send(Shutdown())
        self._thread.join(10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration and a tokenizer: the model in it is never loaded."""
    folder = save_tiny(tmp_path_factory.mktemp("scripted"), "llama", vocab_size=SIZE, num_hidden_layers=1)
    GenerationConfig(eos_token_id=[0, OTHER_END]).save_pretrained(folder)
    return folder


@pytest.fixture
def scripted(folder: Path) -> Callable[..., Any]:
    @contextmanager
    def start(lookahead: int, right: int, context: int = CONTEXT) -> Iterator[tuple[LLM, ScriptedPipeline]]:
        config = {
            "target": {"model": str(folder)},
            "speculation": {"method": "none", "lookahead": lookahead},
            "engine": {"max_model_len": context},
        }
        made: list[ScriptedPipeline] = []

        def launch(plan: Plan) -> ScriptedPipeline:
            made.append(ScriptedPipeline(plan, right))
            return made[0]

        with LLM(config, launch=launch) as llm:
            yield llm, made[0]

    return start


def check(output: RequestOutput, count: int, text: str, lookahead: int, right: int, changed: Any = ()) -> None:
    """All of it ends after ``count`` tokens, and says what those were."""
    expected = [int(logits_at(position, changed).argmax()) for position in range(count)]
    assert list(output.token_ids) == expected
    assert output.text == text
    assert output.logprobs is not None and len(output.logprobs) == count
    for position, (token, given) in enumerate(zip(expected, output.logprobs, strict=True)):
        logprobs = logits_at(position, changed).log_softmax(-1)
        assert given.token_id == token
        assert given.logprob == pytest.approx(float(logprobs[token]), abs=1e-6)
        assert given.rank == 1
        assert [i for i, _ in given.top] == logprobs.topk(2).indices.tolist()
    # The first round has no candidates, the last may be cut.
    more = -(-(count - 1) // (right + 1))
    histogram = [0] * (right + 1 if more else 1)
    histogram[0] += 1
    histogram[right if more else 0] += more
    record = SpeculationRecord(
        rounds=1 + more,
        tokens=1 + more * (right + 1),
        drafted=more * lookahead,
        accepted=more * right,
        accepted_histogram=histogram,
    )
    assert output.speculation == record


def first(ids: tuple[int, ...], *stops: str, least: int = 0) -> int:
    """After how many tokens a text contains one of the strings, without half characters."""
    before = decode(ids[:least]).rstrip("\ufffd")

    def ends_in(count: int, stop: str) -> bool:
        return stop in decode(ids[:count]).rstrip("\ufffd")[max(0, len(before) - len(stop) + 1) :]

    return next(count for count in range(least + 1, len(ids)) if any(ends_in(count, stop) for stop in stops))


@pytest.mark.parametrize(("lookahead", "right"), BLOCKS)
def test_stop_strings(lookahead: int, right: int, scripted: Callable[..., Any]) -> None:
    """From every character of the text on, of several lengths: over tokens, blocks and halves of characters."""
    ids = script()[1:]
    spans = [(start, length) for length in (1, 3) for start in range(len(TEXT) - length + 1)]
    params = [
        SamplingParams(
            stop=(TEXT[start : start + length], "never there"),
            include_stop_str_in_output=bool(start % 2),
            max_tokens=CONTEXT - 2,
            logprobs=2,
        )
        for start, length in spans
    ]
    with scripted(lookahead, right) as (llm, pipeline):
        outputs = llm.generate([[PROMPT]] * len(params), params)
        deadline = time.monotonic() + 30
        while not pipeline.worker.slots.idle and time.monotonic() < deadline:
            time.sleep(0.01)
        assert pipeline.worker.slots.idle
    for output, p in zip(outputs, params, strict=True):
        stop = p.stop[0]
        text = TEXT[: TEXT.index(stop)] + (stop if p.include_stop_str_in_output else "")
        check(output, first(ids, stop), text, lookahead, right)
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    # The verifier heard of it long before it would have ended by itself.
    assert len(pipeline.worker.cancelled_at) == len(params)
    assert max(pipeline.worker.cancelled_at) < CONTEXT // 2


@pytest.mark.parametrize(("lookahead", "right"), BLOCKS)
def test_limits_and_end_ids(lookahead: int, right: int, scripted: Callable[..., Any]) -> None:
    """``max_tokens`` and stop token ids at every offset."""
    ids = script()[1:]
    counts = range(1, LENGTH + 1)
    limits = [SamplingParams(max_tokens=count, logprobs=2) for count in counts]
    stops = [
        SamplingParams(stop_token_ids=(ids[count - 1], 698), logprobs=2, include_stop_str_in_output=include)
        for count in counts
        for include in (False, True)
    ]
    with scripted(lookahead, right) as (llm, _):
        outputs = llm.generate([[PROMPT]] * (len(limits) + len(stops)), limits + stops)
    for output, count in zip(outputs, counts, strict=False):
        check(output, count, decode(ids[:count]), lookahead, right)
        assert (output.finish_reason, output.stop_reason) == ("length", None)
    for output, p in zip(outputs[len(limits) :], stops, strict=True):
        count = ids.index(p.stop_token_ids[0]) + 1
        text = decode(ids[: count if p.include_stop_str_in_output else count - 1])
        check(output, count, text, lookahead, right)
        assert (output.finish_reason, output.stop_reason) == ("stop", p.stop_token_ids[0])


@pytest.mark.parametrize(("lookahead", "right"), [(1, 1), (3, 2), (5, 4)])
def test_end_of_text_and_context(lookahead: int, right: int, scripted: Callable[..., Any]) -> None:
    """Either of two end-of-text ids, and the context's limit, at every offset of a block."""
    with scripted(lookahead, right) as (llm, pipeline):
        for count, end in itertools.product(range(1, 2 * right + 4), (0, OTHER_END)):
            pipeline.runner.changed = changed = ((count, end),)
            whole, ignoring = llm.generate(
                [[PROMPT]] * 2,
                [SamplingParams(logprobs=2), SamplingParams(logprobs=2, ignore_eos=True, max_tokens=count + 2)],
            )
            check(whole, count, decode(script()[1:count]), lookahead, right, changed)
            assert (whole.finish_reason, whole.stop_reason) == ("stop", None)
            assert len(ignoring.token_ids) == count + 2
            assert ignoring.finish_reason == "length"
    for context in range(16, 16 + right + 2):
        with scripted(lookahead, right, context) as (llm, _):
            (output,) = llm.generate([[PROMPT]], SamplingParams(max_tokens=1000, logprobs=2))
        check(output, context - 1, decode(script()[1:context]), lookahead, right)
        assert output.finish_reason == "length"


def test_stop_strings_before_min_tokens(scripted: Callable[..., Any]) -> None:
    """One that the first tokens complete is text like any other; one they only begin is not."""
    ids = script()[1:]
    stop = "🐍"
    occurrences = [count for count in range(1, LENGTH + 1) if decode(ids[:count]).endswith(stop)]
    assert len(occurrences) == 3
    leasts = range(1, occurrences[-1])
    params = [SamplingParams(stop=(stop,), min_tokens=least, logprobs=2) for least in leasts]
    with scripted(3, 2) as (llm, _):
        outputs = llm.generate([[PROMPT]] * len(params), params)
    for output, least in zip(outputs, leasts, strict=True):
        count = next(count for count in occurrences if count > least)
        check(output, count, decode(ids[:count])[:-1], 3, 2)


def test_the_stop_string_that_comes_first(scripted: Callable[..., Any]) -> None:
    for stops in (("the", "end"), ("end", "the"), ("en", "the end", "he"), ("\n", "\nthe")):
        with scripted(3, 3) as (llm, _):
            (output,) = llm.generate([[PROMPT]], SamplingParams(stop=stops, logprobs=2))
        check(output, count := first(script()[1:], *stops), output.text, 3, 3)
        shown = decode(script()[1 : count + 1])
        assert output.text == shown[: min(shown.index(stop) for stop in stops if stop in shown)]


@pytest.mark.parametrize("params", [{"stop": ("日",)}, {"max_tokens": 9}, {"stop_token_ids": (script()[12],)}], ids=str)
def test_streams_end_there_too(params: dict[str, Any], scripted: Callable[..., Any]) -> None:
    with scripted(4, 3) as (llm, _):
        events = list(llm.stream([PROMPT], SamplingParams(logprobs=1, **params)))
    output = events[-1].output
    assert output is not None and [event.output for event in events[:-1]] == [None] * (len(events) - 1)
    assert "".join(event.text for event in events) == output.text
    assert tuple(token for event in events for token in event.token_ids) == output.token_ids
    assert tuple(token for event in events for token in event.logprobs or ()) == output.logprobs
    drafted = sum(position % 4 != 0 for position in range(len(output.token_ids)))
    assert sum(event.accepted for event in events) == drafted  # every fourth is the target's own


def test_the_fronts_record_is_the_verifiers(tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what counts where only the front knows the end; elsewhere both do."""
    both: list[tuple[SpeculationRecord, SpeculationRecord]] = []
    handle = RequestBook.handle

    def noting(self: RequestBook, message: Committed | Finished) -> Step:
        if isinstance(message, Finished):
            both.append((self.live[message.request].record, message.record))
        return handle(self, message)

    monkeypatch.setattr(RequestBook, "handle", noting)
    params = [
        SamplingParams(max_tokens=12 + i, ignore_eos=True, temperature=0.8 * (i % 2), seed=i, method=method)
        for i, method in enumerate(("ssd", "sd", "none", "ssd", "ssd"))
    ]
    with LLM(tiny_config(engine={"max_batch": 2}, speculation={"siblings": 1}), launch=InprocPipeline) as llm:
        llm.generate([[9, 30, 77]] * len(params), params)
    assert len(both) == len(params)
    for ours, theirs in both:
        assert ours == theirs
    assert sum(theirs.hits for _, theirs in both) > 0
