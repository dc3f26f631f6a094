"""Log-probabilities of prompts: those of one full forward, whatever decodes afterwards and whatever is cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssd import LLM, RequestError, RequestOutput, SamplingParams, TokenLogprob
from ssd.decoding import logprobs as rows
from ssd.decoding.logprobs import token_logprobs
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.request.methods import Method

Configure = Callable[..., dict[str, Any]]
CHUNK, CONTEXT = 16, 128  # of tiny_config
LENGTHS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK + 1, 3 * CHUNK + 5, CONTEXT - 9)
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True, prompt_logprobs=3)
WARM = replace(GREEDY, temperature=1.0, seed=3, logprobs=2)
SCORED: list[SamplingParams] = [
    GREEDY,
    WARM,
    replace(GREEDY, max_tokens=0),
    replace(GREEDY, max_tokens=1, prompt_logprobs=0),
    replace(WARM, prompt_logprobs=20, repetition_penalty=1.3, logit_bias={7: 5.0}),  # raw, whatever is chosen from
]


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(4, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [ids(length, seed=length) for length in LENGTHS]


def generate(llm: LLM, prompts: list[list[int]], params: SamplingParams, method: Method) -> list[RequestOutput]:
    return llm.generate(prompts, replace(params, method=method))


@pytest.fixture(scope="module")
def reference(folder_of: Callable[..., Any]) -> Callable[[Sequence[int]], torch.Tensor]:
    """Log-softmax ``[T, V]`` of transformers' own forward."""
    model = AutoModelForCausalLM.from_pretrained(folder_of("llama", "target"), dtype=torch.float32)

    def make(tokens: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([list(tokens)])).logits[0].log_softmax(-1)

    return make


def check(output: RequestOutput, count: int, expected: torch.Tensor) -> None:
    told = output.prompt_logprobs
    assert told is not None and len(told) == len(output.prompt_token_ids) and told[0] is None
    for token, given, row in zip(output.prompt_token_ids[1:], told[1:], expected, strict=False):
        assert given is not None and given.token_id == token
        assert given.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert given.rank == 1 + int((row > row[token]).sum())
        best = row.topk(max(count, 1))
        assert [id for id, _ in given.top] == best.indices[:count].tolist()
        assert [value for _, value in given.top] == pytest.approx(best.values[:count].tolist(), abs=1e-4)


