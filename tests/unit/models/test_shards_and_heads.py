"""Sharded folders, and output heads that are tied, stored or missing: loaded as transformers loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from ssd.errors import ModelError
from ssd.models.checkpoints.loading import load_model
from ssd.testing.models.tiny import save_tiny, tiny_model

IDS = torch.arange(12)[None] + 7
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def _load(folder: Path) -> nn.Module:
    return load_model(folder, dtype="float32", device="cpu", max_positions=64)


def _stored(folder: Path, tied: bool) -> dict[str, torch.Tensor]:
    save_tiny(folder, "llama", tie_word_embeddings=tied)
    return load_file(folder / "model.safetensors")


def _save(folder: Path, stored: dict[str, torch.Tensor]) -> None:
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def _equal(folder: Path) -> nn.Module:
    """Compares with transformers, and returns the model."""
    model = _load(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    assert torch.equal(model(IDS).logits, theirs(IDS).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (
        theirs.lm_head.weight is theirs.model.embed_tokens.weight
    )
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_shards(tmp_path: Path, tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    found = _equal(tmp_path).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        _load(tmp_path)
    assert gone.name in str(error.value) and "\n" not in str(error.value)


def test_a_weight_in_no_shard_is_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    content: dict[str, Any] = json.loads(index.read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    file = tmp_path / content["weight_map"].pop(name)
    index.write_text(json.dumps(content))
    stored = load_file(file)
    del stored[name]
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"the weights lack .*layers\.1\.mlp\.up_proj\.weight"):
        _load(tmp_path)


def test_an_untied_head(tmp_path: Path) -> None:
    stored = _stored(tmp_path, tied=False)
    model = _equal(tmp_path)
    assert torch.equal(model.lm_head.weight, stored[HEAD])
    assert not torch.equal(stored[HEAD], stored[EMBEDDING])


def test_an_untied_head_that_is_missing(tmp_path: Path) -> None:
    stored = _stored(tmp_path, tied=False)
    del stored[HEAD]
    _save(tmp_path, stored)
    with pytest.raises(ModelError, match=r"the weights lack lm_head\.weight$"):
        _load(tmp_path)


def test_a_tied_head_that_is_not_stored(tmp_path: Path) -> None:
    assert HEAD not in _stored(tmp_path, tied=True)
    model = _equal(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("same", [True, False], ids=["equal", "other"])
def test_a_tied_head_that_is_stored_too(tmp_path: Path, same: bool) -> None:
    stored = _stored(tmp_path, tied=True)
    _save(tmp_path, {**stored, HEAD: stored[EMBEDDING].clone() if same else stored[EMBEDDING].flip(0).contiguous()})
    _equal(tmp_path)


def test_a_tied_embedding_that_only_the_head_has(tmp_path: Path) -> None:
    stored = _stored(tmp_path, tied=True)
    _save(tmp_path, {HEAD: stored.pop(EMBEDDING), **stored})
    try:
        model = _load(tmp_path)
    except ModelError as error:
        assert "the weights lack" in str(error)
    else:
        assert torch.equal(model.model.embed_tokens.weight, load_file(tmp_path / "model.safetensors")[HEAD])
