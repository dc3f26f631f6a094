"""What fronts refuse before anything is booked, and that refusals take no place."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ssd import LLM, SamplingParams
from ssd.engine import front as front_module
from ssd.engine.async_engine import AsyncEngine
from ssd.engine.book import Limits
from ssd.engine.front import Front
from ssd.errors import OverloadedError, RequestError
from ssd.pipeline.transport import messages
from ssd.request.sampling_params import completion_seed
from ssd.testing.twins.pipeline import ScriptedPipeline, scripted_token

SOON_S = 60.0


def smuggled(**fields: Any) -> SamplingParams:
    """Parameters with values that their own checks refuse."""
    params = SamplingParams(max_tokens=4)
    for name, value in fields.items():
        object.__setattr__(params, name, value)
    return params


UNSENDABLE = {
    "integer": smuggled(top_k=2**64),
    "negative integer": smuggled(seed=-(2**64)),
    "text": smuggled(stop=("\ud800",)),
    "type": smuggled(method=object()),
}


@pytest.mark.parametrize("params", UNSENDABLE.values(), ids=UNSENDABLE)
def test_what_cannot_be_sent_takes_no_place(params: SamplingParams) -> None:
    """More tries than the verifier takes requests: a single lost place each would block the last request."""
    good = SamplingParams(max_tokens=3)

    async def engine() -> None:
        async with AsyncEngine("embedded", launch=ScriptedPipeline) as engine:
            for _ in range(engine.config.engine.max_batch + 2):
                with pytest.raises(RequestError, match="cannot be sent"):
                    await engine.open([5], params)
            assert engine.running == engine.queued == engine.tokens_in_flight == 0
            async with asyncio.timeout(SOON_S):
                assert len((await engine.generate([5], good)).token_ids) == 3

    asyncio.run(engine())
    with LLM("embedded", launch=ScriptedPipeline) as llm:
        for _ in range(3):
            with pytest.raises(RequestError, match="cannot be sent"):
                llm.generate([[5]], params)
            with pytest.raises(RequestError, match="cannot be sent"):
                llm.stream([5], params)
        assert len(llm.generate([[5]], good)[0].token_ids) == 3


def test_what_is_too_large_for_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    front = Front("embedded")
    size = len(messages.encode(front.make([5] * 100, SamplingParams())[0].message))
    monkeypatch.setattr(front_module, "MAX_MESSAGE_BYTES", size)
    front.make([5] * 100, SamplingParams())
    with pytest.raises(RequestError, match=f"has {size + 1} bytes; at most {size}"):
        front.make([5] * 101, SamplingParams())


@pytest.mark.parametrize("prompt", ["\ud800", "a\udfffb", ["x\ud800"]])
def test_prompts_that_utf8_cannot_encode(prompt: Any) -> None:
    with LLM("embedded", launch=ScriptedPipeline) as llm:
        with pytest.raises(RequestError, match=r"^prompt must be valid Unicode") as caught:
            llm.generate(prompt)
        assert str(caught.value).encode()
        with pytest.raises(RequestError, match=r"^prompt"):
            llm.stream(prompt)


@pytest.mark.parametrize("prompts", [[1, 2, 3], (1, 2, 3), [[1, 2, 3]]])
def test_a_list_of_integers_is_a_prompt(prompts: Any) -> None:
    with LLM("embedded", launch=ScriptedPipeline) as llm:
        (output,) = llm.generate(prompts, SamplingParams(max_tokens=2))
        assert output.prompt_token_ids == (1, 2, 3)


def test_no_maximum_of_tokens_fills_the_context() -> None:
    none: Any = None
    with LLM("embedded", launch=ScriptedPipeline, overrides=["engine.max_model_len=64"]) as llm:
        outputs = llm.generate([[5], [5] * 60], SamplingParams(max_tokens=none))
        assert [len(output.token_ids) for output in outputs] == [63, 4]


class Holes:
    """A tokenizer that knows fewer ids than the model: some ids have no token."""

    def __init__(self, whole: Any):
        self._whole = whole

    def __len__(self) -> int:
        return 7

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._whole(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def test_prompt_ids_are_checked_against_the_models_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    make_plan = front_module.make_plan

    def with_holes(config: Any) -> Any:
        tokenizer, plan = make_plan(config)
        return Holes(tokenizer), plan

    monkeypatch.setattr(front_module, "make_plan", with_holes)
    front = Front("embedded")
    last = front.plan.vocabulary - 1
    assert front.make([last], SamplingParams())[0].prompt_ids == (last,)
    for wrong in (last + 1, -1, 2**64):
        with pytest.raises(RequestError, match=rf"got {wrong}$"):
            front.make([last, wrong], SamplingParams())


@pytest.mark.parametrize(
    ("limits", "params", "message"),
    [
        (Limits(tokens=20), SamplingParams(max_tokens=20), "max_tokens_in_flight=20 can never"),
        (Limits(tokens=50), SamplingParams(max_tokens=20, n=3, temperature=1.0), "of 3 completions"),
        (Limits(queue=0, sent=2), SamplingParams(max_tokens=2, n=3, temperature=1.0), "at most 2 can be in flight"),
    ],
)
def test_what_can_never_fit_is_not_told_to_try_again(limits: Limits, params: SamplingParams, message: str) -> None:
    front = Front("embedded", limits=limits)
    with pytest.raises(RequestError, match=message):
        front.submit(front.make([5], params))
    assert front.running == front.queued == front.tokens_in_flight == 0


def test_what_does_not_fit_now_may_be_tried_again() -> None:
    front = Front("embedded", limits=Limits(tokens=20))
    first = front.make([5], SamplingParams(max_tokens=15))
    front.submit(first)
    second = front.make([5], SamplingParams(max_tokens=15))
    with pytest.raises(OverloadedError, match="try again"):
        front.submit(second)
    front.cancel(first)
    front.fail()
    assert [message.request for _, message in front.submit(second).send] == [second[0].number]  # type: ignore[union-attr]


def scripted(seed: int, count: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(scripted_token([4], seed, i, vocabulary) for i in range(count))


def test_completions_of_a_prompt_share_everything_but_the_seed() -> None:
    with LLM("embedded", launch=ScriptedPipeline) as llm:
        (output,) = llm.generate([4], SamplingParams(max_tokens=5, n=3, temperature=1.0, seed=9))
        vocabulary = llm._front.plan.vocabulary
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert [one.token_ids for one in output.outputs] == [
        scripted(completion_seed(9, index), 5, vocabulary) for index in range(3)
    ]
