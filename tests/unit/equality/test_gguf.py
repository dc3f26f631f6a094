"""Pairs of GGUF files, packed and dequantised: the tokens of every method are plain decoding's, and transformers'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ssd import LLM, SamplingParams
from ssd.models.checkpoints import gguf_metadata
from ssd.models.checkpoints.loading import load_model
from ssd.models.cpu.blocks_linear import TYPES
from ssd.models.runner import can_compile
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.testing.models.gguf import write_gguf

PROMPTS = [[9, 30, 77], [5], list(range(20, 44))]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
METHODS = ("none", "sd", "ssd", "self")
compiled = pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_metadata, "cache_folder", lambda: folder)
        target = write_gguf(folder / "target.gguf", kinds=tuple(TYPES))
        # Some layers differ in their quantisation, so the draft is right now and then.
        draft = write_gguf(folder / "draft.gguf", kinds=("Q6_K", *tuple(TYPES)[1:]))
        yield target, draft


def _config(target: Path, draft: Path, weights: str, batch: int) -> dict[str, Any]:
    def model(path: Path) -> dict[str, Any]:
        return {"model": str(path), "weights": weights, "compile": False}

    return {
        "target": model(target),
        "draft": model(draft),
        "speculation": {"lookahead": 3, "governor": False, "self": {"skip_attention": [1], "skip_mlp": [1]}},
        "engine": {"max_model_len": 128, "max_batch": batch, "prefill_chunk": 16, "start_timeout_s": 120.0},
    }


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("weights", ["dequantised", pytest.param("packed", marks=compiled)])
def test_methods_and_transformers(files: tuple[Path, Path], weights: str, batch: int) -> None:
    target, draft = files
    warm = replace(GREEDY, temperature=0.9, seed=3)
    with LLM(_config(target, draft, weights, batch), launch=InprocPipeline) as llm:
        found = {method: _tokens(llm, replace(GREEDY, method=method)) for method in METHODS}
        sampled = {method: _tokens(llm, replace(warm, method=method)) for method in METHODS}
    assert all(tokens == found["none"] for tokens in found.values())
    assert all(tokens == sampled["none"] for tokens in sampled.values())
    reference = load_model(target, dtype="float32", device="cpu", max_positions=128)
    for prompt, tokens in zip(PROMPTS, found["none"], strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *tokens[:-1]]]), logits_to_keep=len(tokens)).logits[0]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < 1e-4


def _tokens(llm: LLM, params: SamplingParams) -> list[tuple[int, ...]]:
    return [output.token_ids for output in llm.generate(PROMPTS, params)]
