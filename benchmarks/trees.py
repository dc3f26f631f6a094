"""Tokens per round by candidate tree and verified rows, from replays on the embedded pair. Prints a Markdown table.

python benchmarks/trees.py --json benchmarks/results/trees.json

The figures are counts, so they are the same on any machine. Static trees are chosen on one half of the texts and
evaluated on the other, both ways.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ssd import LLM, SamplingParams
from ssd.bench.drafts.trees import (
    DraftAlong,
    RankTree,
    allotted_combs,
    chains,
    even_combs,
    rank_curve,
    static_accepted,
    static_tree,
    tokens_per_round,
)
from ssd.bench.measure.prompts import load_prompts
from ssd.config.load import load_config, resolve_model_path
from ssd.engine.front import make_plan
from ssd.models.checkpoints.loading import load_model
from ssd.pipeline.runtime.launch import InprocPipeline

KINDS = ("chain", "even comb", "comb", "static tree", "dynamic tree")
Texts = list[list[int]]


def main(
    prompts: Path = Path("benchmarks/prompts/heldout-code.jsonl"),
    config: str = "embedded",
    rows: str = "4,6,8,10,12,16",
    deepest: Annotated[int, typer.Option(help="Largest depth of a tree; each depth is a step of the draft.")] = 5,
    max_tokens: int = 160,
    temperatures: str = "0,1",
    sharpness: Annotated[float, typer.Option(help="β of the dynamic tree's confidence.")] = 1.0,
    out: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
) -> None:
    """Decode with the target, rank its tokens by the draft, and count accepted tokens."""
    asked, sizes = load_prompts(prompts), [int(size) for size in rows.split(",")]
    settings = load_config(config, [f"engine.max_batch={len(asked)}", "target.compile=false"])
    model, plan = settings.draft, make_plan(settings)[1]
    if model is None:
        raise typer.BadParameter("a pairing with a draft is needed", param_hint="--config")
    longest = settings.engine.max_model_len
    draft = load_model(resolve_model_path(model.model), dtype=model.dtype, device="cpu", max_positions=longest)
    alone = load_config(settings, ["draft=null", "speculation.method=none"])
    found, lines = [], []
    with Console(stderr=True).status("the target answers") as status, LLM(alone, launch=InprocPipeline) as llm:
        for heat in map(float, temperatures.split(",")):
            params = [
                SamplingParams(temperature=heat, max_tokens=max_tokens, ignore_eos=True, method="none_fast", seed=seed)
                for seed in range(len(asked))
            ]
            texts: Texts = []
            dynamic: dict[int, Texts] = {size: [] for size in sizes}
            for answer, wanted in zip(llm.generate([p.text for p in asked], params), params, strict=True):
                status.update(f"temperature {heat:g}: the draft along text {len(texts) + 1}/{len(asked)}")
                prompt = answer.prompt_token_ids
                along = DraftAlong(draft, [*prompt, *answer.token_ids], len(prompt) - 1, wanted, plan.vocabulary)
                texts.append(along.ranks())
                depths = along.dynamic_depths(max(sizes), deepest, deepest, sharpness)
                for size in sizes:
                    dynamic[size].append(depths[size - 2])
            for size in sizes:
                judged = {kind: crosswise(texts, choosers(size, deepest)[kind], deepest) for kind in KINDS[:-1]}
                figures = {kind: mean for kind, (mean, _) in judged.items()}
                figures["dynamic tree"] = tokens_per_round(dynamic[size])
                widths = {kind: shapes for kind, (_, shapes) in judged.items()}
                found.append({"temperature": heat, "rows": size, "tokens per round": figures, "widths": widths})
                lines.append(f"| {heat:g} | {size} | " + " | ".join(f"{figures[kind]:.2f}" for kind in KINDS) + " |")
            found.append({"temperature": heat, "rank curve": rank_curve(texts)})
    if out is not None:
        out.write_text(json.dumps(found, indent=1))
    typer.echo(f"| temperature | rows | {' | '.join(KINDS)} |\n|{'---|' * (2 + len(KINDS))}")
    typer.echo("\n".join(lines))


def choosers(rows: int, deepest: int) -> dict[str, Callable[[Texts], RankTree]]:
    """Returns, by kind of tree, a function from texts to the best tree of that kind."""

    def best(trees: Sequence[RankTree], texts: Texts) -> RankTree:
        return max(trees, key=lambda tree: tokens_per_round(static_accepted(tree, texts, deepest)))

    return {
        "chain": lambda texts: best(chains(rows, deepest), texts),
        "even comb": lambda texts: best(even_combs(rows, deepest), texts),
        "comb": lambda texts: best(allotted_combs(rank_curve(texts), rows, deepest), texts),
        "static tree": lambda texts: static_tree(rank_curve(texts), rows, deepest),
    }


def crosswise(texts: Texts, choose: Callable[[Texts], RankTree], horizon: int) -> tuple[float, list[tuple[int, ...]]]:
    """Returns tokens per round of trees chosen on the other half of the texts, and the trees' nodes at each depth."""
    halves = texts[0::2], texts[1::2]
    trees = [choose(halves[1]), choose(halves[0])]
    accepted = [static_accepted(tree, half, horizon) for tree, half in zip(trees, halves, strict=True)]
    return tokens_per_round([*accepted[0], *accepted[1]]), [tree.widths for tree in trees]


if __name__ == "__main__":
    typer.run(main)
