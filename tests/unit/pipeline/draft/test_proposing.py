"""Drafts that others write: whatever the function does, the tokens are those of plain decoding."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ssd import LLM, ConfigError, RequestOutput, SamplingParams
from ssd.config.load import load_config
from ssd.models.drafts.proposer import Proposer, find
from ssd.pipeline.runtime.launch import InprocPipeline

Configure = Callable[..., dict[str, Any]]

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
PARAMS = [GREEDY, replace(GREEDY, temperature=0.8, seed=11)]
ASKED = [[9, 30, 77], [5, 6, 7, 8]]
KNOWN: dict[int, tuple[int, ...]] = {}
"""Whole texts, by first token."""


def knowing(context: Sequence[int], count: int, deadline: float) -> Sequence[int]:
    """Proposes what plain decoding gave."""
    assert deadline > time.monotonic() - 1
    return KNOWN[context[0]][len(context) :][:count]


def raising(context: Sequence[int], count: int, deadline: float) -> Sequence[int]:
    raise RuntimeError("broken")


def leaving(context: Sequence[int], count: int, deadline: float) -> Sequence[int]:
    sys.exit(1)


def rubbish(context: Sequence[int], count: int, deadline: float) -> Any:
    """Another kind of answer at every call."""
    answers: list[Any] = [
        None,
        3,
        "text",
        [1.5],
        [-1],
        [2**40],
        ["a"],
        [None],
        [True],
        object(),
        {1: 2},
        [[5]],
        [5] * 99,
    ]
    return answers[len(context) % len(answers)]


def numpy_ids(context: Sequence[int], count: int, deadline: float) -> Any:
    return np.array(knowing(context, count, deadline))


def config_of(tiny_config: Configure, name: str, **keys: Any) -> dict[str, Any]:
    config = tiny_config(draft=None, speculation={"method": "sd"}, engine={"max_batch": 2})
    return {**config, "draft": {"propose": f"{__name__}:{name}", **keys}}


def same_as_plain(config: dict[str, Any], method: Any = "sd") -> list[RequestOutput]:
    with LLM(config, launch=InprocPipeline) as llm:
        plain = llm.generate(ASKED, [replace(p, method="none") for p in PARAMS])
        KNOWN.update({prompt[0]: (*prompt, *one.token_ids) for prompt, one in zip(ASKED, plain, strict=True)})
        found = llm.generate(ASKED, [replace(p, method=method) for p in PARAMS])
        assert llm.degraded is None
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    return found


@pytest.mark.parametrize("method", ["sd", "ssd"])
@pytest.mark.parametrize("name", ["knowing", "numpy_ids"])
def test_good_proposals_are_accepted(tiny_config: Configure, name: str, method: str) -> None:
    for output in same_as_plain(config_of(tiny_config, name), method):
        assert output.speculation.accepted == output.speculation.drafted > 12


@pytest.mark.parametrize("name", ["raising", "leaving", "rubbish"])
def test_bad_proposals_cost_nothing_but_speed(tiny_config: Configure, name: str) -> None:
    same_as_plain(config_of(tiny_config, name))


@pytest.mark.parametrize("fallback", ["ngram", "auto"])
def test_ngrams_of_missed_rows(tiny_config: Configure, fallback: str) -> None:
    """Draft and verifier agree about who has an n-gram."""
    config = config_of(tiny_config, "knowing")
    config["speculation"]["fallback"] = fallback
    same_as_plain(config, "ssd")


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_proposals_are_named_not_drawn(tiny_config: Configure, rule: str) -> None:
    config = config_of(tiny_config, "raising")
    config["speculation"]["verify"] = rule
    with LLM(config, launch=InprocPipeline) as llm:
        plain, found = (llm.generate(ASKED, replace(GREEDY, method=m)) for m in ("none", "sd"))
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]


def test_a_function_that_hangs_is_not_waited_for(tiny_config: Configure) -> None:
    hanging.release.clear()
    began = time.monotonic()
    same_as_plain(config_of(tiny_config, "hanging", propose_timeout_s=0.1))
    assert time.monotonic() - began < 60
    hanging.release.set()


class Hanging:
    """Returns when it is released."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def __call__(self, context: Sequence[int], count: int, deadline: float) -> Sequence[int]:
        self.release.wait(60)
        return [5]


hanging = Hanging()


def test_a_late_answer_is_not_taken_for_the_next_call() -> None:
    going_on = threading.Event()

    def late(context: Sequence[int], count: int, deadline: float) -> Sequence[int]:
        if context == (1,):
            going_on.wait(30)
        return list(context)

    proposer = Proposer(late, vocabulary=10, limit_s=0.05)
    assert proposer.propose([1], 4) == []
    assert proposer.propose([2], 4) == []
    going_on.set()
    deadline = time.monotonic() + 30
    while not (found := proposer.propose([3], 4)):
        assert time.monotonic() < deadline
    assert found == [3]


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ([1, 2, 3], [1, 2]),
        ([1, 10], [1]),
        ([-1, 1], []),
        ((1,), [1]),
        (np.array([3, 4], dtype=np.int32), [3, 4]),
        ("12", []),
        (b"12", []),
        (None, []),
        ([1.0], []),
        ([True], []),
        ([], []),
    ],
    ids=["cut", "too large", "negative", "tuple", "array", "text", "bytes", "none", "float", "bool", "empty"],
)
def test_valid_answers(answer: Any, valid: list[int]) -> None:
    assert Proposer(lambda *_: answer, vocabulary=10, limit_s=5).propose([1], 2) == valid


def test_each_kind_of_failure_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    proposer = Proposer(raising, vocabulary=10, limit_s=5)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert proposer.propose([1], 2) == []
    assert [record.message for record in caplog.records] == [
        "draft.propose: no proposal, because a call raised RuntimeError (broken); said once"
    ]


def test_functions_are_found_by_module_and_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(f"{__name__}:knowing") is knowing
    point = importlib.metadata.EntryPoint(name="mine", value=f"{__name__}:raising", group="ssd.drafts")
    installed = importlib.metadata.EntryPoints([point])
    monkeypatch.setattr("ssd.models.drafts.proposer.entry_points", lambda group: installed.select(group=group))
    assert find("mine") is raising
    with pytest.raises(ConfigError, match="known: mine"):
        find("other")


@pytest.mark.parametrize("name", ["no_such_module:f", f"{__name__}:no_such", f"{__name__}:PARAMS"], ids=str)
def test_functions_that_do_not_exist(name: str) -> None:
    with pytest.raises(ConfigError, match=r"draft\.propose"):
        find(name)


@pytest.mark.parametrize(
    ("draft", "method", "message"),
    [
        ({"propose": "m:f", "model": "embedded/draft"}, "sd", "not both"),
        ({}, "sd", r"draft\.model is missing"),
        ({"propose": "m:f"}, "ssd", "speculation.method=sd"),
        ({"propose": "m:f", "data_parallel": 2}, "sd", "data_parallel=1"),
    ],
    ids=["both", "neither", "ssd", "ranks"],
)
def test_configurations(draft: dict[str, Any], method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"target": {"model": "embedded/target"}, "draft": draft, "speculation": {"method": method}})
