"""torchrun: workers as ranks decode the same tokens, and nothing is left behind however it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launch.commands import in_order

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240
MARK = "SSD_TEST_MARK"


class Launch:
    """A torchrun, its output and its descendants, which all inherit an environment variable."""

    def __init__(self, scratch: Path, *arguments: str, ranks: int = 2):
        self.mark = uuid.uuid4().hex
        # Not in tmp_path: its name is too long for a socket's.
        self.scratch = Path(tempfile.mkdtemp(prefix="ssd-test-"))
        environment = {**os.environ, MARK: self.mark, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.scratch)}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        self.out, self.err = scratch / "out.txt", scratch / "err.txt"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [*command, str(ROOT / "launch" / "torchrun.py"), *arguments],
                env=environment,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def wait(self) -> int:
        return self.process.wait(LIMIT_S)

    def wait_for_output(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not self.out.read_text():
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def role(self, role: str) -> psutil.Process:
        """The process of ``front``, ``verifier`` (rank 0) or ``draft`` (rank 1)."""
        rank = "1" if role == "draft" else "0"
        for process in self.family():
            is_front = process.ppid() != self.process.pid
            if process.environ().get("RANK") == rank and is_front == (role == "front"):
                return process
        raise AssertionError(f"no {role}")

    def assert_nothing_left(self, within_s: float = 20) -> None:
        _, alive = psutil.wait_procs(self.family(), timeout=within_s)
        assert not alive, [process.cmdline() for process in alive]
        assert not list(self.scratch.glob("ssd-*"))

    def clean_up(self) -> None:
        for process in self.family():
            process.kill()
        self.process.wait()
        shutil.rmtree(self.scratch)


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    launches: list[Launch] = []

    def start(*arguments: str, ranks: int = 2) -> Launch:
        launches.append(Launch(tmp_path, *arguments, ranks=ranks))
        return launches[-1]

    yield start
    for launch in launches:
        launch.clean_up()


@pytest.fixture
def config(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(cores=True, engine={"max_model_len": 400})))
    return str(path)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_methods_agree(torchrun: Callable[..., Launch], config: str, tmp_path: Path, temperature: float) -> None:
    prompts, report = tmp_path / "prompts.jsonl", tmp_path / "report.json"
    prompts.write_text('{"prompt": "hello there"}\n{"prompt": "a b c d"}\n')
    launch = torchrun(
        "--config",
        config,
        "compare",
        "--prompts",
        str(prompts),
        "--methods",
        "none,sd,ssd",
        "--json",
        str(report),
        "--max-tokens",
        "40",
        "--seed",
        "5",
        "--temperature",
        str(temperature),
    )
    assert launch.wait() == 0, launch.err.read_text()
    figures = json.loads(report.read_text())
    assert figures["identical_all"] is True
    assert figures["methods"]["sd"]["identical"] and figures["methods"]["ssd"]["identical"]
    assert figures["methods"]["ssd"]["hit_rate"] > 0  # the draft did take part
    launch.assert_nothing_left()


def test_wrong_number_of_ranks(torchrun: Callable[..., Launch], config: str) -> None:
    launch = torchrun("--config", config, "generate", "hello", ranks=1)
    assert launch.wait() == 1  # torchrun's, for any failure
    said = launch.err.read_text()
    assert "error: torchrun started 1 processes" in said and "--nproc-per-node 2" in said
    assert "exitcode: 2" in said.replace("exitcode  :", "exitcode:")
    launch.assert_nothing_left()


@pytest.mark.parametrize("end", ["interrupt", pytest.param("front", marks=pytest.mark.slow), "verifier", "draft"])
def test_one_leaves_all_leave(torchrun: Callable[..., Launch], config: str, end: str) -> None:
    endless = ("--max-tokens", "390", "--set", "speculation.method=ssd")
    launch = torchrun("--config", config, "generate", "hello there", *endless)
    launch.wait_for_output()
    if end == "interrupt":
        launch.process.send_signal(signal.SIGINT)
    else:
        launch.role(end).kill()
    assert launch.wait() != 0
    launch.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("several", ["target.tensor_parallel=2", "draft.data_parallel=2"])
def test_two_ranks_of_a_model(torchrun: Callable[..., Launch], config: str, tmp_path: Path, several: str) -> None:
    prompts, report = tmp_path / "prompts.jsonl", tmp_path / "report.json"
    prompts.write_text('{"prompt": "hello there"}\n{"prompt": "a b c d"}\n')
    options = {"--prompts": str(prompts), "--methods": "none,sd,ssd", "--json": str(report), "--max-tokens": "40"}
    ranks = ("--config", config, "--set", several)
    launch = torchrun(*ranks, "compare", *(word for option in options.items() for word in option), ranks=3)
    assert launch.wait() == 0, launch.err.read_text()
    figures = json.loads(report.read_text())
    assert figures["identical_all"] is True
    assert figures["methods"]["ssd"]["hit_rate"] > 0
    launch.assert_nothing_left()


@pytest.mark.slow
def test_a_rank_of_the_verifier_dies(torchrun: Callable[..., Launch], config: str) -> None:
    ranks = ("--config", config, "--set", "target.tensor_parallel=2")
    launch = torchrun(*ranks, "generate", "hello there", "--max-tokens", "390", ranks=3)
    launch.wait_for_output()
    launch.role("draft").kill()  # rank 1, which is the verifier's second here
    assert launch.wait() != 0
    launch.assert_nothing_left()


def test_options_before_the_command() -> None:
    arguments = ["--config", "x", "--set", "a=b", "--set=c=d", "generate", "--config", "-c"]
    assert in_order(arguments) == ["generate", "--config", "x", "--set", "a=b", "--set=c=d", "--config", "-c"]
    assert in_order(["--help"]) == ["--help"]
    assert in_order([]) == []
