"""A draft of two ranks as local processes: the tokens, and what happens when a rank is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from ssd import LLM
from tests.process.test_local import ASKED, LONG, gone, pipeline_of, plain, tokens, until_back


@pytest.fixture
def config(tiny_config: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    config = tiny_config(
        cores=True,
        engine={"max_batch": 2, "max_model_len": 480, "link_timeout_s": 10.0, "draft_restart_delay_s": 0.1},
        speculation={"siblings": 1, "forecast": {"budget": 5}},
    )
    config["draft"]["data_parallel"] = 2
    return config


def interrupted(llm: LLM, role: str) -> tuple[list[int], int]:
    """An answer during which that worker is killed; and how many rounds after that still hit."""
    pid, got, hits = pipeline_of(llm).pids[role], [], 0
    for event in llm.stream(ASKED[0], LONG):
        if len(got) < 40 <= len(got) + len(event.token_ids):
            os.kill(pid, signal.SIGKILL)
        hits += len(got) > 100 and event.accepted > 0
        got.extend(event.token_ids)
    assert gone([pid])
    return got, hits


def test_same_tokens_then_ranks_are_killed(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Without another rank the first goes on; without the first all decode plainly until both are back."""
    with LLM(config) as llm:
        expected = tokens(llm, "none")
        assert tokens(llm, "sd") == tokens(llm, "ssd") == expected
        long, pids = plain(llm, LONG), dict(pipeline_of(llm).pids)
        assert set(pids) == {"verifier", "draft", "draft-1"}
        got, hits = interrupted(llm, "draft-1")
        assert tuple(got) == long and hits > 10
        assert llm.degraded is None and "draft-1 is lost" in caplog.text
        got, _ = interrupted(llm, "draft")
        assert tuple(got) == long
        until_back(llm)
        assert tokens(llm, "ssd") == expected
        now = dict(pipeline_of(llm).pids)
        assert now["verifier"] == pids["verifier"] and not {now["draft"], now["draft-1"]} & set(pids.values())
    assert gone([*pids.values(), *now.values()], 1.0)


@pytest.mark.slow
def test_another_rank_falls_silent(config: dict[str, Any]) -> None:
    """Stopped, not dead: half of engine.link_timeout_s decides, and the verifier still waits."""
    config["engine"]["link_timeout_s"] = 4.0
    with LLM(config) as llm:
        long, pid = plain(llm, LONG), pipeline_of(llm).pids["draft-1"]
        events = llm.stream(ASKED[0], LONG)
        got = list(next(events).token_ids)
        os.kill(pid, signal.SIGSTOP)
        try:
            got += [token for event in events for token in event.token_ids]
            assert tuple(got) == long
            assert llm.degraded is None
        finally:
            os.kill(pid, signal.SIGCONT)
