"""The surroundings of a worker: cores and quotas, folders for sockets, and what libraries ask the environment."""

from __future__ import annotations

import getpass
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssd.config import machine
from ssd.config.machine import (
    MAX_SOCKET_PATH,
    SOCKET_NAME,
    core_count,
    socket_folder,
    usable_cores,
    worker_environment,
)
from ssd.errors import ConfigError, PipelineError
from ssd.pipeline.runtime import cores
from ssd.pipeline.runtime.cores import set_threads
from ssd.pipeline.transport.lanes import ZmqLane

V2, V1 = "0::/kube/pod\n", "4:memory:/m\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n"


def tree(root: Path, files: dict[str, str], membership: str) -> tuple[Path, Path]:
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "self").write_text(membership)
    return root / "cgroup", root / "self"


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        ({}, V2, 16),
        ({"cpu.max": "max 100000\n"}, V2, 16),
        ({"cpu.max": "200000 100000\n"}, "0::/\n", 2),
        ({"cpu.max": "200000 100000\n"}, "0::/../../elsewhere\n", 2),
        ({"kube/pod/cpu.max": "350000 100000\n"}, V2, 3),
        ({"kube/pod/cpu.max": "800000 100000\n", "kube/cpu.max": "150000 50000\n"}, V2, 3),
        ({"kube/pod/cpu.max": "50000 100000\n"}, V2, 1),
        ({"kube/pod/cpu.max": "9900000 100000\n"}, V2, 16),
        ({"kube/pod/cpu.max": "broken"}, V2, 16),
        ({"cpu/docker/abc/cpu.cfs_quota_us": "400000\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"}, V1, 4),
        ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, V1, 2),
        ({"cpu/docker/abc/cpu.cfs_quota_us": "-1\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"}, V1, 16),
        ({}, "nonsense", 16),
    ],
    ids=[
        *("none", "no limit", "container", "outside the namespace", "own", "parent", "half", "above", "broken"),
        *("version 1", "version 1 container", "version 1 no limit", "unreadable"),
    ],
)
def test_the_quota_of_a_control_group_bounds_the_cores(
    tmp_path: Path, files: dict[str, str], membership: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))
    assert core_count(*tree(tmp_path, files, membership)) == expected


def test_affinity_bounds_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 7})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert core_count(tmp_path, tmp_path / "none") == 2


@pytest.mark.parametrize(
    ("wanted", "workers", "threads"), [(None, 1, 4), (None, 2, 4), (None, 3, 2), (None, 99, 1), ([0, 1, 2], 2, 3)]
)
def test_threads_share_the_cores(
    wanted: list[int] | None, workers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(cores, "core_count", lambda: 8)
    set_threads(wanted, workers)
    assert counts == [threads]


@pytest.mark.parametrize(
    ("wanted", "available", "expected", "said"),
    [
        ([0, 1], {0, 1, 2}, [0, 1], None),
        ([0, 9], {0, 1}, [0], "cores [9] are not available to this process; using [0] of [0, 9]"),
        ([0, 1], {5}, [5], None),
        (None, {5}, None, None),
    ],
    ids=["all", "some", "one core", "any"],
)
def test_cores_that_are_not_there(
    wanted: list[int] | None,
    available: set[int],
    expected: list[int] | None,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: available)
    with caplog.at_level(logging.WARNING):
        assert usable_cores(wanted) == expected
    assert caplog.messages == ([said] if said else [])


def test_none_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {4, 5})
    with pytest.raises(ConfigError) as error:
        usable_cores([0, 1])
    assert "[0, 1]" in str(error.value) and "[4, 5]" in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    return lambda folder: monkeypatch.setattr(tempfile, "tempdir", str(folder))


@pytest.mark.parametrize("length", [1, 40, 60, 120, 200])
@pytest.mark.parametrize("letter", ["x", "é"])
def test_sockets_have_short_paths(tmp_path: Path, length: int, letter: str, temporary: Callable[[Path], None]) -> None:
    long = tmp_path / (letter * min(length, 120)) / (letter * max(1, length - 120))
    long.mkdir(parents=True)
    temporary(long)
    with socket_folder("ssd-front-") as name, socket_folder("ssd-lane-", name) as inner:
        assert Path(inner).parent == Path(name)
        assert len(name.encode()) + SOCKET_NAME <= MAX_SOCKET_PATH
        assert Path(name).stat().st_mode & 0o777 == 0o700
        lane, _ = ZmqLane.bind(f"ipc://{name}/{'d' * (SOCKET_NAME - 1)}")
        lane.close()
    assert not Path(name).exists() and list(long.iterdir()) == []


def test_without_a_place_for_sockets(
    tmp_path: Path, temporary: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary(tmp_path / "nowhere")
    monkeypatch.setattr(machine, "SOCKET_FOLDERS", (str(tmp_path / "no"), str(tmp_path / ("x" * 100))))
    (tmp_path / ("x" * 100)).mkdir()
    with pytest.raises(PipelineError, match="TMPDIR"):
        socket_folder("ssd-front-")


def unknown(*_: object) -> None:
    raise KeyError("getpwuid(): uid not found: 12345")


def homeless(*_: object) -> None:
    raise RuntimeError("Could not determine home directory.")


def test_a_known_user_keeps_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert worker_environment() == dict(os.environ)


@pytest.mark.parametrize("variable", [None, *sorted(machine.WAITING)])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(
    variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in machine.WAITING:
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "7")
    found = {name: value for name, value in worker_environment().items() if name in machine.WAITING}
    assert found == ({"OMP_WAIT_POLICY": "PASSIVE"} if variable is None else {variable: "7"})


def test_an_unknown_user_gets_a_name_and_a_home(
    tmp_path: Path, temporary: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(getpass, "getuser", unknown)
    monkeypatch.setattr(Path, "home", homeless)
    environment = worker_environment()
    home = Path(environment["HOME"])
    assert environment["USER"] == f"uid-{os.getuid()}"
    assert home.parent == tmp_path and home.stat().st_mode & 0o777 == 0o700
    assert worker_environment()["HOME"] == str(home)  # its caches are found again
    assert "HOME" not in os.environ


@pytest.mark.parametrize("kind", ["link", "file", "writable"])
def test_a_home_that_somebody_else_prepared_is_not_used(
    kind: str, tmp_path: Path, temporary: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary(tmp_path)
    monkeypatch.setattr(Path, "home", homeless)
    planted = tmp_path / f"ssd-home-uid-{os.getuid()}"
    if kind == "link":
        (tmp_path / "theirs").mkdir()
        planted.symlink_to(tmp_path / "theirs")
    elif kind == "file":
        planted.write_text("")
    else:
        planted.mkdir()
        planted.chmod(0o777)
    home = Path(worker_environment()["HOME"])
    assert home != planted and home.parent == tmp_path and home.stat().st_mode & 0o777 == 0o700
