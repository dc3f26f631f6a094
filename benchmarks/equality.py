"""Equality at scale: plain decoding, ``sd`` and ``ssd`` give the same tokens in many configurations.

    python benchmarks/equality.py tiny --jobs 2 --out FILE.jsonl  1,000 prompts, tiny models of 9 architectures
    python benchmarks/equality.py embedded --out FILE.jsonl       208 prompts in fp32, the same number in bf16

Outputs have 256 tokens. Every case is an engine with its own architecture, dtype, lookahead, siblings, forecast,
fallback and batch size. Its requests use temperatures 0, 0.7, 1 and 1.5, filters and penalties, and start while others
run. A finished case is a line of FILE; a run that was stopped continues after the last line. FILE with the suffix .json
holds the results of all cases and the versions. A table is printed at the end. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from ssd import LLM, SamplingParams
from ssd.bench.exactness.certify import Certificate, Trial, certify
from ssd.bench.measure.compare import versions
from ssd.config.load import load_config, resolve_model_path
from ssd.pipeline.runtime.launch import InprocPipeline, LocalPipeline
from ssd.testing.models.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

VOCABULARY, LONGEST_PROMPT = 128, 40
TEMPERATURES = (0.0, 0.7, 1.0, 1.5)
EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"top_p": 0.9},
    {"top_k": 12},
    {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
)
"""Filters and penalties of the requests. Their number has no common divisor with that of the temperatures."""
LOOKAHEADS, SIBLINGS, BUDGETS = (3, 1, 5, 2, 8, 4, 6), (0, 1, 2), (8, 3, 12, 24)
SHAPES, DTYPES = ("confidence", "uniform", "geometric"), ("float32", "bfloat16")
FALLBACKS = ("jit", "none", "ngram", "auto")
TINY_BATCHES = (8, 3, 6, 1, 8, 4, 2, 7, 5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    name: str
    config: dict[str, Any]
    prompts: int
    compiled: bool = False
    """Whether workers are processes with compiled models; otherwise they are threads with eager models."""


def tiny_cases(folder: Path, total: int, cases: int) -> Iterator[Case]:
    """Yields cases over all architectures; prompts are divided among them by batch size."""
    batches = [TINY_BATCHES[(index + index // 9) % len(TINY_BATCHES)] for index in range(cases)]
    squares = list(itertools.accumulate(batch * batch for batch in batches))
    shares, given = [square / squares[-1] for square in squares], 0
    for index, batch in enumerate(batches):
        # By its square: the time of 256 rounds hardly depends on the size of the batch.
        count = round(total * shares[index]) - given
        given += count
        architecture, dtype = ARCHITECTURES[index % len(ARCHITECTURES)], DTYPES[index % 2]
        models = {
            role: {"model": str(folder / f"{architecture}-{role}"), "dtype": dtype, "compile": False}
            for role in ("target", "draft")
        }
        lookahead, siblings = LOOKAHEADS[index % len(LOOKAHEADS)], SIBLINGS[(index + index // 9) % len(SIBLINGS)]
        shape, fallback = SHAPES[(index // 2) % len(SHAPES)], FALLBACKS[(index // 3) % len(FALLBACKS)]
        budget = BUDGETS[index % len(BUDGETS)]
        name = f"{architecture} {dtype} K={lookahead} siblings={siblings} N={budget} {shape} {fallback} B={batch}"
        speculation = {
            "lookahead": lookahead,
            "siblings": siblings,
            "fallback": fallback,
            "governor": False,
            "forecast": {"budget": budget, "shape": shape},
        }
        engine = {"max_batch": batch, "max_model_len": 320, "prefill_chunk": 16}
        yield Case(name=name, config={**models, "speculation": speculation, "engine": engine}, prompts=count)


def save_tiny_pair(folder: Path, architecture: str) -> None:
    """Saves a target, and a draft that is sometimes right: the target with noise on its weights."""
    logging.disable_progress_bar()
    model = tiny_model(architecture, vocab_size=VOCABULARY)
    for role in ("target", "draft"):
        if role == "draft":
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for weight in model.parameters():
                    noise = torch.randn(weight.shape, generator=generator)
                    weight.add_(noise * weight.std(correction=0), alpha=0.04)
        model.save_pretrained(folder / f"{architecture}-{role}")
        tiny_tokenizer(VOCABULARY).save_pretrained(folder / f"{architecture}-{role}")


def embedded_cases(total: int) -> Iterator[Case]:
    """Yields cases of the shipped pair: single sequences, and batches with a comb, a short and a long chain.

    Float32 cases have no copy bias, bfloat16 cases the shipped one.
    """
    settings = (
        (1, 3, 0, 8, "auto"),
        (4, 4, 1, 12, "jit"),
        (8, 2, 0, 6, "ngram"),
        (2, 6, 0, 16, "none"),
    )
    for dtype, (batch, lookahead, siblings, budget, fallback) in itertools.product(DTYPES, settings):
        models = {
            role: {"model": f"embedded/{role}", "dtype": dtype, "cores": [core]}
            for core, role in enumerate(("target", "draft"))
        }
        speculation = {
            "lookahead": lookahead,
            "siblings": siblings,
            "fallback": fallback,
            "governor": False,
            "forecast": {"budget": budget},
            "copy_bias": load_config("embedded").speculation.copy_bias if dtype == "bfloat16" else [],
        }
        engine = {"max_batch": batch, "max_model_len": 512}
        name = f"embedded {dtype} K={lookahead} siblings={siblings} N={budget} confidence {fallback} B={batch}"
        name += " copying" * bool(speculation["copy_bias"])
        config = {**models, "speculation": speculation, "engine": engine}
        yield Case(name=name, config=config, prompts=total // len(settings), compiled=True)


def random_prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LONGEST_PROMPT + 1, (count,), generator=generator).tolist()
    return [tuple(torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()) for length in lengths]


def source_prompts(count: int, seed: int) -> list[str]:
    """Returns beginnings of different functions of the standard library, for the pair to continue."""
    texts: list[str] = []
    for path in sorted(Path(json.__file__).parents[1].glob("*.py")):
        lines = path.read_text(encoding="utf-8", errors="ignore").splitlines(keepends=True)
        texts += ["".join(lines[at : at + 6]) for at, line in enumerate(lines) if line.lstrip().startswith("def ")]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [texts[at] for at in order if len(texts[at]) < 400][:count]


def asked(prompts: list[Any], max_tokens: int, seed: int) -> list[Trial]:
    """Returns the prompts as requests that cycle through temperatures and extras."""
    trials = []
    for index, prompt in enumerate(prompts):
        # 4 temperatures and 7 extras have no common divisor, so every combination occurs.
        params = SamplingParams(
            temperature=TEMPERATURES[index % len(TEMPERATURES)],
            seed=seed + index,
            max_tokens=max_tokens,
            ignore_eos=True,
            **EXTRAS[index % len(EXTRAS)],
        )
        trials.append(Trial(name=str(index), prompt=prompt, params=params))
    return trials


def run_case(case: Case, trials: list[Trial]) -> dict[str, Any]:
    began = time.perf_counter()
    torch.set_num_threads(1)
    with LLM(case.config, launch=LocalPipeline if case.compiled else InprocPipeline) as llm:
        weights = {role: weights_hash(case.config[role]["model"]) for role in ("target", "draft")}
        found = certify(llm, trials, ("sd", "ssd"))
    seconds = round(time.perf_counter() - began)
    return {**summary(found), "case": case.name, "prompts": case.prompts, "weights": weights, "seconds": seconds}


def weights_hash(model: str) -> str:
    """Returns the SHA-256 of a model's weights."""
    return hashlib.sha256((resolve_model_path(model) / "model.safetensors").read_bytes()).hexdigest()


