"""The Triton kernels, compiled ahead of time for GPUs that are not here: by Triton's own compiler and assembler.

A launch is intercepted where Triton would load the kernel, so what is compiled is exactly what ``attend`` launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.runtime import driver  # pyright: ignore[reportMissingImports]
from triton.runtime.jit import JITFunction  # pyright: ignore[reportMissingImports]

from ssd.models.attention import triton_kernels
from ssd.models.attention.inputs import AttentionInputs

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory of a program by compute capability: CUDA programming guide, "Technical Specifications"."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Sizes of a forward; strides are those of a model and a slot cache."""

    batch: int = 4
    heads: int = 32
    kv_heads: int = 8
    rows: int = 8
    dim: int = 64
    slots: int = 5120
    context: int = 5000
    scratch: int = 90
    softcap: float = 0.0
    windowed: bool = False
    dtype: torch.dtype = torch.bfloat16

    def inputs(self) -> AttentionInputs:
        """Tensors without memory."""

        def states(heads: int, slots: int) -> torch.Tensor:
            return torch.empty(self.batch, heads, slots, self.dim, dtype=self.dtype, device="meta")

        def projected(heads: int) -> torch.Tensor:
            return states(self.rows, heads).transpose(1, 2)

        main = [states(self.kv_heads, self.slots)[:, :, : self.context] for _ in range(2)]
        scratch = [states(self.kv_heads, self.scratch) if self.scratch else None for _ in range(2)]
        own = [projected(self.kv_heads) for _ in range(2)]
        limits = torch.empty(self.batch, self.rows, dtype=torch.int64, device="meta")
        mask = torch.empty(self.batch, self.rows, self.scratch, dtype=torch.uint8, device="meta")
        shown = mask if self.scratch else None
        starts = limits.clone() if self.windowed else None
        sinks = torch.empty(self.heads, dtype=self.dtype, device="meta") if self.windowed else None
        return AttentionInputs(
            projected(self.heads), *main, *scratch, *own, limits, shown, self.dim**-0.5, self.softcap, starts, sinks
        )


class AbsentGpu:
    """Triton's driver of a GPU that is not here; the device's number is its compute capability."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


Compile = Callable[[int, Launch], list[Any]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Compile]:
    """Compiles what ``attend`` launches for a compute capability; returns Triton's kernels."""
    run, kernels = JITFunction.run, []

    def without_launch(function: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(function, *given, grid=grid, warmup=True, **options))

    def compiled(capability: int, launch: Launch) -> list[Any]:
        kernels.clear()
        driver.set_active(AbsentGpu(capability))
        triton_kernels.attend(launch.inputs())
        return list(kernels)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", without_launch)
    before = driver._active
    yield compiled
    driver._active = before


def check(compiled: Compile, capability: int, launch: Launch) -> None:
    kernels = compiled(capability, launch)
    assert [kernel.name for kernel in kernels] == ["_partial"] * (2 if launch.scratch else 1) + ["_merge"]
    for kernel in kernels:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED_KIB[capability] << 10, kernel.name


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dim", [64, 128])
def test_kernels_compile(capability: int, dim: int, compiled: Compile) -> None:
    check(compiled, capability, Launch(dim=dim))


FORMS = {
    "one row": Launch(batch=1, rows=1, scratch=0),
    "one split": Launch(slots=256, context=100, scratch=0),
    "sixteen splits": Launch(batch=8, kv_heads=8, slots=4096, context=2048),
    "many splits": Launch(batch=1, heads=2, kv_heads=1, slots=65536, context=65536),
    "no shared heads": Launch(heads=8, kv_heads=8),
    "softcap": Launch(softcap=50.0),
    "window and sinks": Launch(windowed=True),
    "odd head": Launch(dim=80, context=77, scratch=7),
    "float32": Launch(dtype=torch.float32),
    "float16": Launch(dtype=torch.float16),
    "largest rows": Launch(dtype=torch.float32, dim=512, rows=16),
}


@pytest.mark.parametrize("launch", FORMS.values(), ids=FORMS)
def test_every_form_of_a_launch_compiles(launch: Launch, compiled: Compile) -> None:
    check(compiled, 89, launch)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_KIB)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 192, 256, 512])
def test_kernels_compile_for_every_gpu_type_and_head(
    capability: int, dtype: torch.dtype, dim: int, compiled: Compile
) -> None:
    launch = Launch(dim=dim, dtype=dtype)
    for rows in (1, 16):
        check(compiled, capability, replace(launch, rows=rows))


@pytest.mark.parametrize("row_bytes", [32, 64, 128, 256, 512, 1024, 2048])
@pytest.mark.parametrize("packed", [1, 16, 17, 64, 1000])
def test_tiles_fit_shared_memory(packed: int, row_bytes: int) -> None:
    rows, slots = triton_kernels.tile_sizes(packed, row_bytes)
    assert {rows, slots} <= {16, 32, 64}
    assert row_bytes * (rows + 2 * slots) <= triton_kernels.SHARED_BYTES
