"""Try models: whether this engine decodes them as transformers does, and which fit together."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
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
    findings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write findings here as they come; do not repeat those in it.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Replace the table of this page (docs/models.md).")
    ] = None,
) -> None:
    """Decode with a tiny random model of each causal type of the installed transformers, with every method.

    Ends with exit code 1 if a type decodes other tokens than its own forward.
    """
    from ..pipeline.runtime.launch import InprocPipeline
    from ..testing.models.census import append_finding, examine, model_types, read_findings, write_table

    check_folders({"--findings": findings, "--page": page})
    every = model_types()
    if unknown := sorted({*(types or ())} - {*every}):
        raise ModelError(f"the installed transformers has no causal model type {unknown[0]!r}")
    wanted, found = types or every, {one.model_type: one for one in read_findings(findings)}
    with progress_bar("census") as show:
        for done, model_type in enumerate(wanted):
            show(done, len(wanted), model_type)
            if model_type not in found:
                found[model_type] = examine(model_type, InprocPipeline)
                if findings is not None:
                    append_finding(findings, found[model_type])
    console, taken = tables(), [found[model_type] for model_type in wanted]
    for one in taken:
        console.print(f"{one.model_type:<28} {one.outcome:<10} {one.why}", markup=False, soft_wrap=True)
    counts = Counter(one.outcome for one in taken)
    console.print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    if page is not None:
        write_table(page, taken)
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
