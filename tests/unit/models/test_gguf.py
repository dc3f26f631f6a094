"""GGUF files: the values, tokens and tokenizer that transformers finds in them, and one line for everything else."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ssd.errors import ModelError
from ssd.models.checkpoints import gguf_metadata
from ssd.models.checkpoints.generation_config import end_ids, sampling_defaults
from ssd.models.checkpoints.gguf_file import GgufFile
from ssd.models.checkpoints.loading import load_model, load_tokenizer, read_config
from ssd.models.cpu.blocks_linear import TYPES, BlocksEmbedding, BlocksLinear, count_weights
from ssd.models.runner import can_compile
from ssd.testing.models.gguf import tokens, write_gguf

pytestmark = pytest.mark.usefixtures("gguf_cache")
compiled = pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")
HOSTILE = (
    "",
    " ",
    "  two  spaces ",
    "\n\n\t\r\n",
    "the<|end|>the <|end|> <|turn|>x<|tur",
    "naïve café – “quotes” …",
    "日本語 हिन्दी עברית",
    "👩‍👩‍👧‍👦🏳️‍🌈\u200b\ufeff",
    "e\u0301 \u00e9 \ufb01",
    "\x00\x01\x7f",
    "a" * 300,
    "1234567890 3.14159 0x1F",
    "def f(x):\n    return x**2  # 'it''s'",
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", kinds=(*TYPES, "F32", "Q2_K"))


def _reference(path: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()


def _load(path: Path, weights: str = "packed", dtype: str = "float32") -> nn.Module:
    return load_model(path, dtype=dtype, device="cpu", max_positions=64, weights=weights)  # type: ignore[arg-type]


def test_dequantised_weights_are_those_of_transformers(file: Path) -> None:
    expected, found = _reference(file).state_dict(), _load(file, "dequantised").state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@compiled
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("embedding", ["Q8_0", "Q6_K", "F32"])
def test_packed_weights_are_those_of_transformers(tmp_path: Path, tied: bool, embedding: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", kinds=(*TYPES, "F32", "Q2_K"), tied=tied, embedding=embedding)
    reference, model = _reference(path), _load(path)
    expected = dict(reference.named_parameters(remove_duplicate=False))
    packed = 0
    for name, module in model.named_modules():
        if isinstance(module, BlocksLinear | BlocksEmbedding):
            outputs, depth = expected[f"{name}.weight"].shape
            rows = torch.ops.ssd.blocks_rows(torch.arange(outputs), module.packed, module.kind, outputs, depth)
            assert torch.equal(rows, expected[f"{name}.weight"]), name
            packed += 1
        elif isinstance(module, nn.Linear | nn.Embedding):
            assert torch.equal(module.weight, expected[f"{name}.weight"]), name
    assert packed == 12 + (2 if embedding != "F32" else 0)
    assert all(torch.equal(value, expected[name]) for name, value in model.named_parameters() if "norm" in name)
    ids = torch.arange(40)[None] * 5
    apart = (model(ids).logits - reference(ids).logits).abs().max()
    assert apart < 1e-4 * reference(ids).logits.abs().max()


@compiled
def test_packed_takes_the_memory_of_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", kinds=tuple(TYPES))
    model = _load(path)
    held = sum({weight.data_ptr(): weight.nbytes for weight in model.parameters()}.values())
    assert held < 1.1 * sum(tensor.nbytes for tensor in GgufFile.read(path).tensors.values())


@compiled
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_are_counted_as_numbers(tmp_path: Path, tied: bool) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    expected = sum(weight.numel() for weight in _reference(path).parameters())
    assert count_weights(_load(path)) == count_weights(_load(path, "dequantised")) == expected


def test_tokenizer_is_that_of_transformers(file: Path) -> None:
    reference, ours = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), load_tokenizer(file)
    size = read_config(file).get_text_config().vocab_size
    assert ours.get_vocab() == {token: id for token, id in reference.get_vocab().items() if id < size}
    for text in HOSTILE:
        ids = reference(text).input_ids
        assert ours(text).input_ids == ids, text
        assert ours(text, add_special_tokens=False).input_ids == reference(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == reference.decode(ids), text
        assert ours.decode(ids, skip_special_tokens=True) == reference.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": "the\n"}]
    assert ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )


def test_no_token_is_beyond_the_vocabulary(file: Path) -> None:
    """transformers adds GPT-2's end token, whose id no embedding has, to every byte-level tokenizer."""
    size, text = read_config(file).get_text_config().vocab_size, "the<|endoftext|>"
    assert max(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(text).input_ids) == size
    assert max(load_tokenizer(file)(text).input_ids) < size
    assert load_tokenizer(file).decode(load_tokenizer(file)(text).input_ids) == text


