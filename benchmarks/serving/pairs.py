"""Shared by the scripts that check behaviour, not speed: a small uncompiled pair for thousands of requests, options,
and the report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from ssd.testing.models.tiny import save_tiny, tiny_model


def uncompiled(pair: str, folder: Path, batch: int) -> Path:
    """Writes a configuration file and returns its path.

    Args:
        pair: ``embedded``: the shipped pair; ``tiny``: a random target, and a draft that is the target with noise
            on its weights, both saved in ``folder``.
        batch: ``engine.max_batch``.
    """
    if pair == "embedded":
        models = {"target": "embedded/target", "draft": "embedded/draft"}
    else:
        models = {name: str(folder / name) for name in ("target", "draft")}
        if not (folder / "draft").is_dir():
            for name in models:
                save_tiny(folder / name, "llama", vocab_size=128)
            model = tiny_model("llama", vocab_size=128)
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for weight in model.parameters():
                    noise = torch.randn(weight.shape, generator=generator)
                    weight.add_(noise * weight.std(correction=0), alpha=0.04)
            model.save_pretrained(folder / "draft")
    config = {
        **{role: {"model": model, "compile": False} for role, model in models.items()},
        "speculation": {"lookahead": 3, "forecast": {"budget": 6}},
        "engine": {"max_batch": batch, "max_model_len": 128, "prefill_chunk": 16, "start_timeout_s": 900.0},
    }
    path = folder / f"{pair}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def options(about: str | None, *, batch: int) -> argparse.ArgumentParser:
    """Returns a parser with ``--pair``, ``--batch`` and ``--json``; scripts add their own options."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=["tiny", "embedded"], default="tiny")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--json", type=Path)
    return parser


def report(result: dict[str, Any], path: Path | None, *, good: bool) -> None:
    """Prints the result and writes it to a file. Raises: SystemExit: with code 1 unless the result is good."""
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if path is not None:
        path.write_text(text)
    if not good:
        raise SystemExit(1)
