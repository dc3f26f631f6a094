"""Compares the verification rules: ``coupled``, ``rejection`` with a sweep of Saguaro's C, ``block``.

    python benchmarks/rules.py --out FILE.json [--prompts FILE.jsonl] [--repeat 3]

There is one engine for each rule. ``ssd.bench.measure.compare`` runs ``none_fast``, ``none`` and ``ssd`` on it at every
temperature, in turns, so a speedup is measured within one engine's run. ``benchmarks/tables.py`` writes the table of
benchmarks/results/rules.json into docs/exactness.md.

The fallback is ``jit``, whatever the configuration says: with n-grams a missed row would not use the rule's draft.
Bytes per round come from the sizes of the frames on the link: an outcome frame and a speculation frame in every
round, and a tree frame after a miss.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ssd import LLM
from ssd.bench.measure.compare import Comparison, compare, versions
from ssd.bench.measure.interleave import Runs
from ssd.bench.measure.prompts import load_prompts
from ssd.config.load import load_config
from ssd.config.sections import Config
from ssd.engine.front import make_plan

PROMPTS = Path(__file__).parent / "prompts" / "heldout-code.jsonl"
BASE = ("speculation.governor=false", "speculation.fallback=jit")
RULES: dict[str, tuple[str, ...]] = {
    "coupled": (),
    "rejection": ("speculation.verify=rejection",),
    "rejection, C = 0.75": ("speculation.verify=rejection", "speculation.saguaro_c=0.75"),
    "rejection, C = 0.5": ("speculation.verify=rejection", "speculation.saguaro_c=0.5"),
    "rejection, C = 0.25": ("speculation.verify=rejection", "speculation.saguaro_c=0.25"),
    "block": ("speculation.verify=block",),
    "block, C = 0.5": ("speculation.verify=block", "speculation.saguaro_c=0.5"),
}


def bytes_per_round(config: Config, found: Comparison) -> float:
    """Returns the mean bytes of a round in both directions; frames are int32."""
    _, plan = make_plan(config)
    frames = plan.frames()
    rounds = misses = 0
    for tally in found.repeats("ssd"):
        rounds += tally.speculation.rounds
        misses += tally.speculation.lookups - tally.speculation.hits
    waited = misses / rounds if plan.jit and rounds else 0.0
    return 4 * (frames.outcome_size + frames.speculation_size + waited * frames.tree_size)


def measure(config: Config, given: argparse.Namespace, report: Any) -> list[dict[str, Any]]:
    rows = []
    with LLM(config) as llm:
        for temperature in given.temperature:
            found = compare(
                llm,
                load_prompts(given.prompts),
                Runs(temperature=temperature, max_tokens=given.max_tokens, repeat=given.repeat),
                methods=("ssd",),
                progress=lambda done, total, label, at=temperature: report(f"T = {at:g}: {done}/{total}"),
            )
            data = found.to_json()["methods"]
            rows.append(
                {
                    "temperature": temperature,
                    **{key: data["ssd"][key] for key in ("acceptance_rate", "hit_rate", "acceptance_length")},
                    "bytes_per_round": bytes_per_round(config, found),
                    **{key: data["ssd"][key] for key in ("tokens_per_second", "speedup", "round_ms", "draft_ms")},
                    "none_fast_tokens_per_second": data["none_fast"]["tokens_per_second"],
                    "tokens": found.to_json()["tokens"],
                }
            )
        if llm.degraded:
            raise SystemExit(f"the draft was lost: {llm.degraded}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--config", default="embedded")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES), metavar="RULE")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with Console(stderr=True).status("starting") as status:
        for rule in given.rules:
            config = load_config(given.config, [*BASE, *given.overrides, *RULES[rule]])
            found = measure(config, given, lambda text, rule=rule: status.update(f"{rule}, {text}"))
            rows += [{"rule": rule, **row} for row in found]
            result = {"rows": rows, "overrides": given.overrides, "prompts": str(given.prompts), "versions": versions()}
            given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
