"""Tiny model folders, made once a session, and language models over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

# A loaded machine is slow, not wrong.
hypothesis.settings.register_profile("ssd", deadline=None)
hypothesis.settings.load_profile("ssd")

# Tiny models gain nothing from threads, and tests run side by side.
torch.set_num_threads(1)

VOCABULARY = 128
ROOT = Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For ``pytest -n N --dist loadgroup``: a file of unit tests stays together for the sake of its
    fixtures; everything that starts processes comes one after the other. Mutants go anywhere."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        folder, *_ = item.path.relative_to(ROOT).parts
        group = item.path.stem if folder == "unit" else "processes"
        if group != "test_mutants":
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``folder_of(architecture, kind)``: a saved tiny model. Kinds of draft for a target:

    ``target`` itself; ``noisy``, the target with disturbed weights, right now and then;
    ``random``, other weights altogether; ``adversary``, the target with its head negated: it
    guesses what the target thinks least likely.
    """
    from ssd.testing.models.tiny import save_tiny, tiny_model, tiny_tokenizer

    made: dict[tuple[str, str], Path] = {}

    def make(architecture: str, kind: str = "target") -> Path:
        key = architecture, kind
        if key not in made:
            folder = made[key] = tmp_path_factory.mktemp(f"{architecture}-{kind}")
            if kind == "random":
                save_tiny(folder, architecture, seed=99, vocab_size=VOCABULARY)
                return folder
            model = tiny_model(architecture, vocab_size=VOCABULARY)
            with torch.no_grad():
                if kind == "adversary":
                    model.get_output_embeddings().weight.neg_()
                if kind == "noisy":
                    generator = torch.Generator().manual_seed(7)
                    for weight in model.parameters():
                        noise = torch.randn(weight.shape, generator=generator)
                        weight.add_(noise * weight.std(correction=0), alpha=0.04)
            model.save_pretrained(folder)
            tiny_tokenizer(VOCABULARY).save_pretrained(folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_config(folder_of: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """A configuration of tiny models; ``speculation`` and ``engine`` are merged into it."""

    def make(
        architecture: str = "llama",
        draft: str | None = "noisy",
        dtype: str = "float32",
        speculation: dict[str, Any] | None = None,
        engine: dict[str, Any] | None = None,
        cores: bool = False,
    ) -> dict[str, Any]:
        def worker(kind: str, core: int) -> dict[str, Any]:
            pinned = {"cores": [core]} if cores else {}
            return {"model": str(folder_of(architecture, kind)), "dtype": dtype, "compile": False, **pinned}

        return {
            "target": worker("target", 0),
            **({"draft": worker(draft, 1)} if draft else {}),
            "speculation": {"lookahead": 3, "governor": False, **(speculation or {})},
            "engine": {"max_model_len": 128, "prefill_chunk": 16, "start_timeout_s": 120.0, **(engine or {})},
        }

    return make
