"""Workers as local processes: same tokens, and nothing left behind however anybody dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from ssd import LLM, PipelineError, SamplingParams, UsageError, WorkerError
from ssd.pipeline.runtime.launch import LocalPipeline

Configure = Callable[..., dict[str, Any]]

LONG = SamplingParams(max_tokens=420, ignore_eos=True)
PARAMS = [
    SamplingParams(max_tokens=40, ignore_eos=True),
    SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.9, seed=5),
    SamplingParams(max_tokens=31, ignore_eos=True, temperature=1.2, top_p=0.9, seed=6),
]
ASKED = [[9, 30, 77], [5], list(range(20, 50))]
SOON_S = 20.0
"""Generous: the machine may be busy. Deadlines of the pipeline itself are far longer."""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary folder of our own, short enough for socket names, to see what stays in it."""
    tmp_path_factory.getbasetemp()  # pytest's own lies elsewhere
    folder = Path(tempfile.mkdtemp(prefix="st-", dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def config(tiny_config: Configure) -> dict[str, Any]:
    return tiny_config(
        cores=True,
        engine={"max_batch": 2, "max_model_len": 480},
        speculation={"siblings": 1, "forecast": {"budget": 10}},
    )


def pipeline_of(llm: LLM) -> LocalPipeline:
    assert isinstance(llm._pipeline, LocalPipeline)
    return llm._pipeline


def tokens(llm: LLM, method: str) -> list[tuple[int, ...]]:
    return [output.token_ids for output in llm.generate(ASKED, [replace(p, method=method) for p in PARAMS])]


def plain(llm: LLM, params: SamplingParams) -> tuple[int, ...]:
    return llm.generate([ASKED[0]], replace(params, method="none"))[0].token_ids


def gone(pids: list[int], within_s: float = SOON_S) -> bool:
    def lives(pid: int) -> bool:
        return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if not any(lives(pid) for pid in pids):
                return True
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.05)
    return False


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    return {tuple(c.laddr) for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}


def test_same_tokens_and_nothing_left(config: dict[str, Any], scratch: Path) -> None:
    me = psutil.Process()
    ours_before, children_before = listening(me), set(me.children(recursive=True))
    with LLM(config) as llm, LLM(config) as other:  # two on one host do not collide
        expected = tokens(llm, "none")
        for method in ("sd", "ssd"):
            assert tokens(llm, method) == tokens(other, method) == expected
        assert llm.degraded is other.degraded is None
        assert llm.generate([ASKED[0]], PARAMS[0])[0].speculation.accepted > 0
        pids = [*pipeline_of(llm).pids.values(), *pipeline_of(other).pids.values()]
        for pid in pids:  # nobody outside this machine can connect
            assert {host for host, _ in listening(psutil.Process(pid))} <= {"127.0.0.1"}
        assert list(scratch.glob("ssd-*"))
    assert gone(pids, 0.5)
    assert set(me.children(recursive=True)) == children_before
    assert listening(me) == ours_before
    assert list(scratch.glob("ssd-*")) == []


def test_closing_in_the_middle(config: dict[str, Any], scratch: Path) -> None:
    llm = LLM(config)
    pids = list(pipeline_of(llm).pids.values())
    events = llm.stream(ASKED[0], LONG)
    next(events)
    began = time.monotonic()
    llm.close()
    assert time.monotonic() - began < SOON_S
    assert gone(pids, 0.5)
    assert list(scratch.glob("ssd-*")) == []
    with pytest.raises(PipelineError, match="closed"):
        next(events)
    llm.close()  # twice is fine


def killed_in_the_middle(llm: LLM) -> list[int]:
    """An answer whose draft is killed when it has some tokens."""
    draft, got = pipeline_of(llm).pids["draft"], []
    for event in llm.stream(ASKED[0], LONG):
        if len(got) < 40 <= len(got) + len(event.token_ids):
            os.kill(draft, signal.SIGKILL)
        got.extend(event.token_ids)
    return got


def until_back(llm: LLM) -> None:
    deadline = time.monotonic() + 3 * SOON_S
    while llm.degraded:
        assert time.monotonic() < deadline, llm.degraded
        plain(llm, PARAMS[0])


def test_the_draft_is_killed_in_the_middle(config: dict[str, Any], scratch: Path) -> None:
    """It comes back as often as it may; then decoding goes on plainly."""
    config["engine"] |= {"draft_restarts": 1, "draft_restart_delay_s": 0.1}
    me, drafts = psutil.Process(), set()
    children = set(me.children(recursive=True))
    with LLM(config) as llm:
        expected = plain(llm, LONG)
        verifier = psutil.Process(pipeline_of(llm).pids["verifier"])
        open_before = verifier.num_fds()
        drafts.add(pipeline_of(llm).pids["draft"])
        assert tuple(killed_in_the_middle(llm)) == expected
        until_back(llm)
        drafts.add(pipeline_of(llm).pids["draft"])
        assert len(drafts) == 2
        assert llm.generate([ASKED[0]], PARAMS[0])[0].speculation.hits > 0
        assert tokens(llm, "ssd") == tokens(llm, "none")
        assert verifier.num_fds() <= open_before + 2
        assert tuple(killed_in_the_middle(llm)) == expected
        assert tokens(llm, "ssd") == tokens(llm, "none")  # and it goes on, plainly
        assert str(llm.degraded).endswith("(not restarted again: engine.draft_restarts=1)")
        assert pipeline_of(llm).check() == ["draft"]
    assert gone(list(drafts), 0.5)
    assert set(me.children(recursive=True)) == children
    assert list(scratch.glob("ssd-*")) == []


@pytest.mark.slow
def test_closing_while_the_draft_is_restarted(config: dict[str, Any], scratch: Path) -> None:
    config["engine"]["draft_restart_delay_s"] = 0.1
    llm = LLM(config)
    first = pipeline_of(llm).pids["draft"]
    os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + SOON_S
    while pipeline_of(llm).pids.get("draft", first) == first:  # it takes seconds to import and load
        assert time.monotonic() < deadline
        plain(llm, PARAMS[0])
    pids = list(pipeline_of(llm).pids.values())
    llm.close()
    assert gone(pids, 0.5)
    assert list(scratch.glob("ssd-*")) == []


@pytest.mark.slow
def test_the_draft_is_killed_while_idle(config: dict[str, Any]) -> None:
    """The next request is told to nobody: it must not wait for an answer."""
    config["engine"]["draft_restarts"] = 0
    with LLM(config) as llm:
        expected = tokens(llm, "none")
        tokens(llm, "ssd")
        draft = pipeline_of(llm).pids["draft"]
        os.kill(draft, signal.SIGKILL)
        assert gone([draft])
        began = time.monotonic()
        assert tokens(llm, "ssd") == expected
        assert time.monotonic() - began < SOON_S
        assert llm.degraded
        began = time.monotonic()
    assert time.monotonic() - began < SOON_S  # closing too


@pytest.mark.slow
def test_the_draft_falls_silent(config: dict[str, Any]) -> None:
    """Stopped, not dead: engine.link_timeout_s decides. It is killed, and another takes its place."""
    config["engine"] |= {"link_timeout_s": 2.0, "draft_restart_delay_s": 0.1}
    with LLM(config) as llm:
        expected = plain(llm, LONG)
        draft = pipeline_of(llm).pids["draft"]
        events, got, stopped, pauses = llm.stream(ASKED[0], LONG), [], False, []
        last = time.monotonic()
        try:
            for event in events:
                got.extend(event.token_ids)
                pauses.append(time.monotonic() - last)
                last = time.monotonic()
                if not stopped and len(got) > 20:
                    os.kill(draft, signal.SIGSTOP)
                    stopped = True
            until_back(llm)
            assert gone([draft], 0.5)
        finally:
            if psutil.pid_exists(draft):
                os.kill(draft, signal.SIGCONT)
        assert tuple(got) == expected
        assert 1.9 < max(pauses) < 2 + SOON_S
        assert llm.generate([ASKED[0]], PARAMS[0])[0].speculation.hits > 0


def test_the_verifier_is_killed_in_the_middle(config: dict[str, Any]) -> None:
    with LLM(config) as llm:
        pids = pipeline_of(llm).pids
        events = llm.stream(ASKED[0], LONG)
        next(events)
        began = time.monotonic()
        os.kill(pids["verifier"], signal.SIGKILL)
        with pytest.raises(WorkerError, match="verifier"):
            for _ in events:
                pass
        assert time.monotonic() - began < SOON_S
        assert gone([pids["draft"]])  # its link broke
        with pytest.raises(PipelineError):
            llm.generate([ASKED[0]], PARAMS[0])
        assert time.monotonic() - began < 2 * SOON_S
    assert time.monotonic() - began < 3 * SOON_S


SCRIPT = """
import json, sys
from ssd import LLM, SamplingParams

if __name__ == "__main__":
    with LLM(json.loads(sys.argv[1])) as llm:
        print(json.dumps(llm._pipeline.pids), flush=True)
        while True:
            for event in llm.stream([9, 30, 77], SamplingParams(max_tokens=400, ignore_eos=True)):
                pass
"""


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
    ids=lambda number: number.name,
)
def test_the_front_dies(number: signal.Signals, config: dict[str, Any], scratch: Path) -> None:
    front = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        assert front.stdout is not None
        pids = list(json.loads(front.stdout.readline()).values())
        assert all(psutil.pid_exists(pid) for pid in pids)
        time.sleep(0.5)
        front.send_signal(number)
        front.wait(2 * SOON_S)
        assert gone(pids)
        assert list(scratch.glob("ssd-*")) == []
    finally:
        front.kill()
        front.communicate()


