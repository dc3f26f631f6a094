"""The oldest and the newest supported transformers: tiny models of every kind of layers, in the census' short form."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT_CENSUS = ["tests/unit/equality/test_census.py", "tests/unit/models/test_rows_and_cache.py"]


def supported() -> tuple[str, str]:
    """Returns the first release that pyproject.toml allows, and the first that it does not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [line] = [line for line in project["dependencies"] if line.startswith("transformers")]
    found = re.fullmatch(r"transformers>=([\d.]+),<([\d.]+)", line)
    assert found, line
    return found[1], found[2]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_short_census(which: str, tmp_path: Path) -> None:
    first, beyond = supported()
    wanted = f"transformers=={first}.*" if which == "oldest" else f"transformers<{beyond}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(tmp_path)]
    subprocess.run([*pip, "--no-deps", wanted], check=True, timeout=300)
    [facts] = tmp_path.glob("transformers-*.dist-info/METADATA")
    hub = re.search(r"^Requires-Dist: (huggingface-hub.*)$", facts.read_text(encoding="utf-8"), re.MULTILINE)
    assert hub
    subprocess.run([*pip, hub[1]], check=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    show = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    used = subprocess.run(show, env=environment, check=True, timeout=120, capture_output=True, text=True).stdout.strip()
    assert facts.parent.name == f"transformers-{used}.dist-info"
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SHORT_CENSUS]
    done = subprocess.run(run, cwd=ROOT, env=environment, timeout=1200, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
