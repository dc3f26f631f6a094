"""The shipped pair: same tokens from every method, at several shapes, precisions and temperatures."""

from __future__ import annotations

import pytest

from ssd import LLM, SamplingParams
from ssd.bench.measure.prompts import DEMO_PROMPTS
from ssd.config.load import resolve_model_path
from ssd.errors import ModelError
from ssd.pipeline.runtime.launch import InprocPipeline, LocalPipeline

PROMPTS = [prompt.text for prompt in DEMO_PROMPTS[:4]]


@pytest.fixture(scope="module", autouse=True)
def shipped():
    try:
        resolve_model_path("embedded/target")
    except ModelError as error:  # a checkout before the weights were trained
        pytest.fail(str(error))


def tokens_of(llm: LLM, method: str, temperature: float, **params) -> list[tuple[int, ...]]:
    given = {"max_tokens": 40, "ignore_eos": True, **params}
    sampling = [
        SamplingParams(temperature=temperature, seed=seed, method=method, **given) for seed in range(len(PROMPTS))
    ]
    return [output.token_ids for output in llm.generate(PROMPTS, sampling)]


@pytest.mark.parametrize(
    ("dtype", "lookahead", "siblings", "batch"),
    [("float32", 4, 0, 1), ("float32", 3, 2, 4), ("bfloat16", 5, 1, 1), ("bfloat16", 2, 0, 4)],
)
def test_methods_give_the_same_tokens(dtype, lookahead, siblings, batch):
    overrides = [
        f"target.dtype={dtype}",
        f"draft.dtype={dtype}",
        "target.compile=false",
        "draft.compile=false",
        f"speculation.lookahead={lookahead}",
        f"speculation.siblings={siblings}",
        f"engine.max_batch={batch}",
    ]
    # Products of bfloat16 take a processor without them six times as long.
    count = {"max_tokens": 40 if dtype == "float32" else 14}
    with LLM("embedded", overrides=overrides, launch=InprocPipeline) as llm:
        for temperature in (0.0, 0.8, 1.2) if dtype == "float32" else (0.0, 1.2):
            plain = tokens_of(llm, "none", temperature, **count)
            assert tokens_of(llm, "sd", temperature, **count) == plain
            assert tokens_of(llm, "ssd", temperature, **count) == plain
        filtered = {"top_p": 0.9, "top_k": 50, "min_p": 0.02, **count}
        assert tokens_of(llm, "ssd", 0.8, **filtered) == tokens_of(llm, "none", 0.8, **filtered)


def test_as_shipped_in_local_processes():
    """Compiled where a compiler is found: the path of `make demo`."""
    with LLM("embedded", launch=LocalPipeline) as llm:
        for temperature in (0.0, 0.8):
            plain = tokens_of(llm, "none", temperature)
            assert tokens_of(llm, "sd", temperature) == plain
            assert tokens_of(llm, "ssd", temperature) == plain
        for temperature, asked in (
            (0.8, {"top_p": 0.9}),
            (1.0, {"top_k": 1}),
            (1.0, {"top_k": 50, "min_p": 0.02}),
            (0.0, {"presence_penalty": 0.5, "logit_bias": {5: -1.0}}),
            (0.8, {"repetition_penalty": 1.1, "top_p": 0.95}),
            (0.8, {"structured_outputs": {"json_object": True}}),
        ):
            assert tokens_of(llm, "ssd", temperature, **asked) == tokens_of(llm, "none", temperature, **asked), asked
        assert llm.degraded is None


def test_the_draft_is_worth_having():
    """Acceptance on code, greedy: well above what a draft that learned nothing would reach."""
    with LLM("embedded", overrides=["target.compile=false", "draft.compile=false"], launch=InprocPipeline) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=64, ignore_eos=True, method="ssd"))
    accepted = sum(output.speculation.accepted for output in outputs)
    drafted = sum(output.speculation.drafted for output in outputs)
    hits = sum(output.speculation.hits for output in outputs)
    lookups = sum(output.speculation.lookups for output in outputs)
    assert accepted / drafted > 0.4
    assert hits / lookups > 0.5
