"""All figures of docs/performance.md, stage by stage. Run on a quiet machine; run again to go on.

    python benchmarks/run_all.py --out benchmarks/results/DATE --vllm-python /tmp/vllm-venv/bin/python \
        --wide /tmp/wide

A stage whose JSON is there is done and is not run again; one that takes more than --limit seconds
is ended and can be run alone with --only. The last stage writes the tables into docs/performance.md.
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
CODE, MIXED = HERE / "prompts" / "heldout-code.jsonl", HERE / "prompts" / "heldout.jsonl"
PEERS = "transformers,transformers-assisted,vllm,vllm-draft"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One command, and what it writes. ``{out}`` is its path without a suffix."""

    name: str
    command: str
    minutes: float
    """About how long, on two quiet cores."""
    wide: bool = False
    """Needs the widened pair."""


def bench(name: str, options: str, minutes: float, *, pictures: bool = True, wide: bool = False) -> Stage:
    drawn = " --html {out}.html --pictures {out}" if pictures else ""
    return Stage(name=name, command=f"bench --json {{out}}.json{drawn} {options}", minutes=minutes, wide=wide)


EMBEDDED = f"--prompts {CODE} --max-tokens 128 --repeat 2 --peers {PEERS} {{vllm}}"
WIDE = (
    "--prompts {three} --max-tokens 48 --repeat 1 "
    "--set target.model={wide}/target --set draft.model={wide}/draft "
    "--peers vllm-draft {vllm} {wide_options}"  # more of them do not fit 24 GiB
)
SHORT = f"--prompts {CODE} --max-tokens 96 --repeat 1"
LONG = f"--prompts {CODE} --max-tokens 192 --repeat 1"  # a governor must have time to settle
SIMULATED = "--set speculation.fallback=jit"  # the simulator knows jit and none
GOVERNED = "--beside speculation.governor=true"
SELF = "--methods none,self --set draft=null --set speculation.method=self"
STAGES = (
    bench("embedded-t0", f"{EMBEDDED} --trace {{out}}.trace", 4),
    bench("embedded-t1", f"{EMBEDDED} --temperature 1", 3),
    bench("wide-t0", f"{WIDE} --trace {{out}}.trace", 7, wide=True),
    bench("wide-t1", f"{WIDE} --temperature 1", 7, wide=True),
    bench("mixed-t0", f"--prompts {MIXED} --max-tokens 64 --repeat 1", 1.5),
    bench("lookahead-t0", f"{SHORT} --sweep speculation.lookahead=auto,2,3,4,5", 5),
    bench("lookahead-t1", f"{SHORT} --temperature 1 --sweep speculation.lookahead=auto,2,3,4", 4),
    bench("rows-t1", f"{SHORT} --temperature 1 --sweep speculation.rows=5,6,8,10", 4),
    bench("anytime-t1", f"{SHORT} --temperature 1 --methods ssd --sweep speculation.anytime=false,true", 2),
    bench("batch-t0", f"{LONG} {GOVERNED} --sweep engine.max_batch=2,4,8", 6),
    bench("self-t0", f"{SHORT} {SELF}", 2),
    Stage(name="profile", command=f"plan --measure --profile {{out}}.json --prompts {{five}} {SIMULATED}", minutes=4.5),
    Stage(
        name="plan",
        command="plan --profile {folder}/profile.json --json {out}.json --pictures {out}",
        minutes=1,
    ),
    Stage(
        name="validate",
        command="plan --validate --profile {folder}/profile.json --json {out}.json --pictures {out} "
        f"--prompts {{five}} {SIMULATED}",
        minutes=3.5,
    ),
)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    vllm_python: Annotated[Path | None, typer.Option(help="Python of vLLM's environment; left out without.")] = None,
    wide: Annotated[Path | None, typer.Option(help="Folder with target and draft by scripts/widen.py.")] = None,
    wide_options: Annotated[str, typer.Option(help="More options of ssd bench for the widened pair.")] = "",
    only: Annotated[str, typer.Option(help="Comma-separated stages.")] = "",
    limit: Annotated[int, typer.Option(help="Seconds a stage may take.")] = 300,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the commands.")] = False,
) -> None:
    """Run what is not there yet."""
    wanted = [name for name in only.split(",") if name]
    if unknown := set(wanted) - {stage.name for stage in STAGES}:
        raise typer.BadParameter(f"unknown stages {', '.join(unknown)}")
    out.mkdir(parents=True, exist_ok=True)
    three, five = (_first(out, count) for count in (3, 5))
    failed = []
    for stage in STAGES:
        if (wanted and stage.name not in wanted) or (stage.wide and wide is None):
            continue
        if (out / f"{stage.name}.json").is_file():
            typer.echo(f"{stage.name}: done before")
            continue
        vllm = f"--vllm-python {vllm_python}" if vllm_python else ""
        places = {"out": out / stage.name, "folder": out, "wide": wide, "three": three, "five": five, "vllm": vllm}
        places["wide_options"] = wide_options
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
        subprocess.run([sys.executable, str(HERE / "tables.py")], check=True)
    if failed:
        typer.echo(f"not done: {', '.join(failed)}; run again with --only")
        raise typer.Exit(1)


def _first(out: Path, count: int) -> Path:
    """A file of the first code prompts."""
    lines = CODE.read_text(encoding="utf-8").splitlines()[:count]
    file = out / f"first-{count}.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


if __name__ == "__main__":
    typer.run(main)
