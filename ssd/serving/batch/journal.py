"""The results of a batch run on disk. The run can be killed at any moment and resumed.

``OUT.parts/`` holds the run's fingerprint and its shards. Each result is a line appended to a shard, then
synced. A line cut short by a kill is dropped when the run is resumed, so every result is there once or not at
all. ``finish`` writes the output and the error file in the input's order.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import UsageError

SHARD_LINES = 10_000


class Journal:
    """The results of one run.

    Args:
        out: the output file to write.
        fingerprint: hash of everything that results depend on.
        restart: discard what another run left.

    Raises:
        UsageError: another process writes the same output, the results on disk belong to another run, or the
            output exists.
    """

    def __init__(self, out: Path, fingerprint: str, *, restart: bool = False):
        self.out, self.errors = out, out.with_name(out.name + ".errors")
        self.folder = out.with_name(out.name + ".parts")
        if out.exists() and not restart:
            raise UsageError(f"{out} exists already; give another output file, or --restart to replace it")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UsageError(f"another process is writing {out}") from None
        try:
            self._begin(fingerprint, restart)
        except BaseException:
            self._lock.close()
            raise
        self._file: BinaryIO | None = None
        self._lines = 0

    def _begin(self, fingerprint: str, restart: bool) -> None:
        mark = self.folder / "fingerprint"
        if restart:
            mark.unlink(missing_ok=True)
        if mark.exists():
            if mark.read_text(encoding="utf-8") != fingerprint:
                raise UsageError(
                    f"{self.folder} holds results of another run (other input, models or settings); "
                    "finish that one, give another output file, or --restart"
                )
        else:
            for shard in self._shards():
                shard.unlink()
            _write_whole(mark, [fingerprint.encode()])
        self.done: dict[int, bool] = {}
        """Whether a line of the input worked, by its number."""
        for shard in self._shards():
            self._mend(shard)
        for record in self._records():
            self.done[record["line"]] = record["ok"]

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends results (``line``, ``ok``, ``result``). They are synced to disk when it returns."""
        if self._file is None or self._lines >= SHARD_LINES:
            if self._file is not None:
                self._file.close()
            number = len(self._shards())
            self._file, self._lines = (self.folder / f"shard-{number:06}.jsonl").open("ab"), 0
            _sync_folder(self.folder)
        for record in records:
            self._file.write(_encoded(record) + b"\n")
            self.done[record["line"]] = record["ok"]
            self._lines += 1
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Writes the output and the error file, then removes the shards."""
        self._close_shard()
        places: dict[int, tuple[Path, int]] = {}
        for shard in self._shards():
            at = 0
            with shard.open("rb") as file:
                for raw in file:
                    places.setdefault(json.loads(raw)["line"], (shard, at))
                    at += len(raw)
        good = [line for line in sorted(places) if self.done[line]]
        bad = [line for line in sorted(places) if not self.done[line]]
        if bad:
            _write_whole(self.errors, self._results(bad, places))
        else:
            self.errors.unlink(missing_ok=True)
        _write_whole(self.out, self._results(good, places))
        for path in (*self._shards(), self.folder / "fingerprint", self.folder / "lock"):
            path.unlink(missing_ok=True)
        self.close()
        self.folder.rmdir()

    def close(self) -> None:
        """Closes the files. Results stay on disk."""
        self._close_shard()
        self._lock.close()

    def _close_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.jsonl"))

    def _records(self) -> Iterator[dict[str, Any]]:
        for shard in self._shards():
            with shard.open("rb") as file:
                for raw in file:
                    yield json.loads(raw)

    @staticmethod
    def _mend(shard: Path) -> None:
        """Truncates a shard after its last whole line: a write was cut short."""
        with shard.open("r+b") as file:
            whole = 0
            for raw in file:
                try:
                    if not raw.endswith(b"\n") or not isinstance(json.loads(raw), dict):
                        break
                except ValueError:
                    break
                whole += len(raw)
            file.truncate(whole)
            os.fsync(file.fileno())

    @staticmethod
    def _results(lines: list[int], places: dict[int, tuple[Path, int]]) -> Iterator[bytes]:
        opened: dict[Path, BinaryIO] = {}
        try:
            for line in lines:
                shard, at = places[line]
                file = opened.get(shard) or opened.setdefault(shard, shard.open("rb"))
                file.seek(at)
                yield _encoded(json.loads(file.readline())["result"]) + b"\n"
        finally:
            for file in opened.values():
                file.close()


def fingerprint(source: Path, settings: Mapping[str, Any]) -> str:
    """Returns a hash of the input file's bytes and the settings that results depend on."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    with source.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _encoded(value: Any) -> bytes:
    # A lone surrogate becomes its JSON escape.
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace")


def _write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Writes a file so that after a kill it is there whole or not at all."""
    part = path.with_name(path.name + ".new")
    with part.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
