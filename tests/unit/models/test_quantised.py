"""Folders with quantised weights: the weights that come out, and one line for what is not supported."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

from ssd.errors import ModelError
from ssd.models.checkpoints import quantised
from ssd.models.checkpoints.loading import count_parameters, load_model, read_config
from ssd.testing.models import packing
from ssd.testing.models.tiny import save_tiny

GPTQ: dict[str, dict[str, Any]] = {
    "default": {},
    "symmetric": {"symmetric": True},
    "second-layout": {"layout": "gptq_v2"},
    "named-layout": {"layout": "gptq"},
    "activation-order": {"shuffled": True},
    "one-group": {"group_size": -1},
    "uneven-group": {"group_size": 40},
    "no-g-idx": {"with_groups": False},
    "one-group-no-g-idx": {"with_groups": False, "group_size": -1},
    "uneven-no-g-idx": {"with_groups": False, "group_size": 40},
    "two-bits": {"bits": 2},
    "eight-bits": {"bits": 8, "shuffled": True},
    "eight-bits-second-layout": {"bits": 8, "symmetric": True, "layout": "gptq_v2"},
}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
COMPRESSED: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "int8": {"Linear": ("int-quantized", INT8)},
    "int4": {"Linear": ("pack-quantized", INT4)},
    "int4-asymmetric": {"Linear": ("pack-quantized", {**INT4, "symmetric": False})},
    "fp8": {"Linear": ("float-quantized", FP8)},
    "two-kinds": {
        "re:.*self_attn.*": ("float-quantized", FP8),
        "re:.*mlp.*": ("pack-quantized", INT4),
    },
    "two-widths": {
        "re:.*self_attn.*": ("pack-quantized", {**INT4, "num_bits": 8}),
        "re:.*mlp.*": ("pack-quantized", INT4),
    },
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("plain"), "llama", dtype=torch.float32)


def _load(folder: Path, dtype: str = "float32", **options: Any) -> nn.Module:
    return load_model(folder, dtype=dtype, device="cpu", max_positions=64, **options)


def _equal(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert {type(module) for module in model.modules() if "Linear" in type(module).__name__} == {nn.Linear}


def _change(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("case", GPTQ)
def test_gptq(plain: Path, tmp_path: Path, case: str) -> None:
    expected = packing.write_gptq(plain, tmp_path / "gptq", **GPTQ[case])
    _equal(_load(tmp_path / "gptq"), expected)


@pytest.mark.parametrize("group_size", [32, -1], ids=["groups", "one-group"])
def test_awq(plain: Path, tmp_path: Path, group_size: int) -> None:
    expected = packing.write_awq(plain, tmp_path / "awq", group_size=group_size)
    _equal(_load(tmp_path / "awq"), expected)


def test_half_precision_rounds_once(plain: Path, tmp_path: Path) -> None:
    expected = packing.write_awq(plain, tmp_path / "awq")
    _equal(_load(tmp_path / "awq", "bfloat16"), {name: value.bfloat16() for name, value in expected.items()})


@pytest.mark.parametrize("block", [32, 128], ids=["blocks", "one-block"])
def test_fp8(plain: Path, tmp_path: Path, block: int) -> None:
    expected = packing.write_fp8(plain, tmp_path / "fp8", block=block)
    _equal(_load(tmp_path / "fp8"), expected)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    _equal(theirs, expected)


def test_fp8_with_a_smaller_last_block_is_refused(plain: Path, tmp_path: Path) -> None:
    """transformers divides 96 rows in 48 and 48 where the checkpoint has 64 and 32."""
    packing.write_fp8(plain, tmp_path / "fp8", block=64)
    with pytest.raises(ModelError, match=r"(up|gate|down)_proj\.weight \[.*\] is not whole blocks"):
        read_config(tmp_path / "fp8")


@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors(plain: Path, tmp_path: Path, case: str) -> None:
    pytest.importorskip("compressed_tensors")
    expected = packing.write_compressed(plain, tmp_path / "packed", groups=COMPRESSED[case])
    _equal(_load(tmp_path / "packed"), expected)
    if len(COMPRESSED[case]) == 1:
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "packed", quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32
        )
        _equal(theirs, expected)
    original = load_file(plain / "model.safetensors")
    apart = {name: (value - original[name]).abs().max() for name, value in expected.items()}
    assert 0 < max(apart.values()) < 0.2


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(plain: Path, tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    asked = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**asked), dtype=torch.float32
    ).save_pretrained(tmp_path)
    model = _load(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs.dequantize(dtype=torch.float32)
    _equal(model, theirs.state_dict())


def test_torchao(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    quantised_model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    quantised_model.save_pretrained(tmp_path)
    expected = {
        name: value if type(value.data) is torch.Tensor else value.dequantize()
        for name, value in quantised_model.state_dict().items()
    }
    _equal(_load(tmp_path), expected)


def test_mxfp4(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "plain")
    expected = packing.write_mxfp4(tmp_path / "plain", tmp_path / "mxfp4")
    _equal(_load(tmp_path / "mxfp4"), expected)


def test_shards_of_quantised_weights(plain: Path, tmp_path: Path) -> None:
    """The parts of a layer may lie in different files."""
    expected = packing.write_gptq(plain, tmp_path / "gptq")
    stored = load_file(tmp_path / "gptq" / "model.safetensors")
    (tmp_path / "gptq" / "model.safetensors").unlink()
    shards = {f"model-0000{n + 1}-of-00003.safetensors": sorted(stored)[n::3] for n in range(3)}
    for file, names in shards.items():
        save_file({name: stored[name] for name in names}, tmp_path / "gptq" / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (tmp_path / "gptq" / "model.safetensors.index.json").write_text(json.dumps(index))
    _equal(_load(tmp_path / "gptq"), expected)


def test_parameters_are_counted_as_the_model_has_them(plain: Path, tmp_path: Path) -> None:
    packing.write_gptq(plain, tmp_path / "gptq")
    expected = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(plain).parameters())
    config = read_config(tmp_path / "gptq")
    assert count_parameters(config) == expected
    assert str(quantised.find_quantisation(tmp_path / "gptq", config)) == "gptq (4 bits, groups of 32)"


@pytest.mark.parametrize("write", [packing.write_gptq, packing.write_awq], ids=["gptq", "awq"])
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_missing_parts_are_named(
    plain: Path, tmp_path: Path, write: Callable[[Path, Path], dict[str, torch.Tensor]], part: str
) -> None:
    write(plain, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    stored = load_file(file)
    del stored[f"model.layers.1.mlp.up_proj.{part}"]
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"the weights lack model\.layers\.1\.mlp\.up_proj\.{part}") as error:
        _load(tmp_path / "packed")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "write", [packing.write_gptq, packing.write_awq, packing.write_fp8], ids=["gptq", "awq", "fp8"]
)
def test_missing_layers_are_named(
    plain: Path, tmp_path: Path, write: Callable[[Path, Path], dict[str, torch.Tensor]]
) -> None:
    write(plain, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    stored = {name: value for name, value in load_file(file).items() if "layers.1.mlp.up_proj" not in name}
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"the weights lack model\.layers\.1\.mlp\.up_proj\.weight"):
        _load(tmp_path / "packed")


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_parts_of_other_sizes_are_named(plain: Path, tmp_path: Path, part: str) -> None:
    packing.write_gptq(plain, tmp_path / "packed", with_groups=False)
    file = tmp_path / "packed" / "model.safetensors"
    stored = load_file(file)
    name = f"model.layers.1.mlp.up_proj.{part}"
    for cut in (stored[name][:-1], stored[name][:, :-8]):
        save_file({**stored, name: cut.contiguous()}, file, {"format": "pt"})
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj") as error:
            _load(tmp_path / "packed")
        assert "\n" not in str(error.value)


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"quant_method": "teapot"}, "quantisation 'teapot' is not supported; supported are awq, "),
    "hqq": ({"quant_method": "hqq"}, "quantisation 'hqq' is not supported"),
    "modelopt": ({"quant_method": "modelopt"}, "quantisation 'modelopt' is not supported"),
    "no-method": ({"bits": 4}, "quantization_config has no quant_method"),
    "three-bits": ({"quant_method": "gptq", "bits": 3}, "weights of 3 bits are not supported"),
    "marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "layout of marlin"),
    "gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "layout of gemv"),
    "llm-awq": ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "layout of llm-awq"),
    "rotated": (
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
        "transform_config are not supported",
    ),
    "sparse": (
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparse are not supported",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_formats_are_refused_without_reading_weights(plain: Path, tmp_path: Path, case: str) -> None:
    settings, message = UNSUPPORTED[case]
    packing.write_awq(plain, tmp_path / "packed")
    _change(tmp_path / "packed", lambda config: config.update(quantization_config=settings))
    with pytest.raises(ModelError, match=message) as error:
        read_config(tmp_path / "packed")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=["fp8", "int8"])
def test_weights_whose_scales_nothing_mentions_are_refused(plain: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """transformers would take the packed numbers for the weights."""
    save_tiny(tmp_path, "llama")
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    stored |= {name: stored[name].to(dtype), f"{name}_scale": torch.ones(1)}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight is stored as (F8_E4M3|I8), but config\.json has no"):
        read_config(tmp_path)


def test_activation_order_of_compressed_tensors_is_refused(plain: Path, tmp_path: Path) -> None:
    """No library reads ``weight_g_idx`` any more; the weights would be taken in the wrong order."""
    pytest.importorskip("compressed_tensors")
    packing.write_compressed(plain, tmp_path / "packed", groups=COMPRESSED["int4"])
    file = tmp_path / "packed" / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.mlp.up_proj.weight_g_idx": torch.arange(64)}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"activation order \(model\.layers\.0\.mlp\.up_proj\.weight_g_idx\)"):
        read_config(tmp_path / "packed")


def test_scaled_activations_are_refused(plain: Path, tmp_path: Path) -> None:
    packing.write_awq(plain, tmp_path / "awq")
    file = tmp_path / "awq" / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.mlp.act.scales": torch.ones(96)}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"scales the activations of model\.layers\.0\.mlp\.act"):
        read_config(tmp_path / "awq")


@pytest.mark.parametrize(
    ("method", "missing", "install"),
    [
        ("compressed-tensors", "compressed_tensors", "compressed-tensors"),
        ("bitsandbytes", "bitsandbytes", "bitsandbytes"),
        ("torchao", "torchao", "torchao"),
        ("fp8", "accelerate", "accelerate"),
    ],
)
def test_a_missing_package_is_named(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, missing: str, install: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None if name == missing else found("json"))
    packing.write_awq(plain, tmp_path / "packed")
    _change(tmp_path / "packed", lambda config: config.update(quantization_config={"quant_method": method}))
    with pytest.raises(ModelError, match=f"pip install {install}$"):
        read_config(tmp_path / "packed")


@pytest.mark.parametrize("packed", ["plain", "awq"])
def test_weights_that_cannot_stay_packed(plain: Path, tmp_path: Path, packed: str) -> None:
    folder = plain
    if packed == "awq":
        folder = tmp_path / "awq"
        packing.write_awq(plain, folder)
    with pytest.raises(ModelError, match="cannot stay packed on cpu"):
        _load(folder, weights="packed")


@pytest.mark.parametrize(
    ("method", "weights", "device", "expected"),
    [
        ("bitsandbytes", "auto", "cpu", False),
        ("bitsandbytes", "auto", "cuda:0", True),
        ("bitsandbytes", "dequantised", "cuda:0", False),
        ("awq", "auto", "cuda:0", False),
        ("fp8", "auto", "cuda:0", False),
    ],
)
def test_what_stays_packed(method: str, weights: str, device: str, expected: bool) -> None:
    found = quantised.Quantisation(method=method, settings={})
    assert quantised.stays_packed(Path("folder"), found, weights=weights, device=device) is expected
