"""Chi-square tests of sampled sequences: real workers on tiny models against the target's own law.

Short requests from one prompt, batched. The law of every sequence is computed from the target
alone; the tokens after a round are compared with it given the tokens before, split by where the
round's tree came from (hit, drafted after a miss, none) and by how much of it was accepted. The
emitted tokens of a round include its bonus token, so its position is in every test. Not for ``coupled``: there
the forecast knows the noise of later tokens, so given a hit those need not have the target's law.

``benchmarks/chi_square.py`` prints the p-values as a table.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...config.load import load_config
from ...pipeline.runtime.build_draft import build_draft
from ...pipeline.runtime.build_verifier import build_verifier
from ...pipeline.runtime.plan import Plan
from ...request.sampling_params import SamplingParams
from ..models.tiny import save_tiny, tiny_model
from ..twins.rounds import History, play

VOCABULARY, COUNT = 24, 5
PROMPT, REPEATING = (7,), (7, 9, 9, 5, 18, 13, 7, 21, 2, 5, 14, 0, 9, 21, 0, 7, 9)
PARAMS = SamplingParams(temperature=2.5, top_k=3, max_tokens=COUNT, ignore_eos=True)
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
}
Prefix = tuple[int, ...]
Pair = tuple[Path, Path]
PENALIZED = replace(
    PARAMS, top_p=0.95, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4, logit_bias={3: 1.5, 11: 1}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A rule with what it is asked for; ``speculation``: the section's settings."""

    speculation: dict[str, Any]
    params: SamplingParams = PARAMS


CASES = {
    "rejection": Case(speculation={"verify": "rejection", "support": 99}),
    "rejection, tree, scaled, m=2, penalties": Case(
        speculation={"verify": "rejection", "siblings": 1, "support": 2, "saguaro_c": 0.4}, params=PENALIZED
    ),
    "block": Case(speculation={"verify": "block", "support": 2}),
    "block, scaled": Case(speculation={"verify": "block", "support": 99, "saguaro_c": 0.4}),
}
FALLBACKS = ("jit", "none", "ngram")


def save_pair(folder: Path) -> Pair:
    """Folders of a target and of a draft that is right now and then."""
    target = save_tiny(folder / "target", "llama", **SHAPE)
    model = tiny_model("llama", **SHAPE)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std(correction=0), alpha=0.3)
    model.save_pretrained(folder / "draft")
    return target, folder / "draft"


def sampled(pair: Pair, count: int, case: str, fallback: str = "jit", seed: int = 0) -> list[History]:
    """``count`` requests that differ in their seed only, from ``seed`` on."""
    asked = CASES[case]
    target, draft = ({"model": str(folder), "compile": False} for folder in pair)
    config = load_config(
        {
            "target": target,
            "draft": draft,
            "speculation": {"lookahead": 2, "forecast": {"budget": 4}, "fallback": fallback, **asked.speculation},
            "engine": {"max_batch": min(256, count), "max_model_len": 32, "prefill_chunk": 8},
        }
    )
    plan = Plan(config=config, vocabulary=VOCABULARY, ends=())
    verifier, worker = build_verifier(plan)[0], build_draft(plan)[0]
    prompt, seeds = list(prompt_for(fallback)), [replace(asked.params, seed=seed + number) for number in range(count)]
    play(verifier, worker, plan, [prompt], seeds[:1])  # the others find its keys: none of them waits for the draft
    return play(verifier, worker, plan, [prompt] * count, seeds)


def prompt_for(fallback: str) -> Prefix:
    """One in which n-grams are found, where they are the fallback."""
    return REPEATING if fallback == "ngram" else PROMPT


def law_of(case: str, fallback: str = "jit") -> dict[Prefix, float]:
    """``target_law`` of the case's requests."""
    return target_law(CASES[case].params, prompt_for(fallback))


