"""Every processor, whatever drafts: the tokens are plain decoding's, and plain decoding's are those
of transformers' own processors, step by step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from ssd import LLM, SamplingParams
from ssd.decoding.noise import gumbel
from ssd.models.runner import ForwardRunner
from ssd.pipeline.draft.executors import StepByStep, Whole
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.request.sampling_params import completion_seed
from tests.unit.models.test_graphs import as_on_gpus  # noqa: F401  a fixture

Configure = Callable[..., dict[str, Any]]
VOCABULARY = 128
PROMPTS = [[9, 30, 77], [5], list(range(20, 44)), [100, 9, 9, 9]]
BASE = SamplingParams(max_tokens=16, ignore_eos=True)
EACH: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.6},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.5},
    "rewarding": {"repetition_penalty": 0.8, "presence_penalty": -1.0, "frequency_penalty": -0.5},
    "bias": {"logit_bias": {token: 4.0 for token in range(10, 22)} | {30: -100.0}},
    "allowed": {"allowed_token_ids": tuple(range(8, 128, 6))},
    "min_tokens": {"min_tokens": 9, "ignore_eos": False, "stop_token_ids": tuple(range(4, 64))},
    "bad words": {"bad_words": ()},  # made of what would come
    "all": {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {7: 3.0, 12: 2.0},
        "min_tokens": 12,
        "stop_token_ids": tuple(range(4, 64)),
        "ignore_eos": False,
        "bad_words": ([7], [12, 13]),
        "allowed_token_ids": tuple(range(110)),
    },
}


def step_by_step(model: Any, prompt: list[int], params: SamplingParams) -> list[int]:
    """One full forward a token, transformers' processors, vLLM's formulas for those it lacks."""
    ends = {0, *params.stop_token_ids}
    output: list[int] = []
    while len(output) < params.max_tokens:
        ids = torch.tensor([prompt + output])
        with torch.no_grad():
            logits: torch.Tensor = model(ids).logits[:, -1].float()
        if params.allowed_token_ids is not None:
            dropped = sorted(set(range(VOCABULARY)) - set(params.allowed_token_ids))
            logits = SuppressTokensLogitsProcessor(dropped)(ids, logits)  # type: ignore[arg-type]
        if params.bad_words:
            words = [list(word) for word in params.bad_words]
            logits = NoBadWordsLogitsProcessor(words)(torch.tensor([output]), logits)  # type: ignore[arg-type]
        if params.min_tokens:
            least = MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, sorted(ends))
            logits = least(ids, logits)  # type: ignore[arg-type]
        if params.logit_bias:
            biases = [[[token], bias] for token, bias in dict(params.logit_bias).items()]
            logits = SequenceBiasLogitsProcessor(biases)(ids, logits)  # type: ignore[arg-type]
        if params.repetition_penalty != 1:
            logits = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, logits)  # type: ignore[arg-type]
        counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=VOCABULARY)
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        if params.temperature:
            position = torch.tensor([len(prompt) + len(output)])
            logits = logits + params.temperature * gumbel(torch.tensor([params.seed]), position, VOCABULARY)
        output.append(int(logits.argmax()))
        if output[-1] in ends - ({0} if params.ignore_eos else set()):
            break
    return output


@pytest.fixture(scope="module")
def cases(folder_of: Callable[..., Any]) -> list[tuple[list[int], SamplingParams, list[int]]]:
    """Prompt, parameters, and the tokens they must give; at temperature 0 and above."""
    model = AutoModelForCausalLM.from_pretrained(folder_of("llama", "target"), dtype=torch.float32)
    made = []
    for warm in (False, True):
        base = replace(BASE, temperature=0.9 if warm else 0.0, seed=11)
        for number, (name, values) in enumerate(EACH.items()):
            prompt = PROMPTS[number % len(PROMPTS)]
            free = step_by_step(model, prompt, base)
            if name == "bad words":
                values = {"bad_words": (free[2:4], free[5:8], free[9:10], [prompt[-1], free[0]])}
            params = replace(base, **values)
            expected = step_by_step(model, prompt, params)
            assert expected != free, name
            made.append((prompt, params, expected))
    # Beside them, rows that ask for nothing.
    for prompt in PROMPTS[:2]:
        made.append((prompt, BASE, step_by_step(model, prompt, BASE)))
    return made


@pytest.mark.parametrize(
    ("batch", "siblings", "lookahead", "fallback"),
    [(1, 0, 3, "jit"), (4, 0, 4, "none"), (1, 2, 2, "jit"), (4, 2, 3, "jit")],
)
def test_every_parameter(
    batch: int, siblings: int, lookahead: int, fallback: str, cases: Any, tiny_config: Configure
) -> None:
    config = tiny_config(
        engine={"max_batch": batch},
        speculation={
            "lookahead": lookahead,
            "siblings": siblings,
            "fallback": fallback,
            "forecast": {"budget": 4 * (1 + lookahead)},
        },
    )
    if batch == 1:  # one after another takes its time: half of them for each tree
        cases = cases[siblings // 2 :: 2]
    asked, params, expected = map(list, zip(*cases, strict=True))
    # Rows of all kinds side by side, and a slot's next request another kind.
    with LLM(config, launch=InprocPipeline) as llm:
        outputs = {
            method: llm.generate(asked, [replace(p, method=method) for p in params]) for method in ("none", "sd", "ssd")
        }
        assert llm.degraded is None
    for method in ("none", "sd", "ssd"):
        for output, tokens, p in zip(outputs[method], expected, params, strict=True):
            assert list(output.token_ids) == tokens, (method, p)
    for method in ("sd", "ssd"):
        assert sum(output.speculation.accepted for output in outputs[method]) > len(cases)
    assert sum(output.speculation.hits for output in outputs["ssd"]) > 0


@pytest.mark.usefixtures("as_on_gpus")
def test_every_parameter_captured(cases: Any, tiny_config: Configure) -> None:
    test_every_parameter(4, 2, 3, "jit", cases, tiny_config)


def test_a_draft_that_is_the_target_is_always_right(tiny_config: Configure, cases: Any) -> None:
    """So it applies the same processors: in glue, branches and what it drafts on a miss."""
    config = tiny_config(draft="target", speculation={"lookahead": 4, "forecast": {"budget": 15}})
    with LLM(config, launch=InprocPipeline) as llm:
        for method, some in (("ssd", cases), ("sd", cases[1::3])):
            for prompt, p, expected in some:
                (output,) = llm.generate([prompt], replace(p, method=method))
                assert list(output.token_ids) == expected
                record = output.speculation
                assert record.accepted == record.drafted, p
                assert record.hits == record.lookups
                if method == "ssd":
                    assert record.lookups == record.rounds - 1


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_when_a_tree_is_drafted_at_once(tiny_config: Configure, monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """Unless candidates are drawn. The executor is chosen by the batch, round by round."""
    drawn = "Whole" if rule == "coupled" else "StepByStep"
    taken: dict[int, set[str]] = defaultdict(set)
    for executor in (Whole, StepByStep):

        def noting(self: Any, *given: Any, grow: Any = executor.grow, name: str = executor.__name__) -> Any:
            # By seed: the draft's last round may outlast the front's answer.
            taken[int(self._model.sampling.params.seed[0])].add(name)
            return grow(self, *given)

        monkeypatch.setattr(executor, "grow", noting)
    monkeypatch.setattr(ForwardRunner, "fuses", True)  # as if it compiled: only the choice is of interest
    ways: list[tuple[dict[str, Any], str]] = [
        ({}, "Whole"),
        ({"presence_penalty": 1.0}, "Whole"),
        ({"min_tokens": 16}, "Whole"),
        ({"temperature": 1.0, "logprobs": 2}, drawn),
        ({"temperature": 1.0, "top_k": 9}, drawn),
        ({"logprobs": 1}, "Whole"),
    ]
    with LLM(tiny_config(speculation={"verify": rule}), launch=InprocPipeline) as llm:
        for seed, (given, _) in enumerate(ways, start=1):
            llm.generate([[9, 30]], replace(BASE, seed=seed, **given))
        assert llm.degraded is None
    assert taken.pop(0) == {"Whole"}  # the warm-up
    assert taken == {seed: {way} for seed, (_, way) in enumerate(ways, start=1)}


def test_completions(tiny_config: Configure) -> None:
    """``n`` completions are those of their seeds, first the request's own; greedy ones in between."""
    hot = replace(BASE, temperature=1.0, seed=5, repetition_penalty=1.1, logprobs=1)
    with LLM(tiny_config(engine={"max_batch": 3}), launch=InprocPipeline) as llm:
        three, plain, two = llm.generate(PROMPTS[:3], [replace(hot, n=3), BASE, replace(hot, n=2)])
        assert [output.index for output in three.outputs] == [0, 1, 2]
        assert len({output.token_ids for output in three.outputs}) == 3
        assert len(two.outputs) == 2 and len(plain.outputs) == 1
        for prompt, outputs in ((PROMPTS[0], three.outputs), (PROMPTS[2], two.outputs)):
            for index, output in enumerate(outputs):
                (alone,) = llm.generate([prompt], replace(hot, seed=completion_seed(5, index), method="none"))
                assert (alone.token_ids, alone.text, alone.logprobs) == (output.token_ids, output.text, output.logprobs)
        events = list(llm.stream(PROMPTS[0], replace(hot, n=3)))
        for output in three.outputs:
            ours = [event for event in events if event.index == output.index]
            assert tuple(token for event in ours for token in event.token_ids) == output.token_ids
            assert "".join(event.text for event in ours) == output.text
            assert [event.output is not None for event in ours] == [False] * (len(ours) - 1) + [True]
        stream = llm.stream(PROMPTS[0], replace(hot, n=3, max_tokens=100))
        next(stream)
        stream.close()
        llm.generate([PROMPTS[0]], BASE)  # by then the verifier has answered
        assert llm._front.running == llm._front.queued == 0


def test_bad_words_of_text(tiny_config: Configure) -> None:
    with LLM(tiny_config(), launch=InprocPipeline) as llm:
        (free,) = llm.generate([PROMPTS[2]], BASE)
        banned = [llm.tokenizer.decode(free.token_ids[i : i + 1]) for i in (1, 3)]
        (output,) = llm.generate([PROMPTS[2]], replace(BASE, bad_words=tuple(banned)))
        assert free.token_ids[1] in llm.tokenizer.encode(banned[0])
        assert not {free.token_ids[1], free.token_ids[3]} & set(output.token_ids)
