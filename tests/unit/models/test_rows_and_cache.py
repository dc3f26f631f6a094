"""Row plans, the slot cache, and what loading refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ssd.decoding.trees.shape import TreeShape
from ssd.errors import ModelError
from ssd.models.cache import SlotCache
from ssd.models.checkpoints.loading import load_model, load_tokenizer
from ssd.models.checkpoints.pairs import Pairing, paired
from ssd.models.layers import FULL, find_layers
from ssd.models.rows import BLOCK, RowPlan
from ssd.testing.models.tiny import (
    ARCHITECTURES,
    save_tiny,
    tiny_tokenizer,
)


def test_sequential_rows() -> None:
    plan = RowPlan.sequential("prefill", 4)
    assert (plan.offsets, plan.limits, plan.in_place, plan.rows) == ((0, 1, 2, 3), (0, 1, 2, 3), 4, 4)
    assert plan.scratch_mask is None


def test_comb_rows() -> None:
    """The chain in place, leaves in scratch slots; each attends the slots below its own position."""
    plan = RowPlan.tree("verify", TreeShape.comb(2, siblings=2))
    assert plan.offsets == plan.limits == (0, 1, 2, 1, 1, 2, 2)
    assert (plan.in_place, plan.scratch_start, plan.scratch_mask) == (3, 0, None)


@pytest.mark.parametrize("parents", [(0, 1, 0, 3), (0, 0, 2)])
def test_trees_that_are_not_combs_are_refused(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="comb"):
        RowPlan.tree("verify", TreeShape(parents))


def small_cache(**sizes: int) -> SlotCache:
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=10
    )
    layers = find_layers(AutoModelForCausalLM.from_config(config))
    return SlotCache((FULL, FULL), batch=3, dtype=torch.float32, device="cpu", layers=layers, **sizes)


def test_cache_is_whole_blocks() -> None:
    cache = small_cache(main_slots=BLOCK + 1, scratch_slots=5)
    assert cache.main_slots == 2 * BLOCK
    assert cache.main[0][0].shape == (3, 2, 2 * BLOCK, 4)
    assert cache.nbytes == 2 * 2 * 3 * 2 * (2 * BLOCK + 5) * 4 * 4


def test_update_writes_where_prepared_and_nowhere_else() -> None:
    cache = small_cache(main_slots=BLOCK, scratch_slots=4)
    view = cache.all_rows()
    view.prepare(
        positions=torch.tensor([[3, 4, 4], [0, 1, 1], [7, 8, 8]]),
        in_place=2,
        scratch_slots=torch.tensor([2]),
        limits=torch.tensor([[3, 4, 4], [0, 1, 1], [7, 8, 8]]),
        scratch_mask=None,
        context=BLOCK,
    )
    keys, values = torch.randn(3, 2, 3, 4), torch.randn(3, 2, 3, 4)
    states, _ = view.update(keys, values, 1)
    for batch, first in enumerate((3, 0, 7)):
        for row in range(2):
            assert torch.equal(cache.main[0][1][batch, :, first + row], keys[batch, :, row])
            assert torch.equal(cache.main[1][1][batch, :, first + row], values[batch, :, row])
        assert torch.equal(cache.scratch[0][1][batch, :, 2], keys[batch, :, 2])
        assert torch.equal(cache.scratch[1][1][batch, :, 2], values[batch, :, 2])
    assert torch.equal(states.own, keys)
    assert states.scratch is None
    assert int((cache.main[0][1] != 0).sum()) == 3 * 2 * 2 * 4
    assert int((cache.scratch[0][1] != 0).sum()) == 3 * 2 * 4
    assert not cache.main[0][0].any()


def test_keep_moves_scratch_into_main() -> None:
    cache = small_cache(main_slots=BLOCK, scratch_slots=3)
    for part in cache.scratch:
        for layer in part:
            layer.copy_(torch.randn(layer.shape))
    cache.keep(torch.tensor([0, 2]), torch.tensor([1, 0]), torch.tensor([5, 9]))
    for mains, scratches in zip(cache.main, cache.scratch, strict=True):
        for main, scratch in zip(mains, scratches, strict=True):
            expected = torch.zeros_like(main)
            expected[0, :, 5], expected[2, :, 9] = scratch[0, :, 1], scratch[2, :, 0]
            assert torch.equal(main, expected)


def load(folder: Path, positions: int = 256) -> torch.nn.Module:
    return load_model(folder, dtype="float32", device="cpu", max_positions=positions)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_supported_architectures_load(architecture: str, folder_of: Callable[..., Path]) -> None:
    assert load(folder_of(architecture)).dtype is torch.float32
    assert (
        load_model(folder_of(architecture), dtype="bfloat16", device="cpu", max_positions=512).dtype is torch.bfloat16
    )


def test_states_that_cannot_be_found_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "recurrent_gemma")
    with pytest.raises(ModelError, match=r"modules that keep its states|keeps a state that cannot be taken back"):
        find_layers(load(tmp_path))


def test_too_few_positions(folder_of: Callable[..., Path]) -> None:
    load(folder_of("llama"), positions=512)
    with pytest.raises(ModelError, match="knows 512 positions, 513 are needed"):
        load(folder_of("llama"), positions=513)


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def test_remote_code_is_refused(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy(folder_of("llama"), tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    raw["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="remote code"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_refused(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy(folder_of("llama"), tmp_path)
    model = load(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load(folder)


def test_missing_folders(tmp_path: Path) -> None:
    for function in (load, load_tokenizer):
        with pytest.raises(ModelError, match="no model folder"):
            function(tmp_path / "nowhere")
        with pytest.raises(ModelError, match=r"no config\.json"):
            function(tmp_path)


@pytest.mark.parametrize("damage", ["weights", "config", "not json"])
def test_damaged_folders_give_one_line(damage: str, folder_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy(folder_of("llama"), tmp_path)
    if damage == "weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "config":
        (folder / "config.json").write_text('{"model_type": "nonesuch"}')
    else:
        (folder / "config.json").write_text("{")
    with pytest.raises(ModelError) as error:
        load(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_tensors_are_refused(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    """transformers would initialise them at random: other tokens at every start."""
    from safetensors.torch import load_file, save_file

    folder = copy(folder_of("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="down_proj"):
        load(folder)


def _paired(target: Any, draft: Any, target_rows: int, draft_rows: int) -> Pairing:
    return paired(target, draft, target_rows=target_rows, draft_rows=draft_rows)


def test_same_tokenizers_are_accepted() -> None:
    assert _paired(tiny_tokenizer(128), tiny_tokenizer(128), 128, 128).size == 128


def test_padded_heads_are_accepted() -> None:
    assert _paired(tiny_tokenizer(128), tiny_tokenizer(128), 160, 192).size == 128


def test_a_mismatch_names_the_token(tmp_path: Path) -> None:
    tiny_tokenizer(128).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    names = {index: token for token, index in vocabulary.items()}
    vocabulary[names[50]], vocabulary[names[51]] = 51, 50
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError) as error:
        _paired(tiny_tokenizer(128), AutoTokenizer.from_pretrained(tmp_path), 128, 128)
    assert f"token {names[50]!r} is 50 in the target and 51 in the draft" in str(error.value)


def test_a_longer_tokenizer_is_a_mismatch() -> None:
    with pytest.raises(ModelError, match="is None in the target and 128 in the draft"):
        _paired(tiny_tokenizer(128), tiny_tokenizer(129), 129, 129)


def test_a_head_smaller_than_its_tokenizer() -> None:
    with pytest.raises(ModelError, match="draft's output head has 100 rows"):
        _paired(tiny_tokenizer(128), tiny_tokenizer(128), 128, 100)


def test_threads_load_side_by_side(folder_of: Callable[..., Path]) -> None:
    """Draft and verifier in one process: transformers sets torch's default dtype while it loads."""
    from concurrent.futures import ThreadPoolExecutor

    dtypes = ["float32", "bfloat16"] * 6
    with ThreadPoolExecutor(4) as pool:
        models = pool.map(
            lambda dtype: load_model(folder_of("llama"), dtype=dtype, device="cpu", max_positions=256), dtypes
        )
        for model, dtype in zip(models, dtypes, strict=True):
            assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}
    assert torch.get_default_dtype() is torch.float32
