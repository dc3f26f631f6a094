"""``ssd serve`` as a process, for the scripts beside this file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """A server process on a free port. It is ready when the ``with`` block begins and gets SIGTERM when the block ends,
    if it still runs.

    Args:
        config: a shipped name or a YAML file.
        overrides: ``a.b=c`` each.
        start_s: seconds it may take to start.

    Raises:
        RuntimeError: it did not start; the message has its output.
    """

    def __init__(self, config: str, overrides: Sequence[str], *, start_s: float = 900.0):
        self.folder = tempfile.TemporaryDirectory(prefix="ssd-bench-")
        self._log = (Path(self.folder.name) / "log").open("w+")
        sets = [part for override in overrides for part in ("--set", override)]
        command = [sys.executable, "-m", "ssd.cli", "serve", "--config", config, "--port", "0", *sets]
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": self.folder.name}
        self.process = subprocess.Popen(command, stderr=self._log, env=self.environment)
        self._start_s = start_s
        self.url = ""

    def __enter__(self) -> Self:
        deadline = time.monotonic() + self._start_s
        while time.monotonic() < deadline and self.process.poll() is None:
            said = self.said()
            if "\nready" in said:
                self.url = said.partition("listening on ")[2].split()[0]
                return self
            time.sleep(0.2)
        self.__exit__()
        raise RuntimeError(f"the server did not start: {self.said()}")

    def __exit__(self, *_exc: object) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGTERM)

    def said(self) -> str:
        """Returns what the server has written to stderr."""
        self._log.seek(0)
        return self._log.read()

    def stop(self, number: signal.Signals, *, wait_s: float = 120.0) -> int:
        """Sends a signal, waits for the end and returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(wait_s)

    def processes(self) -> dict[str, psutil.Process]:
        """Returns the front and its workers by role."""
        front = psutil.Process(self.process.pid)
        found = {"front": front}
        for child in front.children(recursive=True):
            line = child.cmdline()
            if "ssd.pipeline.runtime.process" in line:
                found["worker " + str(len(found))] = child
        return found

    def get(self, path: str) -> str:
        """Returns the text at a path."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()