def test_end_ids_and_defaults_come_from_the_file(tmp_path: Path) -> None:
    """Llama's configuration has end id 2 where nothing sets one, which here is a letter."""
    vocabulary, _ = tokens()
    turn = vocabulary.index("<|turn|>")
    path = write_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.eot_token_id": turn})
    config, tokenizer = read_config(path), load_tokenizer(path)
    assert end_ids(path, config, tokenizer, vocabulary=len(vocabulary)) == (turn - 1, turn)
    assert sampling_defaults(path) == {}


def test_fronts_do_not_read_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(GgufFile, "data", lambda *_: pytest.fail("read a weight"))
    monkeypatch.setattr("gguf.dequantize", lambda *_: pytest.fail("read a weight"))
    assert read_config(path).get_text_config().vocab_size == len(load_tokenizer(path))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    assert read_config(path).max_position_embeddings == 512
    write_gguf(path, metadata={"llama.context_length": 256})
    assert read_config(path).max_position_embeddings == 256


@pytest.mark.parametrize("weights", ["auto", "dequantised"])
def test_half_precision_is_dequantised(file: Path, weights: str) -> None:
    model = _load(file, weights, "bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_packed_half_precision_is_refused(file: Path) -> None:
    with pytest.raises(ModelError, match="weights cannot stay packed"):
        _load(file, "packed", "bfloat16")


def _truncated(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])


def test_a_file_cut_off_anywhere_is_named(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    for kept in (0, 3, 20, 24, 60, 500, 2000, 8000, len(whole) // 2, len(whole) - 1):
        path = tmp_path / f"cut{kept}.gguf"
        path.write_bytes(whole[:kept])
        with pytest.raises(ModelError, match=r"cut off|not a GGUF file") as error:
            read_config(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_headers_give_one_line(tmp_path: Path) -> None:
    """Every byte of the first kilobyte, set to all ones: a message or a header, never another error."""
    whole = bytearray(write_gguf(tmp_path / "whole.gguf").read_bytes())
    path = tmp_path / "damaged.gguf"
    for at in range(0, 1000, 7):
        damaged = whole.copy()
        damaged[at] = 0xFF
        path.write_bytes(damaged)
        try:
            GgufFile.read(path)
        except ModelError as error:
            assert str(path) in str(error)


def test_wrong_magic(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match=r"is not a GGUF file: it begins with b'PK"):
        load_tokenizer(path)


def test_unknown_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", metadata={"general.architecture": "teapot"})
    with pytest.raises(ModelError, match="architecture 'teapot' is not supported"):
        read_config(path)


def test_unknown_quantisation_type(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    data[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"blk\.0\.attn_q\.weight has quantisation type 99"):
        read_config(path)


def test_split_files_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", metadata={"split.count": 3})
    with pytest.raises(ModelError, match="one of 3 GGUF files"):
        read_config(path)


@pytest.mark.parametrize("weights", ["dequantised", pytest.param("packed", marks=compiled)])
def test_missing_weights_are_named(tmp_path: Path, weights: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", without=("blk.1.ffn_up.weight",))
    with pytest.raises(ModelError, match=r"the weights lack .*layers\.1\.mlp\.up_proj\.weight"):
        _load(path, weights)


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_missing_package(file: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        gguf_metadata.importlib.util, "find_spec", lambda name: None if name == missing else found(name)
    )
    with pytest.raises(ModelError, match=f"pip install {missing}$"):
        load_tokenizer(file)


@pytest.mark.parametrize("weights", ["auto", "packed"])
def test_operators_that_cannot_be_built(file: Path, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    monkeypatch.setattr("ssd.models.cpu.operators.blocks_available", lambda: False)
    monkeypatch.setattr("ssd.models.cpu.operators.compiler", lambda: "c++")
    if weights == "packed":
        with pytest.raises(ModelError, match="cannot be built"):
            _load(file, weights)
    else:
        assert not any(isinstance(module, BlocksLinear) for module in _load(file, weights).modules())