def target_law(params: SamplingParams = PARAMS, prompt: Prefix = PROMPT) -> dict[Prefix, float]:
    """Of every sequence of up to ``COUNT`` tokens: its probability, from the target's own forward."""
    model = tiny_model("llama", **SHAPE)
    law: dict[Prefix, float] = {(): 1.0}
    frontier: list[Prefix] = [()]
    for _ in range(COUNT):
        ids = torch.tensor([[*prompt, *prefix] for prefix in frontier])
        with torch.no_grad():
            logits = model(ids).logits[:, -1, :VOCABULARY]
        probs = _as_transformers(ids, len(prompt), logits, params).double().softmax(-1).tolist()
        grown = {(*f, t): law[f] * p for f, row in zip(frontier, probs, strict=True) for t, p in enumerate(row) if p}
        law |= grown
        frontier = list(grown)
    return law


def _as_transformers(ids: Tensor, start: int, logits: Tensor, params: SamplingParams) -> Tensor:
    """``[R, V]`` after bias, penalties and filters: transformers' own, and vLLM's formulas for the two it lacks.
    ``ids`` ``[R, L]``, the output from ``start`` on."""
    if params.logit_bias:
        biases = [[[token], value] for token, value in dict(params.logit_bias).items()]
        logits = SequenceBiasLogitsProcessor(biases)(ids, logits)  # type: ignore[arg-type]
    logits = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, logits)  # type: ignore[arg-type]
    output = ids[:, start:]
    counts = torch.zeros_like(logits).scatter_add_(1, output, torch.ones(output.shape))
    logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    filters = TopKLogitsWarper(params.top_k), TopPLogitsWarper(params.top_p)
    for warper in (TemperatureLogitsWarper(params.temperature), *filters):
        logits = warper(ids, logits)  # type: ignore[arg-type]
    return logits


def p_value(samples: Iterable[tuple[Prefix, Prefix]], law: dict[Prefix, float]) -> tuple[float, int]:
    """Pearson's test of continuations given prefixes: p-value and degrees of freedom.

    A prefix's continuations are one multinomial; cells expected fewer than five times are pooled.
    A continuation of probability 0 gives p = 0.
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
        if not counts.keys() <= chances.keys():
            return 0.0, 0
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
    """p-values by split, of those with at least ``smallest`` samples."""
    return {name: p_value(pairs, law)[0] for name, pairs in splits(histories).items() if len(pairs) >= smallest}


def measure(pair: Pair, case: str, fallback: str, samples: int, seed: int) -> dict[str, Any]:
    """One case: every split's samples, degrees of freedom and p-value."""
    began = time.perf_counter()
    histories, law = sampled(pair, samples, case, fallback, seed), law_of(case, fallback)
    tests = []
    for name, pairs in sorted(splits(histories).items()):
        p, freedom = p_value(pairs, law)
        if len(pairs) >= 200 and (freedom or not p):
            tests.append({"split": name, "samples": len(pairs), "freedom": freedom, "p": p})
    seconds = time.perf_counter() - began
    return {"case": case, "fallback": fallback, "samples": samples, "seconds": round(seconds), "tests": tests}


def table(results: list[dict[str, Any]]) -> str:
    """A line per case: the p-values asked for most, and the smallest of all times their number."""
    names = ["all", "from round 1 on, tree hit", "", "from round 2 on, tree hit"]
    heads = "rule, fallback, joint, after hit, after miss, round 2 after hit, after 0 accepted, 1, 2, tests, smallest p"
    lines = [f"| {heads.replace(', ', ' | ')} |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for result in results:
        p = {test["split"]: test["p"] for test in result["tests"]}
        # After k accepted candidates of a tree that hit.
        names_here = [*names, *(f"after {k} accepted in round 1, tree hit" for k in range(3))]
        names_here[2] = {"none": "from round 2 on, tree none"}.get(
            result["fallback"], f"from round 1 on, tree {result['fallback']}"
        )
        cells = [f"{p[name]:.3f}" if name in p else "" for name in names_here]
        cells += [str(len(p)), f"{min(p.values()):.4f}"]
        lines.append(f"| {result['case']} | {result['fallback']} | " + " | ".join(cells) + " |")
    every = sorted(test["p"] for result in results for test in result["tests"])
    distance = max(max((i + 1) / len(every) - p, p - i / len(every)) for i, p in enumerate(every))
    lines += ["", f"{len(every)} tests, smallest p {every[0]:.5f}, times their number {every[0] * len(every):.2f}; "]
    lines[-1] += f"largest distance of their distribution from uniform {distance:.3f}."
    return "\n".join(lines)
