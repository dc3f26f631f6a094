"""Runs all benchmarks of speed, stage by stage. Use a quiet machine.

    python benchmarks/run_all.py --vllm-python /tmp/vllm-venv/bin/python --wide wide

The stage NAME writes benchmarks/results/NAME.json, which holds its newest run. A stage whose file exists is skipped,
so the same command continues a run that was stopped; remove the file, or name the stage with --only and --again, to
measure it again. A stage that takes more than --limit seconds is ended. Pages, pictures, traces and prompt excerpts
go to --work. At the end benchmarks/tables.py writes the tables into benchmarks/results/README.md.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
RESULTS, WORK = HERE / "results", HERE.parent / "build" / "benchmarks"
CODE, MIXED = HERE / "prompts" / "heldout-code.jsonl", HERE / "prompts" / "heldout.jsonl"
PEERS = "transformers,transformers-assisted,vllm,vllm-draft"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One command of ``ssd``.

    In the command, ``{json}`` is the file of results, ``{work}`` a path for other files, without suffix, and
    ``{results}`` the folder of results.
    """

    name: str
    command: str
    minutes: float
    """Approximate time on two quiet cores."""
    wide: bool = False
    """Whether it needs the widened pair."""


def bench(name: str, options: str, minutes: float, *, pictures: bool = True, wide: bool = False) -> Stage:
    drawn = " --html {work}.html --pictures {work}" if pictures else ""
    return Stage(name=name, command=f"bench --json {{json}}{drawn} {options}", minutes=minutes, wide=wide)


EMBEDDED = f"--prompts {CODE} --max-tokens 128 --repeat 2 --peers {PEERS} {{vllm}}"
WIDE = (
    "--prompts {three} --max-tokens 48 --repeat 1 "
    "--set target.model={wide}/target --set draft.model={wide}/draft "
    "--peers vllm-draft {vllm} {wide_options}"  # more peers do not fit into 24 GiB
)
SHORT = f"--prompts {CODE} --max-tokens 96 --repeat 1"
LONG = f"--prompts {CODE} --max-tokens 192 --repeat 1"  # long enough for the governor to settle
SIMULATED = "--set speculation.fallback=jit"  # the simulator has the fallbacks jit and none
GOVERNED = "--beside speculation.governor=true"
SELF = "--methods none,self --set draft=null --set speculation.method=self"
STAGES = (
    bench("embedded-t0", f"{EMBEDDED} --trace {{work}}.trace", 4),
    bench("embedded-t1", f"{EMBEDDED} --temperature 1", 3),
    bench("wide-t0", f"{WIDE} --trace {{work}}.trace", 7, wide=True),
    bench("wide-t1", f"{WIDE} --temperature 1", 7, wide=True),
    bench("mixed-t0", f"--prompts {MIXED} --max-tokens 64 --repeat 1", 1.5),
    bench("lookahead-t0", f"{SHORT} --sweep speculation.lookahead=auto,2,3,4,5", 5),
    bench("lookahead-t1", f"{SHORT} --temperature 1 --sweep speculation.lookahead=auto,2,3,4", 4),
    bench("rows-t1", f"{SHORT} --temperature 1 --sweep speculation.rows=5,6,8,10", 4),
    bench("anytime-t1", f"{SHORT} --temperature 1 --methods ssd --sweep speculation.anytime=false,true", 2),
    bench("batch-t0", f"{LONG} {GOVERNED} --sweep engine.max_batch=2,4,8", 6),
    bench("self-t0", f"{SHORT} {SELF}", 2),
    Stage(name="profile", command=f"plan --measure --profile {{json}} --prompts {{five}} {SIMULATED}", minutes=4.5),
    Stage(
        name="plan",
        command="plan --profile {results}/profile.json --json {json} --pictures {work}",
        minutes=1,
    ),
    Stage(
        name="validate",
        command="plan --validate --profile {results}/profile.json --json {json} --pictures {work} "
        f"--prompts {{five}} {SIMULATED}",
        minutes=3.5,
    ),
)


def main(
    out: Annotated[
        Path, typer.Option(help="Folder of the results: stage NAME writes NAME.json, its newest run.")
    ] = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder for pages, pictures, traces and prompt excerpts.")] = WORK,
    vllm_python: Annotated[
        Path | None, typer.Option(help="Python of vLLM's environment; without it vLLM is not measured.")
    ] = None,
    wide: Annotated[
        Path | None, typer.Option(help="Folder with target and draft by scripts/widen.py, for the wide stages.")
    ] = None,
    wide_options: Annotated[str, typer.Option(help="Further options of ssd bench for the widened pair.")] = "",
    only: Annotated[str, typer.Option(help="Run these stages only, comma-separated.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Run stages whose results exist, too.")] = False,
    limit: Annotated[int, typer.Option(help="Largest time of a stage in seconds.")] = 300,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands without running them.")] = False,
) -> None:
    """Run every stage that has no results yet, then write the tables."""
    wanted = [name for name in only.split(",") if name]
    if unknown := set(wanted) - {stage.name for stage in STAGES}:
        raise typer.BadParameter(f"unknown stages {', '.join(unknown)}")
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    three, five = (_first(work, count) for count in (3, 5))
    failed = []
    for stage in STAGES:
        if (wanted and stage.name not in wanted) or (stage.wide and wide is None):
            continue
        file = out / f"{stage.name}.json"
        if file.is_file() and not again:
            typer.echo(f"{stage.name}: {file} exists")
            continue
        vllm = f"--vllm-python {vllm_python}" if vllm_python else ""
        places = {"json": file, "work": work / stage.name, "results": out, "three": three, "five": five}
        places |= {"wide": wide, "vllm": vllm, "wide_options": wide_options}
        command = [sys.executable, "-m", "ssd.cli", *stage.command.format(**places).split()]
        typer.echo(f"{stage.name} (about {stage.minutes:g} min): ssd {' '.join(command[3:])}")
        if dry_run:
            continue
        began = time.monotonic()
        try:
            code = subprocess.run(command, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            code = None
        spent_s = time.monotonic() - began
        typer.echo(f"{stage.name}: {'over the limit' if code is None else f'exit code {code}'} after {spent_s:.0f} s")
        if code != 0:
            failed.append(stage.name)
    if not dry_run:
        subprocess.run([sys.executable, str(HERE / "tables.py"), "--results", str(out)], check=True)
    if failed:
        typer.echo(f"failed: {', '.join(failed)}; run them again with --only")
        raise typer.Exit(1)


def _first(folder: Path, count: int) -> Path:
    """Writes the first code prompts to a file and returns it."""
    lines = CODE.read_text(encoding="utf-8").splitlines()[:count]
    file = folder / f"first-{count}.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


if __name__ == "__main__":
    typer.run(main)