def summary(found: Certificate) -> dict[str, Any]:
    data = found.to_json()
    for group in data["groups"]:
        group["record"] = {key: group["record"][key] for key in ("rounds", "drafted", "accepted", "lookups", "hits")}
    return {key: data[key] for key in ("passed", "faults", "groups", "divergences", "noise")}


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table(title="outputs equal to plain decoding's", title_justify="left")
    for column in ("case", "prompts", "outputs", "equal", "tokens", "accepted/drafted", "hits", "log-prob. diff."):
        out.add_column(column, justify="left" if column == "case" else "right")
    for row in [*rows, merged(rows)]:
        out.add_row(*cells(row))
    return out


def cells(row: dict[str, Any]) -> list[str]:
    def total(name: str) -> int:
        return sum(group[name] for group in row["groups"])

    def counted(name: str) -> int:
        return sum(group["record"][name] for group in row["groups"])

    return [
        row["case"],
        str(row["prompts"]),
        str(total("outputs")),
        str(total("equal")),
        f"{total('tokens'):,}",
        f"{counted('accepted') / max(1, counted('drafted')):.2f}",
        f"{counted('hits') / max(1, counted('lookups')):.2f}",
        f"{max(group['largest_difference'] for group in row['groups']):.1e}",
    ]


def merged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    groups = [group for row in rows for group in row["groups"]]
    return {"case": "all", "prompts": sum(row["prompts"] for row in rows), "groups": groups}


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns sums by method and temperature."""
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for group in merged(rows)["groups"]:
        key = group["method"], group["temperature"]
        names = ("outputs", "equal", "near_ties", "structural", "tokens")
        into = found.setdefault(key, {"method": key[0], "temperature": key[1], **dict.fromkeys(names, 0)})
        for name in names:
            into[name] += group[name]
    return {"groups": [found[key] for key in sorted(found)], "prompts": merged(rows)["prompts"]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", choices=("tiny", "embedded"))
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--prompts", type=int, help="by default 1000 for tiny; 208 for embedded, in each dtype")
    parser.add_argument("--cases", type=int, default=27, help="tiny only: number of configurations")
    parser.add_argument("--jobs", type=int, default=1, help="tiny only: cases at a time, one core each")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=20261122)
    given = parser.parse_args(arguments)
    tiny = given.models == "tiny"
    total = given.prompts or (1000 if tiny else 208)
    console = Console(width=150)
    done = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    names = {row["case"] for row in done}
    with tempfile.TemporaryDirectory(prefix="ssd-equality-") as folder:
        cases = list(tiny_cases(Path(folder), total, given.cases) if tiny else embedded_cases(total))
        work = []
        for number, case in enumerate(cases):
            if case.name in names:
                continue
            seed = given.seed + 1000 * number
            if tiny:
                save_tiny_pair(Path(folder), ARCHITECTURES[number % len(ARCHITECTURES)])
            prompts = (random_prompts if tiny else source_prompts)(case.prompts, seed)
            work.append((case, asked(prompts, given.max_tokens, seed)))
        for row in rows_of(work, given.jobs if tiny else 1):
            done.append(row)
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            write_report(given.out, done, len(cases))
            verdict = "equal" if row["passed"] else "; ".join(row["faults"])
            console.print(f"{len(done)}/{len(cases)} {row['case']}: {verdict}, {row['seconds']} s", highlight=False)
    console.print(table(done))
    write_report(given.out, done, len(cases))
    return 0 if all(row["passed"] for row in done) else 1


def write_report(out: Path, done: list[dict[str, Any]], cases: int) -> None:
    """Writes FILE with the suffix .json: all results so far, and the number of cases."""
    report = {"command": " ".join(sys.argv), **totals(done), "of": cases, "versions": versions(), "cases": done}
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def rows_of(work: list[tuple[Case, list[Trial]]], jobs: int) -> Iterator[dict[str, Any]]:
    """Yields the results as cases finish."""
    if jobs == 1:
        yield from map(_run, work)
        return
    with get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(_run, work)


def _run(work: tuple[Case, list[Trial]]) -> dict[str, Any]:
    return run_case(*work)


if __name__ == "__main__":
    sys.exit(main())
