"""Real models, real workers: the sampled tokens have the target's joint law, whatever happened.

Short requests from one prompt, batched. The law of every sequence is computed from the target
alone; the tokens after a round are compared with it given the tokens before, split by where the
round's tree came from (hit, drafted after a miss) and by how much of it was accepted. The seeds
are fixed, so these tests pass always or never.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ssd import SamplingParams
from ssd.config import load_config
from ssd.decoding.sampling import SamplingTensors, filter_logits
from ssd.pipeline import draft as draft_module
from ssd.pipeline import rules
from ssd.pipeline.build import Plan, build_draft, build_verifier
from ssd.testing.rounds import History, Source, play
from ssd.testing.tiny import save_tiny, tiny_model

VOCABULARY, START, COUNT = 24, 7, 5
PARAMS = SamplingParams(temperature=2.5, top_k=3, max_tokens=COUNT, ignore_eos=True)
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
}
P_VALUE = 1e-3
SAMPLES = 1280
Prefix = tuple[int, ...]
CASES: dict[str, dict[str, Any]] = {
    "rejection": {"verify": "rejection", "support": 99},
    "rejection, tree, scaled, m=2": {"verify": "rejection", "siblings": 1, "support": 2, "saguaro_c": 0.4},
    "block": {"verify": "block", "support": 2},
    "block, scaled": {"verify": "block", "support": 99, "saguaro_c": 0.4},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and a draft that is right now and then."""
    target = save_tiny(tmp_path_factory.mktemp("target"), "llama", **SHAPE)
    model = tiny_model("llama", **SHAPE)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std(correction=0), alpha=0.3)
    folder = tmp_path_factory.mktemp("draft")
    model.save_pretrained(folder)
    return target, folder


def sampled(pair: tuple[Path, Path], count: int, seed: int = 0, **speculation: Any) -> list[History]:
    target, draft = ({"model": str(folder), "compile": False} for folder in pair)
    config = load_config(
        {
            "target": target,
            "draft": draft,
            "speculation": {"lookahead": 2, "forecast": {"budget": 4}, **speculation},
            "engine": {"max_batch": min(256, count), "max_model_len": 16, "prefill_chunk": 8},
        }
    )
    plan = Plan(config=config, vocabulary=VOCABULARY, ends=())
    verifier, worker = build_verifier(plan)[0], build_draft(plan)[0]
    seeds = [replace(PARAMS, seed=seed + number) for number in range(count)]
    return play(verifier, worker, plan, [[START]] * count, seeds)


@cache
def target_law(temperature: float = PARAMS.temperature) -> dict[Prefix, float]:
    """Of every sequence of up to ``COUNT`` tokens: its probability, from the target's own forward."""
    model = tiny_model("llama", **SHAPE)
    law: dict[Prefix, float] = {(): 1.0}
    frontier: list[Prefix] = [()]
    for _ in range(COUNT):
        with torch.no_grad():
            logits = model(torch.tensor([[START, *prefix] for prefix in frontier])).logits[:, -1:, :VOCABULARY]
        params = SamplingTensors.empty(len(frontier), "cpu")
        params = replace(
            params,
            temperature=params.temperature + temperature,
            top_k=params.top_k + PARAMS.top_k,
            filtered=True,
            random=True,
        )
        probs = filter_logits(logits, params).double().softmax(-1).squeeze(1).tolist()
        grown = {(*f, t): law[f] * p for f, row in zip(frontier, probs, strict=True) for t, p in enumerate(row) if p}
        law |= grown
        frontier = list(grown)
    return law


def p_value(samples: Iterable[tuple[Prefix, Prefix]], law: dict[Prefix, float]) -> tuple[float, int]:
    """Pearson's test of continuations given prefixes: p-value and degrees of freedom.

    A prefix's continuations are one multinomial; cells expected fewer than five times are pooled.
    """
    seen: dict[tuple[Prefix, int], Counter[Prefix]] = defaultdict(Counter)
    for prefix, after in samples:
        seen[prefix, len(after)][after] += 1
    statistic, freedom = 0.0, 0
    for (prefix, length), counts in seen.items():
        total = sum(counts.values())
        end = len(prefix) + length
        chances = {
            key[len(prefix) :]: p / law[prefix]
            for key, p in law.items()
            if key[: len(prefix)] == prefix and len(key) == end
        }
        assert counts.keys() <= chances.keys(), "a token of probability 0"
        pooled = [0.0, 0.0]
        cells = []
        for after, chance in chances.items():
            if chance * total >= 5:
                cells.append((counts[after], chance * total))
            else:
                pooled = [pooled[0] + counts[after], pooled[1] + chance * total]
        cells += [tuple(pooled)] if pooled[1] >= 1 else []
        statistic += sum((found - expected) ** 2 / expected for found, expected in cells)
        freedom += max(0, len(cells) - 1)
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return (float(torch.special.gammaincc(half[0], half[1])) if freedom else 1.0), freedom


