"""``ssd batch`` over a scripted pipeline: formats, bad lines, and kills at any moment."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import pydoc
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd.config.load import load_config
from ssd.config.sections import Config
from ssd.errors import UsageError
from ssd.serving.batch.journal import Journal
from ssd.serving.batch.lines import MAX_LINE_BYTES, read_lines
from ssd.serving.batch.run import Batch, Progress
from ssd.testing.twins.pipeline import ScriptedPipeline

ROOT = Path(__file__).resolve().parents[2]
SLOW_S = 0.02
RUN = f"""
import asyncio, sys
from functools import partial
from pathlib import Path
from ssd.config.load import load_config
from ssd.serving.batch.run import Batch
from ssd.testing.twins.pipeline import ScriptedPipeline
config = load_config("embedded", ["engine.max_batch=3"])
job = Batch(config, Path(sys.argv[1]), Path(sys.argv[2]), launch=partial(ScriptedPipeline, round_s={SLOW_S}))
asyncio.run(job.run())
"""


def config_of(*overrides: str) -> Config:
    return load_config("embedded", ["engine.max_batch=3", *overrides])


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def perform(source: Path, out: Path, *overrides: str, restart: bool = False) -> Progress:
    launch = partial(ScriptedPipeline, round_s=0.001)
    return asyncio.run(Batch(config_of(*overrides), source, out, restart=restart, launch=launch).run())


def plain(count: int) -> list[Any]:
    return [{"id": f"r{n}", "prompt": f"prompt {n}", "max_tokens": 5 + n % 9, "temperature": 0.5} for n in range(count)]


def test_both_formats_and_bad_lines(tmp_path: Path) -> None:
    body = {"model": "embedded", "max_tokens": 4}
    chat = {**body, "messages": [{"role": "user", "content": "hi"}]}
    lines: list[Any] = [
        {"prompt": "one", "max_tokens": 3},
        "{not json",
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {**body, "prompt": "x", "n": 2}},
        {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        "",
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {**body, "prompt": "x"}},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {**body, "prompt": "x", "top_p": 7}},
        {"custom_id": "d", "method": "GET", "url": "/v1/completions", "body": {}},
        {"prompt": "p" * 5000},
        {"id": "two", "prompt": [5, 6], "max_tokens": 3, "best_of": 3},
        {"id": "three", "prompt": [5, 6], "max_tokens": 3},
        "[1]",
    ]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    progress = perform(source, out, "server.unknown_parameters=refuse")
    good, bad = read(out), read(tmp_path / "out.jsonl.errors")
    assert [r.get("custom_id") or r["id"] for r in good] == ["line-1", "a", "b", "three"]
    assert [r.get("line") or (r["error"] or {}).get("line") for r in bad] == [2, 6, None, 8, 9, 10, 12]
    assert (progress.total, progress.done, progress.failed) == (11, 11, 7)
    assert len(good[1]["response"]["body"]["choices"]) == 2 and good[1]["response"]["status_code"] == 200
    assert good[2]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    refused = bad[2]["response"]
    assert refused["status_code"] == 400 and "top_p" in refused["body"]["error"]["message"]
    assert "in use" in bad[1]["error"]["message"]
    assert "max_model_len" in bad[4]["error"]["message"] and bad[5]["error"]["param"] == "best_of"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.errors"]


def test_unknown_fields_of_lines_are_logged_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [{"prompt": [5, 6], "max_tokens": 3, "seed": 1, **change} for change in ({}, {"typo": 1}, {"typo": 2})]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert perform(source, out).failed == 0
    assert len({line["text"] for line in read(out)}) == 1
    assert [record.getMessage() for record in caplog.records if "'typo'" in record.getMessage()] == [
        "unknown request parameter 'typo' is ignored (server.unknown_parameters)"
    ]
    refused = tmp_path / "refused.jsonl"
    assert perform(source, refused, "server.unknown_parameters=refuse").failed == 2
    assert {line["error"]["param"] for line in read(tmp_path / "refused.jsonl.errors")} == {"typo"}


def test_another_run_is_not_mixed_in(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", plain(3)), tmp_path / "out.jsonl"
    perform(source, out)
    with pytest.raises(UsageError, match="--restart"):
        perform(source, out)
    assert perform(source, out, restart=True).resumed == 0
    out.unlink()
    job = Batch(config_of(), source, out)
    with pytest.raises(UsageError, match="another process"):
        Batch(config_of(), source, out)
    job.journal.add([{"line": 1, "ok": True, "result": {"id": "r0"}}])
    job.journal.close()
    for other in ("numerics=fast", "server.unknown_parameters=refuse", "server.long_requests=cut"):
        with pytest.raises(UsageError, match="another run"):
            perform(source, out, other)
    write(source, plain(4))
    with pytest.raises(UsageError, match="another run"):
        perform(source, out)


def test_files_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Batch(config_of(), tmp_path / "none", tmp_path / "out")
    empty = write(tmp_path / "empty", [""])
    with pytest.raises(UsageError, match="no lines"):
        Batch(config_of(), empty, tmp_path / "out")
    with pytest.raises(UsageError, match="does not exist"):
        Batch(config_of(), write(tmp_path / "in", plain(1)), tmp_path / "no" / "out")


def test_seeds_come_from_the_ids(tmp_path: Path) -> None:
    seeds = [line.body["seed"] for line in read_lines(write(tmp_path / "in", plain(50)), "m") if line.body]
    assert len(set(seeds)) == 50
    assert seeds == [line.body["seed"] for line in read_lines(tmp_path / "in", "m") if line.body]


def test_killed_again_and_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*plain(90), "broken"])
    calm, out = tmp_path / "calm.jsonl", tmp_path / "out.jsonl"
    perform(source, calm)
    chance, kills = random.Random(5), 0
    log = (tmp_path / "log").open("wb")
    while not out.exists():
        process = subprocess.Popen([sys.executable, "-c", RUN, str(source), str(out)], cwd=ROOT, stderr=log)
        try:
            seen = _records(tmp_path)
            deadline = time.monotonic() + 120.0
            while process.poll() is None and _records(tmp_path) == seen and time.monotonic() < deadline:
                time.sleep(0.01)
            if kills < 4:
                time.sleep(chance.uniform(0, 0.3))
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGKILL)
                    kills += 1
            assert process.wait(120) in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
        finally:
            process.kill()
            process.wait()
    assert kills >= 2

    def told(path: Path) -> list[tuple[str, str]]:
        return [(record["id"], record["text"]) for record in read(path)]

    assert told(out) == told(calm)
    assert len(told(out)) == 90
    assert read(tmp_path / "out.jsonl.errors") == read(tmp_path / "calm.jsonl.errors")
    assert not (tmp_path / "out.jsonl.parts").exists()


def _records(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (folder / "out.jsonl.parts").glob("shard-*"))


@given(cut=st.integers(0, 400), garbage=st.binary(max_size=20))
def test_a_shard_cut_anywhere(cut: int, garbage: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("journal")
    out = folder / "out"
    journal = Journal(out, "f")
    journal.add({"line": n, "ok": True, "result": {"n": n, "text": "é" * n}} for n in range(1, 6))
    journal.close()
    [shard] = (folder / "out.parts").glob("shard-*")
    whole = shard.read_bytes()
    cut = min(cut, len(whole))
    shard.write_bytes(whole[:cut] + garbage.replace(b"\n", b""))
    again = Journal(out, "f")
    kept = whole[:cut].count(b"\n")
    assert again.done == {n: True for n in range(1, kept + 1)}
    again.add({"line": n, "ok": n != 4, "result": {"n": n}} for n in range(kept + 1, 6))
    again.finish()
    numbers = [record["n"] for record in read(out)] + ([4] if again.errors.exists() else [])
    assert sorted(numbers) == [1, 2, 3, 4, 5]
    for path in (out, again.errors):
        path.unlink(missing_ok=True)
    folder.rmdir()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from ssd.cli.app import make_app

    monkeypatch.setattr("ssd.serving.batch.run.Batch", partial(Batch, launch=ScriptedPipeline))
    source, out = write(tmp_path / "in.jsonl", plain(5)), tmp_path / "out.jsonl"
    answer = CliRunner().invoke(make_app(), ["batch", str(source), str(out), "--set", "engine.max_batch=2"])
    assert answer.exit_code == 0, answer.output
    assert f"5 requests, 0 failed, 0 done before, {5 + 6 + 7 + 8 + 9} tokens now" in answer.output
    assert len(read(out)) == 5
    assert CliRunner().invoke(make_app(), ["batch", str(source), str(out)]).exit_code == 2
    write(source, [*plain(2), "bad"])
    answer = CliRunner().invoke(make_app(), ["batch", str(source), str(out), "--restart"])
    assert answer.exit_code == 1 and "out.jsonl.errors" in answer.output
    keys = CliRunner().invoke(make_app(), ["lane-keys", str(tmp_path / "keys"), "bob"])
    assert keys.exit_code == 0 and (tmp_path / "keys" / "clients" / "bob.key").is_file()


HOSTILE: list[tuple[bytes, str]] = [
    (b'{"prompt": "\\ud800"}', "surrogate"),
    (b'{"id": "\\ud800", "prompt": "x"}', "surrogate"),
    (b'{"id": "a", "prompt": "x", "\\ud800": 1}', "surrogate"),
    (b'{"prompt": "x", "stop": "\\ud800"}', "surrogate"),
    (b'{"prompt": "x", "top_k": 18446744073709551616}', "top_k"),
    (b'{"prompt": "x", "temperature": 1e39}', "temperature"),
    (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
    (b'{"prompt": "x", "temperature": NaN}', "NaN"),
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "digits"),
    (b'{"id": ' + b"9" * 4000 + b', "prompt": "x"}', "too large"),
    (b'{"id": NaN, "prompt": "x"}', "NaN"),
    (b'{"id": true, "prompt": "x"}', "id"),
    (b'{"id": "", "prompt": "x"}', "id"),
    (b'{"id": ["x"], "prompt": "x"}', "id"),
    (b'{"prompt": "x", "prompt": "y"}', "twice"),
    (b'{"prompt": "x", "model": "y"}', "model"),
    (b"\xff\xfe\x00", "UTF-8"),
    (b'{"prompt": "\xff"}', "UTF-8"),
    (b"\x00", "JSON"),
    (b"[" * 100_000, "nested"),
    (b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}", "nested"),
    (b"null", "object"),
    (b'"text"', "object"),
    (b"7", "object"),
    (b"[{}]", "object"),
    (b"{}", "prompt"),
    (b'{"prompt": null}', "prompt"),
    (b'{"prompt": {}}', "prompt"),
    (b'{"prompt": [-1]}', "prompt"),
    (b'{"prompt": [18446744073709551615]}', "prompt"),
    (b'{"custom_id": "\\udfff", "method": "POST", "url": "/v1/completions", "body": {}}', "surrogate"),
    (b'{"custom_id": 7, "method": "POST", "url": "/v1/completions", "body": {}}', "custom_id"),
    (b'{"custom_id": "p", "method": ["POST"], "url": "/v1/completions", "body": {}}', "method"),
    (b'{"custom_id": "q", "method": "POST", "url": {"a": 1}, "body": {}}', "url"),
    (b'{"custom_id": "r", "method": "POST", "url": "/v1/completions", "body": []}', "body"),
    (b'{"custom_id": "s", "method": "POST", "url": "/v1/completions", "body": {"stream": true}}', "stream"),
    (b'{"custom_id": "t", "method": "POST", "url": "/v1/completions", "body": {"seed": "x"}}', "prompt"),
    (b'{"body": 1}', "custom_id"),
    (b'{"id": "good-0", "prompt": "x"}', "in use"),
    (b'{"prompt": "' + b"x" * (MAX_LINE_BYTES + 10) + b'"}', "longer than"),
]
"""Lines that cannot work, and what their error says."""


def hostile_file(path: Path) -> Path:
    """A good line before each bad one; no newline at the end."""
    good = b'{"id": "good-%d", "prompt": "p %d", "max_tokens": 3}'
    path.write_bytes(b"\n".join(good % (n, n) + b"\n" + raw for n, (raw, _) in enumerate(HOSTILE)))
    return path


def check_hostile(out: Path) -> None:
    assert [record["id"] for record in read(out)] == [f"good-{n}" for n in range(len(HOSTILE))]
    bad = read(out.with_name(out.name + ".errors"))
    errors = [record["error"] or record["response"]["body"]["error"] for record in bad]
    for number, (record, error, (raw, said)) in enumerate(zip(bad, errors, HOSTILE, strict=True)):
        if record["error"] is not None:
            assert 2 * number + 2 == (record["line"] if "line" in record else error["line"])
        message = error["message"]
        assert said in message and "\n" not in message and len(message) <= 600, (raw[:80], message)


def test_bad_lines_go_to_the_error_file(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    progress = perform(hostile_file(tmp_path / "in.jsonl"), out)
    assert (progress.total, progress.failed) == (2 * len(HOSTILE), len(HOSTILE))
    check_hostile(out)


def test_a_run_with_hostile_lines_is_resumed(tmp_path: Path) -> None:
    source, out = hostile_file(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"

    class Enough(Exception):
        """Ends the first run."""

    def stop_soon(progress: Progress) -> None:
        if progress.done:
            raise Enough

    job = Batch(config_of(), source, out, launch=partial(ScriptedPipeline, round_s=0.05))
    with pytest.raises(BaseExceptionGroup):
        asyncio.run(job.run(stop_soon))
    assert perform(source, out).resumed > 0
    check_hostile(out)


@pytest.mark.parametrize("place", ["completion", "_seeded", "tokenize", "whole"])
def test_an_unexpected_error_ends_one_line(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"id": "a", "prompt": "first"}, {"id": "b", "prompt": "broken"}, {"id": "c", "prompt": "last"}]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    owner, name = {
        "completion": ("ssd.serving.openai.jobs.JobReader", "completion"),
        "_seeded": ("ssd.serving.batch.lines", "_seeded"),
        "tokenize": ("ssd.engine.async_engine.AsyncEngine", "tokenize"),
        "whole": ("ssd.serving.openai.generation.Generation", "whole"),
    }[place]
    target = pydoc.locate(owner)
    original = getattr(target, name)
    calls = itertools.count()

    def breaking(*args: Any, **more: Any) -> Any:
        if "broken" in str(args) or (place == "whole" and next(calls) == 1):
            raise ZeroDivisionError("the inside")
        return original(*args, **more)

    monkeypatch.setattr(target, name, breaking)
    progress = perform(source, out)
    assert (progress.done, progress.failed) == (3, 1)
    [bad] = read(tmp_path / "out.jsonl.errors")
    assert "ZeroDivisionError" in bad["error"]["message"] and "inside" not in bad["error"]["message"]


texts = st.text(st.characters(), max_size=6)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["id", "prompt", "custom_id", "method", "url", "body", "seed", "stop", "top_k", "max_tokens"])
json_like = st.dictionaries(names, anything, max_size=5).map(lambda value: json.dumps(value).encode())


@settings(max_examples=15, deadline=None)
@given(raw=st.lists(st.one_of(st.binary(max_size=40), json_like), min_size=1, max_size=20))
def test_random_lines_never_end_a_run(raw: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("random")
    good = b'{"id": "good", "prompt": "p", "max_tokens": 2}'
    source = folder / "in.jsonl"
    source.write_bytes(b"\n".join([good, *(line.replace(b"\n", b" ") for line in raw)]))
    progress = perform(source, folder / "out.jsonl")
    assert progress.done == progress.total
    assert read(folder / "out.jsonl")[0]["id"] == "good"
