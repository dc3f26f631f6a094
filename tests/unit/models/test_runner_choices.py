"""What ``auto`` means: which attention, and whether forwards are compiled, by device and by what runs there."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ssd.config.sections import ModelConfig
from ssd.models.attention import tree_attention
from ssd.models.runner import ForwardRunner, RunnerOptions
from ssd.pipeline.runtime import runners
from ssd.testing.models.tiny import ARCHITECTURES, tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def model_on(device: torch.device) -> Any:
    return SimpleNamespace(device=device, dtype=torch.bfloat16, config=None)


def wanted(**fields: Any) -> ModelConfig:
    return ModelConfig(model="some/model", dtype="bfloat16", **fields)


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_attention, "available", lambda: True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_trial_passes_for_every_architecture(architecture: str) -> None:
    model = tiny_model(architecture, vocab_size=128)
    tree_attention.try_kernels(model.config, torch.float32, CPU)


@pytest.mark.usefixtures("with_triton")
def test_kernels_that_run_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_attention, "try_kernels", lambda *_: None)
    assert runners._attention(wanted(), model_on(GPU)) == "tree"


def errors() -> list[Exception]:
    found: list[Exception] = [RuntimeError("CUDA error: no kernel image is available")]
    try:
        from triton.runtime.errors import OutOfResources  # pyright: ignore[reportMissingImports]
    except ImportError:
        return found
    return [*found, OutOfResources(172160, 101376, "shared memory")]


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize("error", errors(), ids=lambda error: type(error).__name__)
def test_kernels_that_do_not_run_are_replaced(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(tree_attention, "try_kernels", failing)
    with caplog.at_level(logging.WARNING):
        assert runners._attention(wanted(), model_on(GPU)) == "rows"
    assert "some/model: attention is rows, not tree: its kernels do not run on cuda:0 (" in caplog.text
    assert runners._attention(wanted(attention="tree"), model_on(GPU)) == "tree"  # asked for: no trial


def test_without_triton_gpus_mask_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_attention, "available", lambda: False)
    assert runners._attention(wanted(), model_on(GPU)) == "rows"


def test_auto_compiles_on_cpus_with_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for compiler in (False, True):
        monkeypatch.setattr(runners, "can_compile", lambda compiler=compiler: compiler)
        assert runners._compiles(wanted(), model_on(CPU)) is compiler
        assert runners._compiles(wanted(), model_on(GPU)) is False
        for asked in (False, True):
            assert runners._compiles(wanted(compile=asked), model_on(GPU)) is asked


def test_every_compiled_function_runs_without_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes the filter out of the options that it is given, so each call needs its own."""
    seen: list[bool] = []

    def compile_(body: Any, *, options: dict[str, Any], **_: Any) -> Any:
        seen.append(options.pop("guard_filter_fn", None) is not None)
        return body

    monkeypatch.setattr(torch, "compile", compile_)
    model = tiny_model("llama", vocab_size=128)
    options = RunnerOptions(batch=1, capacity=64, scratch_slots=0, prefill_chunk=16, vocabulary=128, compile=True)
    runner = ForwardRunner(model, options)
    for _ in range(3):
        runner.compiled(lambda: None)
    assert seen == [True] * 3
