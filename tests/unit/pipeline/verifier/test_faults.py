"""Logits that are not finite end the request that has them with an error, and touch no other request."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ssd import LLM, RequestOutput, SamplingParams
from ssd.decoding.verify.coupled import FAULT, chosen_tokens, verify_coupled
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.request.methods import Method
from ssd.testing.models.tiny import save_tiny, tiny_model
from ssd.testing.twins.served import Served

POISON = 77
"""The token after which the models of this file compute NaN."""
METHODS: tuple[Method, ...] = ("none", "none_fast", "sd", "ssd", "self")
GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
WARM = replace(GREEDY, temperature=1.0, seed=3)
PARAMS = [GREEDY, WARM, replace(WARM, top_p=0.9, top_k=40, repetition_penalty=1.2, logprobs=2)]
SOUND = [[9, 30, 76], [5], list(range(20, 50)), [40, 41]]
BAD: dict[str, list[int]] = {
    "last": [9, 30, POISON],
    "alone": [POISON],
    "first": [POISON, 9, 30],
    "in a later chunk": [*range(20, 45), POISON, 5, 6],
}
CAUSE = "the target's logits are not finite (NaN or infinite) at position {}: float16 overflow? "
Damage = Callable[[torch.nn.Module], None]


def nan_embedding(model: Any) -> None:
    model.get_input_embeddings().weight[POISON] = float("nan")


def infinite_embedding(model: Any) -> None:
    model.get_input_embeddings().weight[POISON] = float("inf")


def fond_of_poison(model: Any) -> None:
    """Proposes the token in about every second row."""
    head = model.get_output_embeddings().weight
    head[POISON] = 4 * head[9]


def all_nan(model: Any) -> None:
    for weight in model.parameters():
        weight.fill_(float("nan"))


def nan_head(model: Any) -> None:
    model.get_output_embeddings().weight[POISON] = float("nan")


def infinite_head(model: Any) -> None:
    model.get_output_embeddings().weight.mul_(3e38)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Damage], Path]:
    made: dict[Damage, Path] = {}

    def make(damage: Damage) -> Path:
        if damage not in made:
            folder = made[damage] = tmp_path_factory.mktemp(damage.__name__)
            save_tiny(folder, "llama")
            model = tiny_model("llama")
            with torch.no_grad():
                damage(model)
            model.save_pretrained(folder)
        return made[damage]

    return make


@pytest.fixture(scope="module")
def configure(damaged: Callable[[Damage], Path], tiny_config: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """A configuration whose target or draft is damaged."""

    def make(
        target: Damage | None = None, draft: Damage | None = None, attention: str = "auto", **speculation: Any
    ) -> dict[str, Any]:
        half = {"skip_attention": [1], "skip_mlp": []}
        config = tiny_config(speculation={"lookahead": 4, "self": half, **speculation}, engine={"max_batch": 3})
        for section, damage in (("target", target), ("draft", draft)):
            if damage is not None:
                config[section]["model"] = str(damaged(damage))
        config["target"]["attention"] = attention
        return config

    return make


def told(output: RequestOutput) -> tuple[Any, ...]:
    return output.token_ids, output.finish_reason, output.error, output.logprobs, output.prompt_logprobs


@pytest.mark.parametrize("attention", ["rows", "tree"])
@pytest.mark.parametrize("damage", [nan_embedding, infinite_embedding], ids=["nan", "inf"])
@pytest.mark.parametrize("siblings", [0, 2], ids=["chain", "comb"])
def test_ends_that_request_and_no_other(
    siblings: int, damage: Damage, attention: str, configure: Callable[..., dict[str, Any]]
) -> None:
    """In prompts; before and after, in the same slots, and in the batch: others are as they are alone."""
    with LLM(configure(attention=attention, siblings=siblings), launch=InprocPipeline) as llm:
        healthy = [llm.generate([prompt], params)[0] for params in PARAMS for prompt in SOUND]
    with LLM(configure(damage, attention=attention, siblings=siblings), launch=InprocPipeline) as llm:
        # Under masked attention a single row has other last bits than a padded one.
        for method in METHODS if attention == "tree" else ("none", "sd", "ssd", "self"):
            mixed = [*(prompt for pair in zip(SOUND, BAD.values(), strict=True) for prompt in pair), *SOUND]
            found: list[RequestOutput] = []
            for params in PARAMS:
                outputs = llm.generate(mixed, replace(params, method=method))
                found += outputs[8:]
                assert list(map(told, outputs[:8:2])) == list(map(told, outputs[8:]))
                for prompt, output in zip(BAD.values(), outputs[1:8:2], strict=True):
                    assert (output.finish_reason, output.token_ids, output.text) == ("error", (), "")
                    assert output.error is not None and output.error.startswith(CAUSE.format(len(prompt)))
            for one, other in zip(found, healthy, strict=True):
                assert told(one) == told(other)
        assert llm.degraded is None


@pytest.mark.parametrize("siblings", [0, 2], ids=["chain", "comb"])
def test_the_tokens_before_it_stay(siblings: int, configure: Callable[..., dict[str, Any]]) -> None:
    """The target chooses the token itself in the middle of its output, at the same place with every method."""
    drawn = [replace(WARM, max_tokens=40, logprobs=1, logit_bias={POISON: 4.0}, seed=seed) for seed in range(12)]
    prompts = [[first, second] for first in range(10, 40, 5) for second in (9, 50)]
    with LLM(configure(nan_embedding, siblings=siblings), launch=InprocPipeline) as llm:
        plain = llm.generate(prompts, [replace(params, method="none") for params in drawn])
        for method in METHODS[1:]:
            outputs = llm.generate(prompts, [replace(params, method=method) for params in drawn])
            assert list(map(told, outputs)) == list(map(told, plain))
    ended = [output for output in plain if output.finish_reason == "error"]
    assert len({len(output.token_ids) for output in ended}) > 2
    for output in ended:
        assert output.token_ids[-1] == POISON and POISON not in output.token_ids[:-1]
        assert output.error is not None and output.error.startswith(CAUSE.format(2 + len(output.token_ids)))
        assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
        assert all(token.logprob == token.logprob for token in output.logprobs)


def test_an_end_before_it_counts(configure: Callable[..., dict[str, Any]]) -> None:
    forced = replace(GREEDY, logit_bias={POISON: 100.0})
    with LLM(configure(nan_embedding), launch=InprocPipeline) as llm:
        for method in METHODS:
            params = [replace(forced, max_tokens=1), replace(forced, stop_token_ids=(POISON,)), forced]
            outputs = llm.generate([[9, 30]] * 3, [replace(one, method=method) for one in params])
            assert [output.token_ids for output in outputs] == [(POISON,)] * 3
            assert [output.finish_reason for output in outputs] == ["length", "stop", "error"]


@pytest.mark.parametrize("attention", ["rows", "tree"])
@pytest.mark.parametrize("siblings", [0, 2], ids=["chain", "comb"])
@pytest.mark.parametrize("verify", ["coupled", "rejection", "block"])
def test_rejected_candidates_are_harmless(
    verify: str, siblings: int, attention: str, configure: Callable[..., dict[str, Any]]
) -> None:
    """A draft proposes the token, which the target computes and rejects: nothing of it stays."""
    if verify == "block" and siblings:
        pytest.skip("block verifies chains")
    config = configure(nan_embedding, fond_of_poison, attention, siblings=siblings, verify=verify)
    params = [replace(one, bad_words=((POISON,),), min_tokens=16) for one in PARAMS[: 3 if verify == "coupled" else 1]]
    params += [replace(one, logit_bias={POISON: -100.0}) for one in params]
    with LLM(config, launch=InprocPipeline) as llm:
        for wanted in params:
            plain = llm.generate(SOUND, replace(wanted, method="none"))
            assert all(output.finish_reason == "length" for output in plain)
            for method in ("sd", "ssd"):
                outputs = llm.generate(SOUND, replace(wanted, method=method))
                assert list(map(told, outputs)) == list(map(told, plain))
        # Nothing but a draft's proposal: with no processor in the way.
        plain = llm.generate(SOUND, replace(GREEDY, method="none"))
        outputs = llm.generate(SOUND, replace(GREEDY, method="ssd"))
        assert list(map(told, outputs)) == list(map(told, plain))
        assert all(POISON not in output.token_ids for output in plain)
        assert sum(output.speculation.drafted for output in outputs) > 20


@pytest.mark.parametrize("damage", [nan_embedding, all_nan, nan_head, infinite_head], ids=lambda one: one.__name__)
@pytest.mark.parametrize("verify", ["coupled", "rejection", "block"])
def test_faults_of_the_draft_cost_acceptance_only(
    verify: str, damage: Damage, configure: Callable[..., dict[str, Any]]
) -> None:
    repeatable = PARAMS if verify == "coupled" else PARAMS[:1]
    with LLM(configure(draft=damage, verify=verify), launch=InprocPipeline) as llm:
        for method in ("sd", "ssd"):
            for params in repeatable:
                plain = llm.generate([*SOUND, *BAD.values()], replace(params, method="none"))
                outputs = llm.generate([*SOUND, *BAD.values()], replace(params, method=method))
                assert list(map(told, outputs)) == list(map(told, plain))
            for output in llm.generate([*SOUND, *BAD.values()], replace(WARM, method=method)):
                assert (output.finish_reason, len(output.token_ids)) == ("length", 16)
        assert llm.degraded is None


@pytest.mark.parametrize("verify", ["coupled", "rejection", "block"])
@pytest.mark.parametrize("damage", [nan_head, infinite_head], ids=lambda one: one.__name__)
def test_a_target_without_any_sound_row(damage: Damage, verify: str, configure: Callable[..., dict[str, Any]]) -> None:
    with LLM(configure(damage, verify=verify), launch=InprocPipeline) as llm:
        for method in METHODS if verify == "coupled" else ("none", "sd", "ssd"):
            for params in PARAMS:
                for output in llm.generate(SOUND, replace(params, method=method)):
                    assert (output.finish_reason, output.token_ids) == ("error", ())


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_under_rules_that_compare_probabilities(rule: str, configure: Callable[..., dict[str, Any]]) -> None:
    with LLM(configure(nan_embedding, verify=rule), launch=InprocPipeline) as llm:
        for method in ("none", "sd", "ssd"):
            outputs = llm.generate([*SOUND, *BAD.values()], replace(WARM, method=method, logit_bias={POISON: -100.0}))
            assert [output.finish_reason for output in outputs] == ["length"] * 4 + ["error"] * 4
            assert all(len(output.token_ids) == 16 for output in outputs[:4])


def test_scored_prompts(configure: Callable[..., dict[str, Any]]) -> None:
    """Where the first token that cannot be scored stands."""
    params = [replace(GREEDY, prompt_logprobs=1, max_tokens=count) for count in (0, 1, 16)]
    with LLM(configure(nan_embedding), launch=InprocPipeline) as llm:
        for method in METHODS:
            for wanted in params:
                outputs = llm.generate([*SOUND, *BAD.values()], replace(wanted, method=method))
                for output in outputs[:4]:
                    assert output.finish_reason == "length" and output.prompt_logprobs is not None
                for prompt, output in zip(list(BAD.values())[2:], outputs[6:], strict=True):
                    place = prompt.index(POISON) + 1
                    assert output.error is not None and output.error.startswith(CAUSE.format(place))


@pytest.fixture(scope="module")
def served(configure: Callable[..., dict[str, Any]]) -> Iterator[Served]:
    server = Served(launch=InprocPipeline, config={**configure(nan_embedding), "speculation": {"lookahead": 3}})
    yield server
    server.close()


def strictly(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    "extra", [{}, {"logprobs": 2}, {"method": "none"}, {"method": "ssd", "temperature": 1}], ids=str
)
def test_over_http(extra: dict[str, Any], served: Served) -> None:
    body = {"model": "tiny", "prompt": BAD["last"], "max_tokens": 9, "temperature": 0, "seed": 1, **extra}
    status, headers, text = served.ask("POST", "/v1/completions", body)
    assert (status, headers["content-type"].split(";")[0]) == (500, "application/json")
    told = strictly(text)["error"]
    assert told["message"].startswith(CAUSE.format(3)) and told["code"] == "generation_failed"
    status, _, text = served.ask("POST", "/v1/completions", {**body, "stream": True})
    assert status == 200
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert strictly(events[-1])["error"] == told
    status, _, text = served.ask("POST", "/v1/completions", {**body, "prompt": SOUND[0], "ignore_eos": True})
    assert status == 200 and strictly(text)["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_without_a_token(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[1.0, 2.0], [nan, 2.0], [1.0, inf], [-inf, 2.0], [-inf, -inf], [-inf, nan], [inf, nan], [3.0, -inf]]
    logits = torch.tensor(rows, dtype=dtype)
    assert chosen_tokens(logits, logits).tolist() == [1, FAULT, FAULT, 1, FAULT, FAULT, FAULT, 0]
    # What is excluded afterwards does not count.
    masked = torch.full_like(logits, -inf)
    masked[:, 0] = 0
    assert chosen_tokens(logits, masked).tolist() == [0, FAULT, FAULT, 0, FAULT, FAULT, FAULT, 0]


def test_no_candidate_is_a_fault() -> None:
    """Whatever a draft sends."""
    tokens, chosen = torch.tensor([[4, FAULT, FAULT], [4, 5, FAULT]]), torch.tensor([[FAULT, 1, 1], [5, FAULT, 1]])
    parents, depths = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
    ancestors = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    outcome = verify_coupled(tokens, chosen, parents, depths, ancestors)
    assert (outcome.node.tolist(), outcome.bonus.tolist()) == ([0, 1], [FAULT, FAULT])