def splits(histories: list[History]) -> dict[str, list[tuple[Prefix, Prefix]]]:
    """Pairs (tokens before, tokens after) by what happened in between."""
    found: dict[str, list[tuple[Prefix, Prefix]]] = defaultdict(list)
    for history in histories:
        tokens = history.tokens
        found["all"].append(((), tokens))
        before, rounds = 0, history.rounds
        for number, one in enumerate(rounds):
            # The law of the tokens from here on, given those so far, and how this round's tree was got.
            if number and number < 3:
                found[f"from round {number} on, tree {one.source}"].append((tokens[:before], tokens[before:]))
            before += len(one.tokens)
            if number and number < 3 and before < len(tokens):
                key = f"after {one.accepted} accepted in round {number}, tree {one.source}"
                found[key].append((tokens[:before], tokens[before:]))
    return found


def check(histories: list[History], law: dict[Prefix, float], smallest: int) -> dict[str, float]:
    results = {}
    for name, pairs in splits(histories).items():
        if len(pairs) >= smallest:
            results[name], _ = p_value(pairs, law)
    return results


def sources(histories: list[History]) -> Counter[Source]:
    return Counter(one.source for history in histories for one in history.rounds)


@pytest.mark.parametrize("case", CASES)
def test_joint_law(case: str, pair: tuple[Path, Path]) -> None:
    histories = sampled(pair, SAMPLES, **CASES[case])
    results = check(histories, target_law(), 60)
    assert {"all", "from round 1 on, tree hit", "from round 1 on, tree jit"} <= results.keys()
    assert {depth for depth in range(3) if any(f"after {depth} acc" in name for name in results)} >= {0, 1}
    assert min(results.values()) > P_VALUE, results


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fallback", ["jit", "none"])
def test_joint_law_of_many(case: str, fallback: str, pair: tuple[Path, Path]) -> None:
    histories = sampled(pair, 40_000, seed=10**6, fallback=fallback, **CASES[case])
    results = check(histories, target_law(), 200)
    assert min(results.values()) > P_VALUE, results


def careless_bonus(rules: Any) -> tuple[str, Any]:
    """The bonus token drawn from the target's law after a rejection too."""
    verify = rules.verify_rejection

    def careless(target_probs: torch.Tensor, *rest: Any) -> Any:
        law = verify(target_probs, *rest)
        return law._replace(probs=target_probs[torch.arange(len(law.node)), law.node])

    return "verify_rejection", careless


def another_story(rules: Any) -> tuple[str, Any]:
    """One row is drawn from; another one is sent."""
    stacked = rules.stacked

    def lying(steps: list[Any]) -> Any:
        honest = stacked(steps)
        return type(honest)(honest.tokens, honest.probs.sqrt())

    return "stacked", lying


@pytest.mark.parametrize("mistake", [careless_bonus, another_story], ids=lambda m: m.__name__)
def test_mistakes_show(
    mistake: Callable[[Any], tuple[str, Any]], pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail: as many samples of a pipeline with one mistake."""
    name, wrong = mistake(rules)
    for module in (rules, draft_module):
        if name in vars(module):
            monkeypatch.setattr(module, name, wrong)
    results = check(sampled(pair, SAMPLES, **CASES["rejection"]), target_law(), 60)
    assert min(results.values()) < P_VALUE / 100, results


def test_another_temperature_shows(pair: tuple[Path, Path]) -> None:
    histories = sampled(pair, SAMPLES, **CASES["rejection"])
    assert check(histories, target_law(PARAMS.temperature * 1.2), 60)["all"] < P_VALUE