def test_a_wrong_path_is_one_line(config: dict[str, Any], scratch: Path) -> None:
    for role in ("target", "draft"):
        wrong = config | {role: config[role] | {"model": "/nowhere/model"}}
        with pytest.raises(UsageError) as error:
            LLM(wrong)
        assert "/nowhere/model" in str(error.value)
        assert "\n" not in str(error.value)
    assert list(scratch.glob("ssd-*")) == []


def test_what_only_a_worker_can_find_wrong_is_one_line_too(config: dict[str, Any], scratch: Path) -> None:
    """Weights that do not fit their configuration; the other worker is sent home."""
    folder = scratch / "damaged"
    shutil.copytree(config["draft"]["model"], folder)
    weights = folder / "model.safetensors"
    stored = load_file(weights)
    del stored["model.layers.0.mlp.up_proj.weight"]
    save_file(stored, weights, {"format": "pt"})
    children = set(psutil.Process().children(recursive=True))
    began = time.monotonic()
    with pytest.raises(UsageError) as error:
        LLM(config | {"draft": config["draft"] | {"model": str(folder)}})
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 60
    assert set(psutil.Process().children(recursive=True)) == children
    assert list(scratch.glob("ssd-*")) == []


@pytest.mark.slow
def test_the_front_dies_while_the_workers_start(config: dict[str, Any], scratch: Path) -> None:
    """The verifier then waits for a draft that will never come, blocked beyond reach of a message."""
    front = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        deadline = time.monotonic() + 60
        while not (workers := psutil.Process(front.pid).children()) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(1.0)
        workers = psutil.Process(front.pid).children()
        assert len(workers) == 2
        workers[1].suspend()  # the draft
        for _ in range(40):
            time.sleep(0.25)
            if list(scratch.glob("ssd-*/ssd-lane-*")):
                break
        else:
            pytest.fail("the verifier did not open its side")
        time.sleep(3.0)
        front.kill()
        front.wait(SOON_S)
        assert gone([workers[0].pid])
        workers[1].resume()
        assert gone([workers[1].pid])
        assert list(scratch.glob("ssd-*")) == []
    finally:
        for process in psutil.Process(front.pid).children() if front.poll() is None else []:
            process.kill()
        front.kill()
        front.communicate()
