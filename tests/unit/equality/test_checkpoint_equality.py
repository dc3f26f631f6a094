"""Quantised checkpoints and adapters through the whole engine: every method gives the same tokens, and greedy ones are
those of a loop over transformers' own model with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ssd import LLM, SamplingParams
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.testing.models import packing
from ssd.testing.models.tiny import save_tiny, tiny_tokenizer

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
PARAMS = [GREEDY, replace(GREEDY, temperature=1.0, seed=3), GREEDY]
PROMPTS = [[9, 30, 77], [5, 100], list(range(20, 44))]
Write = Callable[[Path, Path], nn.Module]


def _with(source: Path, weights: dict[str, torch.Tensor]) -> nn.Module:
    """Returns transformers' model of a plain folder, with other weights."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict(weights)
    return model.eval()


def _gptq(source: Path, folder: Path) -> nn.Module:
    return _with(source, packing.write_gptq(source, folder, shuffled=True))


def _awq(source: Path, folder: Path) -> nn.Module:
    return _with(source, packing.write_awq(source, folder))


def _fp8(source: Path, folder: Path) -> nn.Module:
    return _with(source, packing.write_fp8(source, folder))


def _compressed(source: Path, folder: Path) -> nn.Module:
    pytest.importorskip("compressed_tensors")
    settings = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
    return _with(source, packing.write_compressed(source, folder, groups={"Linear": ("pack-quantized", settings)}))


def _bitsandbytes(source: Path, folder: Path) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=asked, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.dequantize(dtype=torch.float32).eval()


def _torchao(source: Path, folder: Path) -> nn.Module:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    packed = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    packed.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    plain = {
        name: value if type(value.data) is torch.Tensor else value.dequantize()
        for name, value in packed.state_dict().items()
    }
    return _with(source, plain)


def _mxfp4(source: Path, folder: Path) -> nn.Module:
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
        sliding_window=8,
        initializer_range=0.3,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    plain = folder.parent / "gpt-oss"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(plain)
    tiny_tokenizer().save_pretrained(plain)
    return _with(plain, packing.write_mxfp4(plain, folder))


FORMATS: dict[str, Write] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "mxfp4": _mxfp4,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("plain"), "llama")


def _greedy(model: nn.Module, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(GREEDY.max_tokens or 0):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _equal_with_every_method(target: dict[str, Any], draft: dict[str, Any], reference: nn.Module) -> None:
    config = {
        "target": {"compile": False, **target},
        "draft": {"compile": False, **draft},
        "speculation": {"lookahead": 3, "governor": False},
        "engine": {"max_model_len": 64, "prefill_chunk": 16, "max_batch": 2, "start_timeout_s": 120.0},
    }
    with LLM(config, launch=InprocPipeline) as llm:
        found = {
            method: [one.token_ids for one in llm.generate(PROMPTS, [replace(p, method=method) for p in PARAMS])]
            for method in ("none", "sd", "ssd")
        }
        assert llm.degraded is None
    assert found["sd"] == found["none"] and found["ssd"] == found["none"]
    for prompt, params, tokens in zip(PROMPTS, PARAMS, found["none"], strict=True):
        if params.temperature == 0:
            assert list(tokens) == _greedy(reference, prompt)


@pytest.mark.parametrize("kind", FORMATS)
def test_quantised_targets(plain: Path, tmp_path: Path, kind: str) -> None:
    reference = FORMATS[kind](plain, tmp_path / "packed")
    _equal_with_every_method({"model": str(tmp_path / "packed")}, {"model": str(plain)}, reference)


def test_a_quantised_draft(plain: Path, tmp_path: Path) -> None:
    _awq(plain, tmp_path / "awq")
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    _equal_with_every_method({"model": str(plain)}, {"model": str(tmp_path / "awq")}, reference)


@pytest.mark.parametrize("side", ["target", "draft", "both"])
def test_adapters(plain: Path, tmp_path: Path, side: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager")
    asked = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(base, asked).eval()
    adapted.save_pretrained(tmp_path)
    own = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()
    reference = adapted if side != "draft" else own
    with_adapter = {"model": str(plain), "adapter": str(tmp_path)}
    without = {"model": str(plain)}
    _equal_with_every_method(
        with_adapter if side != "draft" else without, with_adapter if side != "target" else without, reference
    )
    assert _greedy(adapted, PROMPTS[0]) != _greedy(own, PROMPTS[0])


def test_an_adapter_on_quantised_weights(plain: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = _awq(plain, tmp_path / "awq")
    asked = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(base, asked).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    target = {"model": str(tmp_path / "awq"), "adapter": str(tmp_path / "adapter")}
    _equal_with_every_method(target, {"model": str(plain)}, adapted)
