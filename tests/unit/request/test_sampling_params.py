"""Sampling parameters: whatever is accepted can be sent and computed with; everything else is refused by name."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd.decoding.sampling import SamplingTensors
from ssd.errors import RequestError
from ssd.pipeline.transport.messages import Submit, decode, encode
from ssd.request import sampling_params as limits
from ssd.request.sampling_params import SamplingParams

NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.integers(-5, 5),
    st.floats(allow_nan=True, allow_infinity=True, width=64),
    st.sampled_from([0.5, 1.0, 1e39, 3.5e38, 1e-60, 2**31, 2**63, 2**64, -1, True, None, "1", 2**5000]),
)
TEXTS = st.one_of(st.text(max_size=6), st.sampled_from(["\ud800", "a\udfffb", "", "é日🐍", "x" * 5000, 5, b"x"]))
IDS = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**64, True, 1.5, "3"]))
VALUES: dict[str, st.SearchStrategy[Any]] = {
    name: NUMBERS
    for name in (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "n",
        "max_tokens",
        "min_tokens",
        "seed",
        "logprobs",
        "prompt_logprobs",
    )
} | {
    "stop": st.one_of(TEXTS, st.lists(TEXTS, max_size=3), st.just(["a"] * 100)),
    "stop_token_ids": st.one_of(st.lists(IDS, max_size=3), st.just([1] * 5000), NUMBERS),
    "bad_words": st.lists(st.one_of(TEXTS, st.lists(IDS, max_size=2)), max_size=3),
    "allowed_token_ids": st.one_of(st.none(), st.lists(IDS, max_size=3)),
    "logit_bias": st.dictionaries(st.one_of(IDS, st.just("7")), NUMBERS, max_size=3),
    "ignore_eos": st.sampled_from([True, False, 1, "no", None]),
    "include_stop_str_in_output": st.sampled_from([True, False, 0, "yes"]),
    "skip_special_tokens": st.sampled_from([True, False, 0, "yes"]),
    "method": st.sampled_from([None, "ssd", "none", "magic", "\ud800", 3]),
    "structured_outputs": st.sampled_from(
        [
            None,
            {"regex": "a\ud800"},
            {"choice": ["\udc00"]},
            {"json": {"const": "\ud800"}},
            {"\ud800": 1},
            {"regex": "a"},
        ]
    ),
}


def test_every_field_is_tried() -> None:
    assert {field.name for field in fields(SamplingParams)} == set(VALUES)


@pytest.mark.parametrize("name", VALUES)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_what_is_accepted_can_be_carried_out(name: str, data: st.DataObject) -> None:
    value = data.draw(VALUES[name])
    try:
        params = SamplingParams(**{"temperature": 1.0, name: value})
    except RequestError as error:
        told = str(error)
        assert told.startswith(name) and "\n" not in told and len(told) < 300
        assert told.encode()  # an answer can carry it
        return
    sent = Submit(request=1, prompt=[1], params=params)
    assert decode(encode(sent)) == sent
    row = SamplingTensors.empty(1, "cpu").with_row(
        0,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=params.seed,
    )
    assert float(row.temperature[0]) < math.inf and float(row.top_p[0]) > 0
    assert int(row.top_k[0]) == params.top_k and int(row.seed[0]) == params.seed


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("temperature", limits.MAX_TEMPERATURE, 100.1),
        ("top_k", limits.MAX_TOP_K, 2**31),
        ("top_p", limits.MIN_TOP_P, 9e-7),
        ("repetition_penalty", limits.MAX_REPETITION_PENALTY, 1e38),
        ("repetition_penalty", limits.MIN_REPETITION_PENALTY, 1e-38),
        ("presence_penalty", -2.0, -2.1),
        ("frequency_penalty", 2.0, 2.1),
        ("max_tokens", limits.MAX_TOKENS, 2**31),
        ("seed", limits.MAX_SEED, 2**63),
        ("stop", ["x"] * limits.MAX_STOPS, ["x"] * (limits.MAX_STOPS + 1)),
        ("stop", "x" * limits.MAX_STOP_CHARACTERS, "x" * (limits.MAX_STOP_CHARACTERS + 1)),
        ("stop_token_ids", [2**31 - 1], [2**31]),
        ("bad_words", ["x"] * limits.MAX_BAD_WORDS, ["x"] * (limits.MAX_BAD_WORDS + 1)),
        ("logit_bias", {2**31 - 1: 100}, {2**31: 1}),
        ("logit_bias", {"5": -100.0}, {"5": -100.1}),
        ("logit_bias", dict.fromkeys(range(4096), 1), dict.fromkeys(range(4097), 1)),
    ],
)
def test_limits(name: str, good: Any, bad: Any) -> None:
    SamplingParams(**{name: good})
    with pytest.raises(RequestError, match=rf"^{name}\b.*(must|got)"):
        SamplingParams(**{name: bad})


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1e39, "1e+39"), ("hot", "'hot'"), (-1, "-1"), (1 << 20000, "an integer of 20001 bits")],
    ids=["float", "text", "integer", "long"],
)
def test_messages_name_field_limit_and_value(value: Any, shown: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(temperature=value)
    assert str(caught.value) == f"temperature must be a number in [0, 100]; got {shown}"


def test_none_has_vllms_meaning() -> None:
    none: Any = None
    params = SamplingParams(
        stop=none, seed=none, max_tokens=none, stop_token_ids=none, bad_words=none, logit_bias=none, logprobs=none
    )
    assert params.stop == params.stop_token_ids == params.bad_words == params.logit_bias == ()
    assert params.max_tokens == limits.MAX_TOKENS  # to the end of the context
    assert len({SamplingParams(seed=none).seed for _ in range(20)}) == 20
    assert SamplingParams(min_tokens=5000, max_tokens=none).min_tokens == 5000


def test_numbers_of_other_libraries() -> None:
    import numpy as np

    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), stop_token_ids=np.array([1, 2]))  # type: ignore[arg-type]
    assert (params.temperature, params.top_k, params.stop_token_ids) == (0.5, 3, (1, 2))
    assert encode(Submit(request=1, prompt=[1], params=params))
