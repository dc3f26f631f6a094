"""Rotary factors of GGUF files: as the configuration of the original model would have them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ssd.errors import ModelError
from ssd.models.checkpoints.loading import load_model
from ssd.testing.models.gguf import HEADS, HIDDEN, write_gguf

pytestmark = pytest.mark.usefixtures("gguf_cache")
DEPTH = HIDDEN // HEADS
SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def factors() -> np.ndarray:
    """Returns the factors of ``SCALING``, by the formula of the Llama 3.1 model card."""
    found = []
    for frequency in 1 / 10000.0 ** (np.arange(0, DEPTH, 2) / DEPTH):
        turns = 64 / (2 * math.pi / frequency)
        if turns > 4:
            found.append(1.0)
        elif turns < 1:
            found.append(8.0)
        else:
            smooth = (turns - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(found, dtype=np.float32)


@pytest.mark.parametrize("weights", ["packed", "dequantised"])
def test_factors_are_the_scaling_of_the_original(tmp_path: Path, weights: str) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", extra={"rope_freqs.weight": factors()})
    model = load_model(file, dtype="float32", device="cpu", max_positions=64, weights=weights)
    original = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "rope_parameters": SCALING}))
    found, wanted = model.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert wanted.min() < 0.2 * 10000 ** (-(DEPTH - 2) / DEPTH)  # the scaling does something


def test_a_file_without_factors_is_not_scaled(tmp_path: Path) -> None:
    model = load_model(write_gguf(tmp_path / "tiny.gguf"), dtype="float32", device="cpu", max_positions=64)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, 10000.0 ** (-torch.arange(0, DEPTH, 2) / DEPTH))


@pytest.mark.parametrize(("name", "size"), [("rope_freqs.weight", 5), ("rope_factors_long.weight", DEPTH // 2)])
def test_factors_that_do_not_fit_are_refused(tmp_path: Path, name: str, size: int) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", extra={name: np.ones(size, dtype=np.float32)})
    with pytest.raises(ModelError, match=f"{name}.* (does not fit|is not supported)"):
        load_model(file, dtype="float32", device="cpu", max_positions=64)
