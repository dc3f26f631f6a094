"""The pairs these scripts run on when speed is not the question: uncompiled, small enough for thousands of
requests."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from ssd.testing.tiny import save_tiny, tiny_model


def uncompiled(pair: str, folder: Path, batch: int) -> Path:
    """A configuration file. ``embedded``: the shipped pair; ``tiny``: two random models, made in
    ``folder``, of which the draft is the target with disturbed weights."""
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
