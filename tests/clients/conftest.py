"""Public clients, each in a virtual environment of its own, against one server of a real model.

Environments are kept in the user's cache (``ssd/clients``), by what is installed in them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ssd.testing import real

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
START_S, INSTALL_S, CLIENT_S = 600, 1800, 3600
UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
"""Packages that a client installs and a text model does not need. The index has them built for CUDA only, and next to a
CPU build of torch they cannot be imported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A running server: its address without ``/v1``, the model's name, and the folder of model and tokenizer."""

    url: str
    model: str
    folder: Path


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """``ssd serve`` with SmolLM2, speculating by skipping its layers."""
    folder, name = real.smollm2(), "smollm2"
    with tempfile.TemporaryDirectory(prefix="st-", dir="/tmp") as temporary:
        config = {
            "target": {"model": str(folder), "compile": False},
            "speculation": {"method": "self", "lookahead": 3, "governor": False},
            "engine": {"max_batch": 4, "max_model_len": 2048},
            "server": {"model_name": name, "port": 0},
        }
        (Path(temporary) / "config.yaml").write_text(json.dumps(config))
        with (Path(temporary) / "log").open("w+") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ssd.cli", "serve", "--config", str(Path(temporary) / "config.yaml")],
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            try:
                yield Server(url=_ready(process, Path(log.name)), model=name, folder=folder)
            finally:
                process.terminate()
                process.wait(60)


def _ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """Returns the server's address when it serves."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        said = log.read_text()
        if "\nready" in said:
            url = said.partition("listening on ")[2].split()[0]
            urllib.request.urlopen(f"{url}/ready", timeout=30).close()
            return url
        time.sleep(0.5)
    process.kill()
    pytest.fail(f"the server did not start: {log.read_text()}")


def environment(name: str) -> Path:
    """Returns the interpreter of a client's environment, made at first use.

    Args:
        name: of a file in ``requirements``.
    """
    wanted = HERE / "requirements" / f"{name}.txt"
    what = (wanted.read_text(), sys.version, UNWANTED.get(name))
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:12]
    folder = real.cache_folder().parent / "clients" / f"{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    python = folder / "bin" / "python"
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "complete").exists():
            return python
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "-r", str(wanted)], check=True, timeout=INSTALL_S)
        if unwanted := UNWANTED.get(name):
            subprocess.run([*pip, "uninstall", "--yes", *unwanted], check=True, timeout=INSTALL_S)
        (folder / "complete").touch()
    return python


@pytest.fixture(scope="session")
def failures(server: Server) -> Callable[[str], dict[str, str]]:
    """``failures(client)``: runs a client's script and returns its failed checks with what went wrong."""

    def run(client: str) -> dict[str, str]:
        command = [str(environment(client)), str(HERE / "scripts" / f"{client}_client.py")]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENAI_"))}
        done = subprocess.run(
            [*command, server.url, server.model, str(server.folder)],
            env=clean | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=CLIENT_S,
        )
        assert done.returncode == 0 and done.stdout.strip(), done.stderr[-3000:]
        outcome = json.loads(done.stdout.strip().splitlines()[-1])
        assert outcome
        print(json.dumps(outcome, indent=1))
        return {check: what for check, what in outcome.items() if what.partition(":")[0] != "ok"}

    return run
