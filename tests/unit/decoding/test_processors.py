"""Penalties, biases and bans: equal to transformers and vLLM's formulas, at every node of a tree."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from ssd import RequestError, SamplingParams
from ssd.decoding import processors as processor_module
from ssd.decoding.processors import Processors, ProcessorSettings, TreePaths
from ssd.decoding.sampling import scores
from ssd.decoding.trees.shape import ABSENT, TreeShape
from ssd.engine.resolve import resolve
from ssd.models.cpu import operators
from ssd.models.rows import RowPlan
from ssd.pipeline.sampling.scorers import LikelyScorer, RequestTensors
from ssd.pipeline.sampling.slots import SlotSampling
from ssd.pipeline.sampling.walk import Rows
from ssd.request.sampling_params import completion_seed
from ssd.testing.models.tiny import tiny_tokenizer

assert operators.available()
V = 40
INF = float("inf")
PROMPT, OUTPUT = [3, 5, 5, 9, 30], [7, 5, 7, 11]

EACH: dict[str, dict[str, Any]] = {
    "repetition above 1": {"repetition_penalty": 1.3},
    "repetition below 1": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": 0.6},
    "frequency": {"frequency_penalty": -0.4},
    "bias": {"logit_bias": ((0, 1.5), (7, -100.0), (39, 0.1))},
    "one-token bad words": {"bad_words": ((4,), (7,))},
    "bad words": {"bad_words": ((7, 11, 2), (11, 3), (1, 2, 3, 4), (5, 7, 11, 2), (11, 4), (6, 3), (7,))},
    "allowed": {"allowed_token_ids": (1, 2, 7, 11, 39)},
    "min_tokens": {"min_tokens": 6, "end_ids": (0, 8, 8)},
    "end ids alone": {"end_ids": (0, 8)},
    "all": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "logit_bias": ((2, 3.0), (11, -2.0)),
        "bad_words": ((11, 2), (39,)),
        "allowed_token_ids": tuple(range(1, 40)),
        "min_tokens": 7,
        "end_ids": (8,),
    },
}


def logits_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def by_the_formulas(logits: list[float], prompt: list[int], output: list[int], given: dict[str, Any]) -> list[float]:
    """One row, written from vLLM's documentation, token by token."""
    settings = ProcessorSettings(**given)
    result = []
    for token, logit in enumerate(logits):
        value = logit
        if settings.allowed_token_ids is not None and token not in settings.allowed_token_ids:
            value = -INF
        for *prefix, last in settings.bad_words:
            if token == last and len(prefix) <= len(output) and output[len(output) - len(prefix) :] == prefix:
                value = -INF
        if len(output) < settings.min_tokens and token in settings.end_ids:
            value = -INF
        value += dict(settings.logit_bias).get(token, 0.0)
        if token in prompt or token in output:
            value = value / settings.repetition_penalty if value > 0 else value * settings.repetition_penalty
        value -= settings.frequency_penalty * output.count(token)
        value -= settings.presence_penalty * (token in output)
        result.append(value)
    return result


def processors(*rows: dict[str, Any] | None, prompt: list[int] = PROMPT, output: list[int] = OUTPUT) -> Processors:
    made = Processors(len(rows), V, "cpu")
    for slot, given in enumerate(rows):
        if given is not None:
            made.set(slot, ProcessorSettings(**given), prompt=prompt, output=output)
    return made


