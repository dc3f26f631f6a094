"""Linear layers for a few rows on CPUs (``csrc/rows_linear.cpp``): built on first use, kept in a cache.

A decode forward multiplies one to twenty rows with every weight once; it should take as long as
reading the weights. Measured on 17.7 M float32 weights (one shared AVX-512 core): 2.7 ms with one row, 2.8
with five, where ``torch.mm`` takes 2.7 and 4.5; 1.6 and 2.2 where they are bfloat16 numbers and kept as
such. A row's result is the same bits however many rows there are.
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
from torch import Tensor, nn

SOURCE = Path(__file__).parent / "csrc" / "rows_linear.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-shared", "-DAT_PARALLEL_OPENMP=1")
BUILD_LIMIT_S = 300.0


def available() -> bool:
    """Load the operator, building it if need be. False where there is no compiler, or it fails."""
    if hasattr(torch.ops.ssd, "rows_linear"):
        return True
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        return False
    try:
        torch.ops.load_library(_build(compiler))
    except (OSError, subprocess.SubprocessError):
        return False
    torch.library.register_fake("ssd::rows_linear", _fake)
    return True


class RowsLinear(nn.Module):
    """Stands in for a float32 ``nn.Linear`` on the CPU; its weight ``[N, K]`` is kept packed."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = nn.Parameter(torch.ops.ssd.pack(linear.weight.detach()), requires_grad=False)
        self.bias = linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        """``[.., K]`` to ``[.., N]``."""
        out = torch.ops.ssd.rows_linear(rows, self.packed, self.out_features)
        return out if self.bias is None else out + self.bias


def pack_linears(model: nn.Module) -> None:
    """Replace every ``nn.Linear`` of a float32 model. Its own weights go, unless something else (a tied
    embedding) uses them too."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, RowsLinear(child))


def _fake(input: Tensor, packed: Tensor, outputs: int) -> Tensor:
    return input.new_empty((*input.shape[:-1], outputs))


def _build(compiler: str) -> Path:
    """The shared library of this source, these flags, this torch and this processor."""
    from torch.utils import cpp_extension

    what = (SOURCE.read_text(), *FLAGS, torch.__version__, compiler, platform.node(), _processor())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssd"
    library = folder / f"rows_linear-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    # Built aside and moved into place: several workers may build it at the same time.
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        made = Path(aside) / library.name
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        command = [compiler, *FLAGS, abi, *includes, str(SOURCE), "-o", str(made), *libraries, "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True, capture_output=True, timeout=BUILD_LIMIT_S)
        made.replace(library)
    return library


def _processor() -> str:
    """What ``-march=native`` depends on, where the system tells."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    return next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
