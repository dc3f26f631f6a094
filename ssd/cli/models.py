"""Try models: whether this engine decodes them as transformers does, and which fit together."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ModelError
from .options import DefaultGroup, JsonOption, check_folders
from .terminal import progress_bar, status, tables, write_json

if TYPE_CHECKING:
    from ..bench.exactness.model_facts import ModelFacts


class ModelsGroup(DefaultGroup):
    """``ssd models MODEL`` means ``ssd models check MODEL``."""

    default = "check"


def check(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folders, GGUF files, package:NAME/FILE.gguf.")
    ],
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the models run.")] = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Load models, decode a few tokens with them, and compare with transformers' own code.

    The first is the target, the others are drafts for it. Ends with exit code 1 if a model is refused.
    """
    from ..bench.exactness.model_facts import describe_pair, examine
    from ..config.sections import ModelConfig

    check_folders({"--json": json_file})
    found = list[dict[str, Any]]()
    usable = list["ModelFacts"]()
    for name in models:
        try:
            with status(f"{name}: loading"):
                facts = examine(ModelConfig(model=name, dtype=dtype, device=device))
        except ModelError as error:
            typer.echo(f"{name}\n  refused    {' '.join(str(error).split())}")
            found.append({"model": name, "refused": str(error)})
            continue
        usable.append(facts)
        told = _describe(facts)
        if len(usable) > 1 and models[0] == usable[0].model:
            told["pair"] = describe_pair(usable[0], facts)
        typer.echo(name)
        for what, text in told.items():
            typer.echo(f"  {what:<10} {text}")
        found.append({"model": name, **told})
    write_json(json_file, found)
    if len(usable) < len(models):
        raise typer.Exit(1)


def census(
    types: Annotated[list[str] | None, typer.Argument(metavar="[TYPE...]", help="By default all.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Decode with a tiny random model of each causal type of the installed transformers, with every method.

    Ends with exit code 1 if a type decodes other tokens than its own forward.
    """
    from ..pipeline.runtime.launch import InprocPipeline
    from ..testing.models.census import examine, model_types

    check_folders({"--json": json_file})
    every = model_types()
    if unknown := sorted({*(types or ())} - {*every}):
        raise ModelError(f"the installed transformers has no causal model type {unknown[0]!r}")
    wanted = types or every
    findings = []
    with progress_bar("census") as show:
        for done, model_type in enumerate(wanted):
            show(done, len(wanted), model_type)
            findings.append(examine(model_type, InprocPipeline))
    console = tables()
    for finding in findings:
        console.print(f"{finding.model_type:<28} {finding.outcome:<10} {finding.why}", markup=False, soft_wrap=True)
    counts = Counter(finding.outcome for finding in findings)
    console.print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    told = [{"type": one.model_type, "outcome": one.outcome, "why": one.why} for one in findings]
    write_json(json_file, told)
    if counts["different"] or counts["failed"]:
        raise typer.Exit(1)


def _describe(facts: ModelFacts) -> dict[str, str]:
    limit = "any number" if facts.positions is None else str(facts.positions)
    memory = f"{facts.cache_bytes / 2**10:.1f} KiB for each token"
    if facts.state_bytes:
        memory += f", {facts.state_bytes / 2**10:.1f} KiB for each sequence"
    own = "; by its own attention code, slower than others" if facts.own_code else ""
    return {
        "type": f"{facts.kind}, {facts.parameters / 1e6:.1f} M parameters",
        "layers": facts.layers,
        "positions": limit,
        "vocabulary": f"{facts.tokens} tokens, {facts.rows} rows of the output head",
        "cache": memory,
        "decodes": f"as transformers does{own}",
    }


COMMANDS = (check, census)