@pytest.mark.parametrize("name", EACH)
def test_every_row_of_a_tree_by_the_formulas(name: str) -> None:
    """Several outputs, so that bad words complete and ``min_tokens`` passes on the way."""
    shape = TreeShape.comb(3, 2)
    logits = logits_of(1, shape.nodes, V)
    touched = 0
    for output in ([], [7], OUTPUT, [*OUTPUT, 5, 7]):
        made = processors(EACH[name], output=output)
        generator = random.Random(name + str(output))
        tokens = torch.tensor([[-7, *(generator.choice([7, 11, 5, 2, 6, 1]) for _ in range(shape.nodes - 1))]])
        actual = made.apply(logits, TreePaths(shape).of(tokens))
        for node in range(shape.nodes):
            history = output + [int(tokens[0, n]) for n in shape.path(node)]
            expected = torch.tensor(by_the_formulas(logits[0, node].tolist(), PROMPT, history, EACH[name]))
            torch.testing.assert_close(actual[0, node], expected)
        touched += int((actual != logits).sum())
    assert (touched > 0) == (name != "end ids alone")


@pytest.mark.parametrize("name", EACH)
def test_the_operator_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, generator = TreeShape.comb(4, 1), random.Random(name)
    tokens = torch.tensor([[generator.choice([7, 11, 5, 2, V, -3]) for _ in range(shape.nodes)] for _ in range(3)])
    made, logits = processors(EACH[name], None, EACH["all"]), logits_of(3, shape.nodes, V)
    logits[:, :, 7] = 0.0
    assert processor_module.has_operators(logits.device)
    ours = made.apply(logits, TreePaths(shape).of(tokens))
    monkeypatch.setattr(processor_module, "has_operators", lambda _: False)
    assert torch.equal(ours, made.apply(logits, TreePaths(shape).of(tokens)))


