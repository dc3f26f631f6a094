"""The C++ operators for CPUs (``csrc/``), built at first use and kept in the user's cache.

``ssd::pack`` and ``ssd::rows_linear`` (``rows_linear.py``), ``ssd::rows_attention`` (``attention/tree_attention.py``),
``ssd::gumbel`` (``decoding/noise.py``), ``ssd::filter_logits`` and ``ssd::scores`` (``decoding/sampling.py``),
``ssd::penalize`` (``decoding/processors.py``). A second library, since it takes a minute to compile and only GGUF files
need it: ``ssd::blocks_linear``, ``ssd::blocks_rows`` and ``ssd::pack_blocks`` (``blocks_linear.py``).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "csrc"
BLOCKS = (FOLDER / "blocks_linear.cpp",)
SOURCES = tuple(path for path in sorted(FOLDER.glob("*.cpp")) if path not in BLOCKS)
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-shared", "-DAT_PARALLEL_OPENMP=1")
BUILD_LIMIT_S = 600.0


def loaded() -> bool:
    """Returns whether the operators are loaded into this process."""
    return hasattr(torch.ops.ssd, "rows_linear")


def compiler() -> str | None:
    """Returns the path of the C++ compiler that builds the operators, or None."""
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def available() -> bool:
    """Loads the operators, and builds them if they are not in the cache.

    Returns False where there is no compiler, or building or loading fails.
    """
    if loaded():
        return True
    if not _load("rows", SOURCES):
        return False
    torch.library.register_fake("ssd::rows_linear", _linear)
    torch.library.register_fake("ssd::rows_attention", _attention)
    torch.library.register_fake("ssd::filter_logits", _like_logits)
    torch.library.register_fake("ssd::scores", _like_logits)
    return True


def blocks_available() -> bool:
    """Does what ``available`` does, for the operators of quantised blocks as well."""
    if hasattr(torch.ops.ssd, "blocks_linear"):
        return True
    if not (available() and _load("blocks", BLOCKS)):
        return False
    torch.library.register_fake("ssd::blocks_linear", _blocks_linear)
    torch.library.register_fake("ssd::blocks_rows", _blocks_rows)
    return True


def _load(name: str, sources: tuple[Path, ...]) -> bool:
    program = compiler()
    if program is None:
        return False
    try:
        torch.ops.load_library(_build(program, name, sources))
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _linear(input: Tensor, packed: Tensor, outputs: int) -> Tensor:
    return input.new_empty((*input.shape[:-1], outputs))


def _blocks_linear(input: Tensor, packed: Tensor, type: int, outputs: int) -> Tensor:
    return input.new_empty((*input.shape[:-1], outputs))


def _blocks_rows(ids: Tensor, packed: Tensor, type: int, outputs: int, depth: int) -> Tensor:
    return ids.new_empty((*ids.shape, depth), dtype=torch.float32)


def _attention(query: Tensor, *_others: object) -> Tensor:
    batch, heads, rows, dim = query.shape
    return query.new_empty((batch, rows, heads, dim))


def _like_logits(logits: Tensor, *_others: object) -> Tensor:
    return logits.new_empty(logits.shape)


def _build(compiler: str, name: str, sources: tuple[Path, ...]) -> Path:
    """Returns the shared library for these sources and flags, this torch and this processor."""
    from torch.utils import cpp_extension

    what = (
        *(file.read_text() for file in (*sources, *sorted(FOLDER.glob("*.h")))),
        *FLAGS,
        torch.__version__,
        compiler,
        platform.node(),
        _processor(),
    )
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssd"
    library = folder / f"{name}-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    # Built in a temporary folder and moved: several workers may build it at the same time.
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        made = Path(aside) / library.name
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        command = [
            compiler,
            *FLAGS,
            abi,
            *includes,
            # One translation unit, so that torch's headers, which take most of the time, are read once.
            *(argument for source in sources for argument in ("-include", str(source))),
            *("-x", "c++", os.devnull),
            "-o",
            str(made),
            *libraries,
            "-ltorch_cpu",
            "-lc10",
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=BUILD_LIMIT_S)
        made.replace(library)
    return library


def _processor() -> str:
    """Returns what ``-march=native`` depends on, as far as the system reports it."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    return next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
