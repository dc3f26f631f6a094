"""Hit rates of the forecasts, from replays on the embedded pair. Prints a Markdown table.

python benchmarks/forecasts.py --json benchmarks/results/forecasts.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ssd import LLM, SamplingParams
from ssd.bench.drafts.forecasts import hit_rates
from ssd.bench.measure.prompts import load_prompts
from ssd.config.load import load_config
from ssd.engine.front import make_plan
from ssd.pipeline.runtime.launch import InprocPipeline

SHAPES = ("uniform", "geometric", "measured", "confidence")
BUDGETS = (8, 16, 24)


def main(
    prompts: Path = Path("benchmarks/prompts/heldout-code.jsonl"),
    config: str = "embedded",
    lookahead: int = 3,
    max_tokens: int = 128,
    temperatures: str = "0,1",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Decode with the target, replay the draft along the answers, and count hits."""
    settings = load_config(
        config, [f"speculation.lookahead={lookahead}", "target.compile=false", "draft.compile=false"]
    )
    asked, plan = load_prompts(prompts), make_plan(settings)[1]
    heats = [float(heat) for heat in temperatures.split(",")]
    with Console(stderr=True).status("the target answers") as status, LLM(settings, launch=InprocPipeline) as llm:
        rows, figures = [], []
        for heat in heats:
            params = SamplingParams(temperature=heat, max_tokens=max_tokens + lookahead + 1, ignore_eos=True)
            plain = SamplingParams(temperature=heat, max_tokens=params.max_tokens, ignore_eos=True, method="none_fast")
            outputs = [llm.generate([prompt.text], plain)[0] for prompt in asked]
            texts = [(output.prompt_token_ids, output.token_ids) for output in outputs]
            found = hit_rates(
                plan,
                texts,
                params,
                shapes=SHAPES,
                budgets=BUDGETS,
                progress=lambda done, total: status.update(f"the draft along text {done}/{total}"),
            )
            figures += [
                {"temperature": heat, "budget": n, "hit_rate": {shape: round(found[shape][n], 3) for shape in SHAPES}}
                for n in BUDGETS
            ]
            rows += [
                f"| {heat:g} | {n} | " + " | ".join(f"{found[shape][n]:.3f}" for shape in SHAPES) + " |"
                for n in BUDGETS
            ]
    typer.echo(f"| temperature | budget | {' | '.join(SHAPES)} |\n|{'---|' * (2 + len(SHAPES))}")
    typer.echo("\n".join(rows))
    if json_file is not None:
        asked_for = {"prompts": str(prompts), "lookahead": lookahead, "max_tokens": max_tokens}
        json_file.write_text(json.dumps({**asked_for, "rows": figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
