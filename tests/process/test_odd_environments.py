"""``ssd generate`` where containers and batch systems put it: no home, an unknown user, a long temporary folder, a
folder that cannot be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNKNOWN_UID = "54321"
READS = "dac_read_search"
"""The capability that lets another user read this checkout and its Python, wherever they lie."""
AS_ANOTHER = (
    *("setpriv", f"--reuid={UNKNOWN_UID}", f"--regid={UNKNOWN_UID}", "--clear-groups"),
    *(f"--inh-caps=+{READS}", f"--ambient-caps=+{READS}", f"--bounding-set=-all,+{READS}"),
)
RUN = [sys.executable, "-m", "ssd.cli", "generate", "def main():", "--max-tokens", "6", "--temperature", "0"]
PLAIN = ["--set", "target.compile=false", "--set", "draft.compile=false"]
START_S = float(os.environ.get("SSD_TEST_START_S", "280"))
pytestmark = pytest.mark.timeout(60 + 2 * START_S)


def generate(environment: dict[str, str], *more: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    base = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*prefix, *RUN, *more], cwd="/", env={**base, **environment}, capture_output=True, text=True, timeout=START_S
    )


@pytest.fixture
def another(tmp_path: Path) -> tuple[str, ...]:
    """A command prefix: run as a user without a name or a home."""
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv")
    tried = subprocess.run(
        [*AS_ANOTHER, sys.executable, "-c", "import os; open('/x', 'w')"], capture_output=True, text=True
    )
    if "Permission denied: '/x'" not in tried.stderr:
        pytest.skip("cannot become another user here")
    return AS_ANOTHER


@pytest.fixture
def folder() -> Iterator[Callable[[str], Path]]:
    """Makes folders that everybody may write, directly below /tmp."""
    with tempfile.TemporaryDirectory(prefix="odd-", dir="/tmp") as base:
        Path(base).chmod(0o755)

        def make(name: str) -> Path:
            path = Path(base, name)
            path.mkdir(parents=True)
            path.chmod(0o1777)
            return path

        yield make


@pytest.fixture(scope="module")
def expected() -> str:
    done = generate({"HOME": os.environ.get("HOME", "/tmp")}, *PLAIN)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(done: subprocess.CompletedProcess[str], expected: str) -> None:
    assert done.returncode == 0 and done.stdout == expected, done.stderr
    assert "Traceback" not in done.stderr and "rror" not in done.stderr, done.stderr


def test_no_home_no_name_a_long_temporary_folder_and_a_working_folder_that_cannot_be_written(
    another: tuple[str, ...], folder: Callable[[str], Path], expected: str
) -> None:
    temporary = folder("x" * 120)
    done = generate({"TMPDIR": str(temporary)}, *PLAIN, prefix=another)
    check(done, expected)
    left = [path.name for path in temporary.iterdir()]
    assert not [name for name in left if not name.startswith(("ssd-home-", "torchinductor"))]
    assert not [path for path in Path("/tmp").glob("ssd-front-*") if path.stat().st_uid == int(UNKNOWN_UID)]


@pytest.mark.slow
def test_compiling_without_home_and_name(
    another: tuple[str, ...], folder: Callable[[str], Path], expected: str
) -> None:
    done = generate({"TMPDIR": str(folder("t"))}, prefix=another)
    check(done, expected)


@pytest.mark.parametrize("home", ["/proc", "/nowhere/at/all"])
def test_a_home_that_cannot_be_written(
    home: str, another: tuple[str, ...], folder: Callable[[str], Path], expected: str
) -> None:
    check(generate({"TMPDIR": str(folder("t")), "HOME": home}, *PLAIN, prefix=another), expected)


def test_without_a_folder_for_sockets_there_is_one_line(another: tuple[str, ...]) -> None:
    if Path(sys.prefix).is_relative_to("/tmp"):
        pytest.skip("this Python lies in a folder that the test hides")
    hidden = ("unshare", "--mount", "sh", "-c")
    script = 'for f in /tmp /var/tmp /dev/shm; do mount -t tmpfs -o mode=755 none $f || exit 77; done; exec "$@"'
    done = generate({"HOME": "/nowhere"}, *PLAIN, prefix=(*hidden, script, "sh", *another))
    if done.returncode == 77:
        pytest.skip("cannot mount here")
    assert done.returncode in (2, 3) and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "TMPDIR" in done.stderr
