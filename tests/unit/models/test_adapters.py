"""LoRA adapters: merged as peft merges them, or refused in one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from ssd.errors import ModelError
from ssd.models.checkpoints import adapters
from ssd.models.checkpoints.loading import load_model, read_config
from ssd.testing.models.gguf import write_gguf
from ssd.testing.models.tiny import save_tiny

peft = pytest.importorskip("peft")
IDS = torch.arange(20)[None] + 5
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "rank-stabilised": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks-by-name": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "some-layers": {"layers_to_transform": [1]},
    "head-replaced": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), "llama")


def _save_adapter(base: Path, folder: Path, **settings: Any) -> nn.Module:
    """Writes a random adapter; returns peft's model with the adapter apart."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{**values, "init_lora_weights": False, **settings}))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name:
                weight.mul_(0.5)
    adapted.save_pretrained(folder)
    return adapted.eval()


def _load(base: Path, adapter: Path, **options: Any) -> nn.Module:
    return load_model(
        base, dtype="float32", device="cpu", max_positions=64, weights="auto", adapter=str(adapter), **options
    )


def _change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merged_as_peft_merges(folder: Path, tmp_path: Path, kind: str) -> None:
    adapted = _save_adapter(folder, tmp_path, **KINDS[kind])
    model = _load(folder, tmp_path)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits, apart = model(IDS).logits, adapted(IDS).logits
    assert (logits - apart).abs().max() < 1e-4 * apart.abs().max()
    assert torch.equal(logits.argmax(-1), apart.argmax(-1))
    assert (own(IDS).logits - apart).abs().max() > 0.1
    merged = adapted.merge_and_unload().state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in model.state_dict().items())
    assert not any(weight.requires_grad for weight in model.parameters())
    assert {type(module) for module in model.modules() if "Linear" in type(module).__name__} == {nn.Linear}


@torch.no_grad()
def test_half_precision(folder: Path, tmp_path: Path) -> None:
    _save_adapter(folder, tmp_path)
    model = load_model(folder, dtype="bfloat16", device="cpu", max_positions=64, adapter=str(tmp_path))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_an_adapter_on_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    path = write_gguf(tmp_path / "tiny.gguf", tied=False)
    model = load_model(path, dtype="float32", device="cpu", max_positions=64)
    model.save_pretrained(tmp_path / "dense")
    adapted = _save_adapter(tmp_path / "dense", tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    found = _load(path, tmp_path / "adapter").state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in found.items())
    with pytest.raises(ModelError, match="adapter cannot be merged into packed weights"):
        load_model(
            path, dtype="float32", device="cpu", max_positions=64, weights="packed", adapter=str(tmp_path / "adapter")
        )


def _no_folder(base: Path, folder: Path) -> Path:
    return folder / "nowhere"


def _no_config(base: Path, folder: Path) -> Path:
    (folder / "adapter_config.json").unlink()
    return folder


def _damaged_config(base: Path, folder: Path) -> Path:
    (folder / "adapter_config.json").write_text("{")
    return folder


def _pickled(base: Path, folder: Path) -> Path:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return folder


def _damaged_weights(base: Path, folder: Path) -> Path:
    (folder / "adapter_model.safetensors").write_bytes(b"not safetensors")
    return folder


def _other_kind(base: Path, folder: Path) -> Path:
    _change(folder, peft_type="IA3")
    return folder


def _other_task(base: Path, folder: Path) -> Path:
    _change(folder, task_type="SEQ_CLS")
    return folder


def _replicated(base: Path, folder: Path) -> Path:
    _change(folder, layer_replication=[[0, 2], [1, 2]])
    return folder


def _activated(base: Path, folder: Path) -> Path:
    _change(folder, alora_invocation_tokens=[5, 6])
    return folder


def _other_rank(base: Path, folder: Path) -> Path:
    _change(folder, r=8)
    return folder


def _other_shapes(base: Path, folder: Path) -> Path:
    larger = save_tiny(folder / "larger", "llama", hidden_size=128)
    _save_adapter(larger, folder / "adapter")
    return folder / "adapter"


def _more_layers(base: Path, folder: Path) -> Path:
    larger = save_tiny(folder / "larger", "llama", num_hidden_layers=3)
    _save_adapter(larger, folder / "adapter")
    return folder / "adapter"


def _fewer_layers(base: Path, folder: Path) -> Path:
    smaller = save_tiny(folder / "smaller", "llama", num_hidden_layers=1)
    _save_adapter(smaller, folder / "adapter")
    return folder / "adapter"


def _unknown_modules(base: Path, folder: Path) -> Path:
    _change(folder, target_modules=["c_attn"])
    return folder


def _lacking(base: Path, folder: Path) -> Path:
    file = folder / "adapter_model.safetensors"
    stored = {name: value for name, value in load_file(file).items() if "layers.1.mlp.down_proj.lora_B" not in name}
    save_file(stored, file, {"format": "pt"})
    return folder


def _resized(base: Path, folder: Path) -> Path:
    larger = save_tiny(folder / "larger", "llama", vocab_size=160)
    _save_adapter(larger, folder / "adapter", modules_to_save=["lm_head", "embed_tokens"])
    return folder / "adapter"


REFUSED = {
    _no_folder: "no adapter folder",
    _no_config: "has no adapter_config.json",
    _damaged_config: "adapter_config.json cannot be read",
    _pickled: "has no adapter_model.safetensors; only safetensors",
    _damaged_weights: "cannot be loaded",
    _other_kind: "is of type IA3; only LORA",
    _other_task: "is for the task SEQ_CLS; only CAUSAL_LM",
    _replicated: "repeats layers",
    _activated: "cannot be merged",
    _other_rank: r"the adapter does not fit the model \(size mismatch for .*layers\.",
    _other_shapes: r"the adapter does not fit the model \(size mismatch for .*layers\.",
    _more_layers: r"the adapter does not fit the model: it has .*layers\.2\.",
    _fewer_layers: r"the adapter does not fit the model: it lacks .*layers\.1\.",
    _unknown_modules: "the adapter does not fit the model",
    _lacking: r"it lacks .*layers\.1\.mlp\.down_proj\.lora_B",
    _resized: "resizes the vocabulary to 160 tokens, the model has 128",
}


@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__.lstrip("_"))
def test_refused_in_one_line(folder: Path, tmp_path: Path, damage: Any) -> None:
    _save_adapter(folder, tmp_path)
    adapter = damage(folder, tmp_path)
    with pytest.raises(ModelError, match=REFUSED[damage]) as error:
        _load(folder, adapter)
    assert str(adapter) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_of_two_tied_embeddings_is_refused(tmp_path: Path, target: str) -> None:
    base = save_tiny(tmp_path / "base", "llama", tie_word_embeddings=True)
    _save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", target])
    with pytest.raises(ModelError, match="one of two tied embeddings"):
        _load(base, tmp_path / "adapter")


def test_an_adapter_in_the_models_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers loads it where peft is installed, and does not where it is not."""
    save_tiny(tmp_path, "llama")
    _save_adapter(folder, tmp_path)
    with pytest.raises(ModelError, match="has an adapter beside its model"):
        read_config(tmp_path)


def test_missing_package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save_adapter(folder, tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        adapters.importlib.util, "find_spec", lambda name, *more: None if name == "peft" else found(name, *more)
    )
    with pytest.raises(ModelError, match=r"pip install peft$"):
        _load(folder, tmp_path)
