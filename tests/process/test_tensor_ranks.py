"""A verifier of two ranks as local processes: the tokens, and what happens when a rank dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from ssd import LLM, WorkerError
from tests.process.test_local import ASKED, LONG, SOON_S, gone, pipeline_of, tokens


@pytest.fixture
def config(tiny_config: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    config = tiny_config(
        cores=True, engine={"max_batch": 2, "max_model_len": 480, "link_timeout_s": 4.0, "start_timeout_s": 600.0}
    )
    config["target"]["tensor_parallel"] = 2
    return config


def test_same_tokens_then_a_rank_is_killed(config: dict[str, Any]) -> None:
    with LLM(config) as llm:
        expected = tokens(llm, "none")
        assert tokens(llm, "sd") == tokens(llm, "ssd") == expected
        pids = pipeline_of(llm).pids
        assert set(pids) == {"verifier", "verifier-1", "draft"}
        events = llm.stream(ASKED[0], LONG)
        next(events)
        began = time.monotonic()
        os.kill(pids["verifier-1"], signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"another rank of the verifier is gone|the verifier-1 worker died"):
            list(events)
        assert time.monotonic() - began < SOON_S
    assert gone(list(pids.values()), 1.0)


@pytest.mark.slow
def test_a_rank_falls_silent(config: dict[str, Any]) -> None:
    """Stopped, not dead: engine.link_timeout_s decides."""
    with LLM(config) as llm:
        pids = pipeline_of(llm).pids
        events = llm.stream(ASKED[0], LONG)
        next(events)
        os.kill(pids["verifier-1"], signal.SIGSTOP)
        began = time.monotonic()
        try:
            with pytest.raises(WorkerError, match="another rank of the verifier is gone or silent"):
                list(events)
            assert 3.5 < time.monotonic() - began < 4 + SOON_S
        finally:
            os.kill(pids["verifier-1"], signal.SIGCONT)
    assert gone(list(pids.values()), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("idle", [True, False])
def test_the_first_rank_is_killed(config: dict[str, Any], idle: bool) -> None:
    with LLM(config) as llm:
        pids = pipeline_of(llm).pids
        tokens(llm, "ssd")
        events = llm.stream(ASKED[0], LONG)
        if not idle:
            next(events)
        os.kill(pids["verifier"], signal.SIGKILL)
        with pytest.raises(WorkerError, match="verifier"):
            list(events)
    assert gone(list(pids.values()), 1.0)