@pytest.mark.parametrize("caching", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("siblings", [0, 2], ids=["chain", "comb"])
def test_as_transformers_scores_them(
    siblings: int, caching: bool, tiny_config: Configure, reference: Callable[..., torch.Tensor]
) -> None:
    engine = {"max_batch": 3, "prefix_caching": caching}
    speculation = {"lookahead": 4, "siblings": siblings}
    with LLM(tiny_config(engine=engine, speculation=speculation), launch=InprocPipeline) as llm:
        plain = {params: generate(llm, PROMPTS, params, "none") for params in SCORED}
        for params in SCORED:
            for method in ("sd", "ssd", "none_fast", "none"):
                again = generate(llm, PROMPTS, params, method)
                for output, first in zip(again, plain[params], strict=True):
                    # The very numbers, from every method and after anything that was cached.
                    assert output.prompt_logprobs == first.prompt_logprobs
                    assert (output.token_ids, output.logprobs) == (first.token_ids, first.logprobs)
                    assert output.num_cached_tokens == 0
                    assert output.finish_reason == "length" and len(output.token_ids) == params.max_tokens
        for params, outputs in plain.items():
            for prompt, output in zip(PROMPTS, outputs, strict=True):
                assert params.prompt_logprobs is not None
                check(output, params.prompt_logprobs, reference(prompt))
        # Other requests are what they were without scoring.
        for params in SCORED[:2]:
            unscored = generate(llm, PROMPTS, replace(params, prompt_logprobs=None), "ssd")
            assert [output.token_ids for output in unscored] == [output.token_ids for output in plain[params]]
            assert all(output.prompt_logprobs is None for output in unscored)
        assert llm.degraded is None


def test_scored_keys_are_cached_for_others(tiny_config: Configure) -> None:
    prompt = ids(3 * CHUNK, seed=1)
    with LLM(tiny_config(engine={"max_batch": 2}), launch=InprocPipeline) as llm:
        [scored] = llm.generate([prompt], GREEDY)
        [cached] = llm.generate([prompt], replace(GREEDY, prompt_logprobs=None))
        [again] = llm.generate([prompt], GREEDY)
    assert (scored.num_cached_tokens, cached.num_cached_tokens, again.num_cached_tokens) == (0, len(prompt) - 1, 0)
    assert scored.token_ids == cached.token_ids == again.token_ids
    assert scored.prompt_logprobs == again.prompt_logprobs


def test_scored_and_unscored_share_a_batch(tiny_config: Configure, reference: Callable[..., torch.Tensor]) -> None:
    """More requests than slots, with common prefixes: none takes another's logits, or misses its own."""
    common = ids(2 * CHUNK, seed=2)
    prompts = [[*common, *ids(3 + number, seed=number)] for number in range(8)]
    params = [replace(GREEDY, prompt_logprobs=None if number % 2 else 2, seed=number) for number in range(8)]
    with LLM(tiny_config(engine={"max_batch": 3}), launch=InprocPipeline) as llm:
        alone = [llm.generate([p], wanted)[0] for p, wanted in zip(prompts, params, strict=True)]
    with LLM(tiny_config(engine={"max_batch": 3}), launch=InprocPipeline) as llm:
        together = llm.generate(prompts, params)
    for output, single, wanted in zip(together, alone, params, strict=True):
        assert (output.token_ids, output.prompt_logprobs) == (single.token_ids, single.prompt_logprobs)
        if wanted.prompt_logprobs is not None:
            check(output, 2, reference(output.prompt_token_ids))


def test_every_completion_is_scored(tiny_config: Configure) -> None:
    with LLM(tiny_config(engine={"max_batch": 2}), launch=InprocPipeline) as llm:
        [output] = llm.generate([ids(20)], replace(WARM, n=3))
    assert len({other.token_ids for other in output.outputs}) == 3
    assert len({other.prompt_logprobs for other in output.outputs}) == 1 and output.prompt_logprobs is not None


def test_no_tokens_at_all(tiny_config: Configure) -> None:
    """A prompt may then fill the context, and its event stream is one last event."""
    with LLM(tiny_config(engine={"max_batch": 2}), launch=InprocPipeline) as llm:
        full = ids(CONTEXT, seed=4)
        [event] = llm.stream(full, replace(GREEDY, max_tokens=0))
        [unscored] = llm.generate([full], SamplingParams(max_tokens=0))
        with pytest.raises(RequestError, match=f"{CONTEXT + 1} tokens.*leaves room for {CONTEXT}$"):
            llm.generate([ids(CONTEXT + 1)], SamplingParams(max_tokens=0))
        with pytest.raises(RequestError, match=f"{CONTEXT} tokens.*leaves room for {CONTEXT - 1}$"):
            llm.generate([full], SamplingParams(max_tokens=1))
    assert event.output is not None and event.output.prompt_logprobs is not None
    assert len(event.output.prompt_logprobs) == CONTEXT
    for output in (event.output, unscored):
        assert (output.token_ids, output.text, output.finish_reason, output.error) == ((), "", "length", None)


@pytest.mark.parametrize("method", ["none", "self"])
def test_self_speculation(method: Method, tiny_config: Configure, reference: Callable[..., torch.Tensor]) -> None:
    config = tiny_config(draft=None, engine={"max_batch": 2})
    config["speculation"] |= {"method": "self", "self": {"skip_attention": [1], "skip_mlp": []}}
    with LLM(config, launch=InprocPipeline) as llm:
        for output in generate(llm, PROMPTS, WARM, method):
            check(output, 3, reference(output.prompt_token_ids))


def test_several_ranks(tiny_config: Configure, reference: Callable[..., torch.Tensor]) -> None:
    config = tiny_config(engine={"max_batch": 2})
    config["target"] |= {"tensor_parallel": 2}
    with LLM(config, launch=InprocPipeline) as llm:
        outputs = {method: generate(llm, PROMPTS, GREEDY, method) for method in ("none", "ssd")}
    for plain, output in zip(outputs["none"], outputs["ssd"], strict=True):
        assert plain.prompt_logprobs == output.prompt_logprobs and plain.token_ids == output.token_ids
        check(output, 3, reference(output.prompt_token_ids))


def test_bfloat16_targets_report_float32(tiny_config: Configure) -> None:
    with LLM(tiny_config(dtype="bfloat16"), launch=InprocPipeline) as llm:
        [output] = llm.generate([ids(20)], replace(GREEDY, prompt_logprobs=20))
    assert output.prompt_logprobs is not None
    for token in output.prompt_logprobs[1:]:
        assert token is not None
        total = sum(2.718281828459045**value for _, value in token.top)
        assert 0 < total <= 1 + 1e-5 and [v for _, v in token.top] == sorted((v for _, v in token.top), reverse=True)


def test_they_survive_a_dictionary(tiny_config: Configure) -> None:
    with LLM(tiny_config(draft=None, speculation={"method": "none"}), launch=InprocPipeline) as llm:
        outputs = llm.generate([ids(5), ids(1)], replace(WARM, prompt_logprobs=2))
    for output in outputs:
        assert RequestOutput.from_dict(asdict(output)) == output
        told = output.prompt_logprobs
        assert told is not None and [type(one) for one in told] == [type(None), *[TokenLogprob] * (len(told) - 1)]


@pytest.mark.parametrize("count", [1, rows.ROWS_AT_ONCE - 1, rows.ROWS_AT_ONCE, rows.ROWS_AT_ONCE + 1, 200])
def test_rows_at_once_do_not_matter(count: int) -> None:
    logits = torch.randn(count, 50, generator=torch.Generator().manual_seed(count))
    tokens = [row % 50 for row in range(count)]
    whole, single = (
        token_logprobs(logits, tokens, 3),
        [token_logprobs(logits[i : i + 1], [t], 3) for i, t in enumerate(tokens)],
    )
    for column, parts in zip(whole, zip(*single, strict=True), strict=True):
        assert column == [part[0] for part in parts]