@pytest.mark.parametrize("name", EACH)
def test_a_path_equals_committed_tokens(name: str) -> None:
    """Bit for bit: tokens on a verified row's path count as those in the history of plain decoding."""
    history = [2, 7, 11, 7, 7, 11, 2, 5]
    logits = logits_of(2, 1, V)
    for split in range(len(history) + 1):
        at_once = processors(EACH[name], None, output=history)
        other = processors(EACH[name], None, output=[])
        for token in history[:split]:
            other.commit(0, [token])
        path = torch.tensor([[history[split:]], [[ABSENT] * (len(history) - split)]], dtype=torch.int64)
        for gap in (0, 3):  # paths of less than a tree's depth
            padded = torch.nn.functional.pad(path, (gap, 0), value=ABSENT)
            assert torch.equal(other.apply(logits, padded), at_once.apply(logits))


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("name", EACH)
def test_a_draft_processes_every_row_as_after_the_committed_tokens(
    name: str, built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled drafting, except for bad words of several tokens."""
    if not built:
        monkeypatch.setattr(operators, "available", lambda: False)
    given = EACH[name] | {"bad_words": tuple(word for word in EACH[name].get("bad_words", ()) if len(word) == 1)}
    state, logits = SlotSampling(2, V, "cpu", horizon=1), logits_of(2, 3, V)
    shape = TreeShape.comb(2)
    tensors = RequestTensors(state, shape, 2, V, torch.device("cpu"))
    assert state.filters == built
    state.processors.set(1, ProcessorSettings(**given), prompt=PROMPT, output=OUTPUT)

    def scored() -> Tensor:
        nothing = torch.zeros(2, 3, dtype=torch.int64)
        requested = tensors.requested(nothing, nothing[:, 0])
        assert (requested.adjustments is None) == (state.plain and not built)
        rows = Rows(RowPlan.tree("glue", shape), 0, nothing, in_tree=True)
        return LikelyScorer(state, 1, requested).score(logits, rows)

    for tokens in ([], [7, 5], [7, 30, 2]):
        state.processors.commit(1, tokens)
        torch.testing.assert_close(scored(), state.processed(logits, None))
    state.processors.clear(1)
    assert torch.equal(scored(), logits)


def test_as_transformers() -> None:
    logits = logits_of(1, 1, V)
    ids = torch.tensor([PROMPT + OUTPUT])
    output = torch.tensor([OUTPUT])

    def ours(**given: Any) -> Tensor:
        return processors(given).apply(logits)[0]

    for penalty in (0.5, 1.7):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[0])  # type: ignore[arg-type]
        assert torch.equal(ours(repetition_penalty=penalty), expected)
    words = [[7, 11, 2], [11, 3], [1, 2], [4]]
    expected = NoBadWordsLogitsProcessor(words)(output, logits[0])  # type: ignore[arg-type]
    assert torch.equal(ours(bad_words=tuple(map(tuple, words))), expected)
    assert int(expected.isinf().sum()) == 3
    expected = SequenceBiasLogitsProcessor([[[3], 2.5], [[9], -4.0]])(output, logits[0])  # type: ignore[arg-type]
    assert torch.equal(ours(logit_bias=((3, 2.5), (9, -4.0))), expected)
    expected = SuppressTokensLogitsProcessor([t for t in range(V) if t not in (4, 9)])(output, logits[0])  # type: ignore[arg-type]
    assert torch.equal(ours(allowed_token_ids=(4, 9)), expected)
    for least in (4, 5):
        processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), least, [0, 8])
        assert torch.equal(ours(min_tokens=least, end_ids=(0, 8)), processor(ids, logits[0]))  # type: ignore[arg-type]


def test_bad_words_do_not_begin_in_the_prompt() -> None:
    made = processors({"bad_words": ((30, 2), (9, 30, 2))}, output=[])
    logits = logits_of(1, 1, V)
    assert torch.equal(made.apply(logits), logits)
    made.commit(0, [30])
    assert made.apply(logits).isinf().nonzero().tolist() == [[0, 0, 2]]


def test_rows_do_not_see_each_other() -> None:
    rows = [EACH["all"], None, EACH["bad words"], EACH["frequency"], None, EACH["allowed"]]
    made = processors(*rows)
    logits, before = logits_of(6, 3, V), logits_of(6, 3, V)
    paths = torch.tensor([[ABSENT, ABSENT], [ABSENT, 7], [7, 11]]).expand(6, -1, -1)
    actual = made.apply(logits, paths)
    assert torch.equal(logits, before)  # raw logits are still needed for log-probabilities
    for slot, given in enumerate(rows):
        alone = processors(given).apply(logits[slot : slot + 1], paths[:1])
        assert torch.equal(actual[slot], alone[0])
    made.clear(0)
    made.set(2, ProcessorSettings(repetition_penalty=2.0), prompt=[1], output=[])
    after = made.apply(logits, paths)
    assert torch.equal(after[0], logits[0])
    assert torch.equal(after[3], actual[3])
    fresh = Processors(1, V, "cpu")
    fresh.set(0, ProcessorSettings(repetition_penalty=2.0), prompt=[1])
    assert torch.equal(after[2], fresh.apply(logits[2:3], paths[:1])[0])


def test_invalid_candidates() -> None:
    """A hostile draft: rows that cannot be accepted do not disturb others, whatever they hold."""
    made = processors(EACH["all"])
    logits = logits_of(1, 3, V)
    paths = torch.tensor([[[ABSENT, 7], [V, 7], [2**31 - 1, -(2**31)]]])
    assert torch.equal(made.apply(logits, paths)[0, 0], made.apply(logits[:, :1], paths[:, :1])[0, 0])


def test_slots_without_settings_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SlotSampling(2, V, "cpu", horizon=3)
    state.set(0, params := SamplingParams(temperature=1.0, top_k=3, stop_token_ids=(3,), logprobs=4))
    state.process(0, params, prompt=PROMPT, output=[], ends=[0])
    monkeypatch.setattr(Processors, "apply", lambda *_: pytest.fail("processed"))
    logits = logits_of(2, 3, V)
    scores(state.processed(logits, None), state.params, state.noise(torch.tensor([4, 4])))
    assert not state.processors.active
    # And no longer than it is asked for.
    state.process(1, SamplingParams(min_tokens=3), prompt=PROMPT, output=[], ends=[0, V + 3])
    assert state.processors.active
    state.processors.commit(1, [1, 2])
    assert state.processors.active
    state.processors.commit(1, [1])
    assert not state.processors.active
    state.process(1, SamplingParams(presence_penalty=1.0), prompt=PROMPT, output=[], ends=[])
    state.clear(1)
    assert not state.processors.active


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"repetition_penalty": INF}, "repetition_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty"),
    ({"logit_bias": {3: 101.0}}, "logit_bias"),
    ({"logit_bias": {-1: 1.0}}, "logit_bias"),
    ({"logit_bias": {3: float("nan")}}, "logit_bias"),
    ({"logit_bias": {"x": 1.0}}, "logit_bias"),
    ({"logit_bias": [3, 4]}, "logit_bias"),
    ({"bad_words": "one"}, "bad_words"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": [[]]}, "bad_words"),
    ({"bad_words": [3, 4]}, "bad_words"),
    ({"bad_words": [[3, "x"]]}, "bad_words"),
    ({"allowed_token_ids": ()}, "allowed_token_ids"),
    ({"allowed_token_ids": (-1,)}, "allowed_token_ids"),
    ({"stop_token_ids": "12"}, "stop_token_ids"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 4, "max_tokens": 3}, "min_tokens"),
    ({"n": 0}, "n must"),
    ({"n": 129, "temperature": 1.0}, "n must"),
    ({"n": 2}, "temperature"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=str)
def test_values_out_of_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        SamplingParams(**given)
    assert "\n" not in str(error.value)


def test_biases_as_json_gives_them() -> None:
    assert SamplingParams(logit_bias={"7": 1, 3: -2.5}).logit_bias == ((3, -2.5), (7, 1.0))  # type: ignore[dict-item]
    assert hash(SamplingParams(logit_bias={7: 1.0}, bad_words=["a", [1, 2]]))  # type: ignore[arg-type]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(700)


def resolved(**given: Any) -> SamplingParams:
    return resolve(SamplingParams(**given), tokenizer(), vocabulary=700, ends=(0,))


def test_bad_words_of_text() -> None:
    encode = tokenizer().encode
    (whole,) = resolved(bad_words=["it\n"]).bad_words
    assert list(whole) == encode("it\n") and len(whole) > 1
    # After a space it is one other token, so both forms are banned, however it was given.
    for word in ("s", "  s"):
        assert resolved(bad_words=[word]).bad_words == (tuple(encode("s")), tuple(encode(" s")))
    assert len(encode(" s")) == 1
    assert resolved(bad_words=["🐍", [5, 6]]).bad_words == (tuple(encode("🐍")), (5, 6))
    untouched = SamplingParams(stop=("x",))
    assert resolve(untouched, None, vocabulary=1, ends=()) is untouched


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logit_bias": {700: 1.0}}, "logit_bias has token id 700"),
        ({"stop_token_ids": (5, 701)}, "stop_token_ids has token id 701"),
        ({"allowed_token_ids": (700,)}, "allowed_token_ids has token id 700"),
        ({"bad_words": [[3, 700]]}, "bad_words has token id 700"),
        ({"bad_words": ["  "]}, "is no token"),
        ({"allowed_token_ids": (5, 6), "bad_words": [[5], [9, 6]]}, "exclude every token"),
        ({"allowed_token_ids": (0, 6), "min_tokens": 1, "stop_token_ids": (6,)}, "exclude every token"),
        ({"bad_words": [[token] for token in range(700)]}, "exclude every token"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_vocabulary(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        resolved(**given)


def test_seeds_of_completions() -> None:
    seeds = [completion_seed(5, index) for index in range(100)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 100 and all(0 <= seed < 2**63 for seed in seeds)
    # SplitMix64 of 0: the first output of the reference implementation, less its sign bit.
    assert completion_seed(0, 1) == 0xE220A8397B1DCDAF & (2**63 - 1)
    assert not set(seeds[1:]) & {completion_seed(6, index) for index in range(100)}
    SamplingParams(seed=completion_seed(2**63 - 1, 127))
