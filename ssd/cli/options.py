"""What several commands share: their options, and the functions that make their pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Protocol

import typer
from typer.core import TyperGroup

from ..errors import UsageError

if TYPE_CHECKING:
    from ..bench.measure.prompts import Prompt
    from ..config.sections import Config
    from ..engine.llm import LLM
    from ..serving.batch.run import Batch

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="A YAML file, or the name of a shipped configuration.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one configuration value; repeatable.")
]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
SeedOption = Annotated[int, typer.Option(help="Same seed, same tokens.")]
PromptsOption = Annotated[
    Path | None,
    typer.Option(help="A file of JSON lines, Spec-Bench's too; by default six prompts of code and prose."),
]
MethodsOption = Annotated[str, typer.Option(help="Comma-separated; none and none_fast always run.")]
MaxTokensOption = Annotated[int, typer.Option(help="Tokens to generate for each prompt.")]
RepeatOption = Annotated[int, typer.Option(min=1, help="Number of measurements; medians are reported.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here, as JSON.")]

AS_METHODS = "speculation.governor=false"
"""Override of commands that measure methods: the governor would replace a slow method by plain decoding."""


class DefaultGroup(TyperGroup):
    """A group of commands one of which need not be named."""

    default: ClassVar[str]

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


def settings_of(config: str, overrides: list[str] | None, *defaults: str, models_needed: bool = True) -> Config:
    """Returns the checked configuration; missing models are found before anything is started.

    Args:
        overrides: the user's, from ``--set``.
        defaults: overrides of the command; the user's come after them.

    Raises:
        ConfigError: the configuration or an override is wrong.
        ModelError: a model is missing.
    """
    from ..config.load import load_config, resolve_model_path

    settings = load_config(config, [*defaults, *(overrides or ())])
    if models_needed:
        for model in (settings.target, settings.draft):
            if model is not None:
                resolve_model_path(model.model)
    return settings


def workload(prompts: Path | None) -> list[Prompt]:
    """Returns the prompts of a file, or the demonstration's.

    Raises:
        RequestError: the file cannot be used.
    """
    from ..bench.measure.prompts import DEMO_PROMPTS, load_prompts

    return list(DEMO_PROMPTS) if prompts is None else load_prompts(prompts)


def check_folders(files: dict[str, Path | None]) -> None:
    """Checks, before a long run, that the files it will write can be created.

    Args:
        files: by option; None where the option was not given.

    Raises:
        UsageError: the folder of a file does not exist.
    """
    for option, file in files.items():
        if file is not None and not file.parent.is_dir():
            raise UsageError(f"{option} {file}: the folder {str(file.parent)!r} does not exist; create it first")


class MakeBatch(Protocol):
    """Prepares what ``ssd batch`` runs."""

    def __call__(self, config: Config, source: Path, out: Path, *, restart: bool) -> Batch: ...


def local_llm(config: Config) -> LLM:
    """Starts a pipeline on this machine."""
    from ..engine.llm import LLM

    return LLM(config)


def local_batch(config: Config, source: Path, out: Path, *, restart: bool) -> Batch:
    """Prepares a batch that runs on this machine."""
    from ..serving.batch.run import Batch

    return Batch(config, source, out, restart=restart)


@dataclass(frozen=True, kw_only=True, slots=True)
class Makers:
    """Functions that make what the commands work with."""

    llm: Callable[[Config], LLM] = local_llm
    """Starts a pipeline; what it returns has the methods of ``LLM`` and ends the pipeline when it is left."""
    batch: MakeBatch = local_batch


def makers(context: typer.Context) -> Makers:
    """Returns the makers the running command was given."""
    found = context.find_object(Makers)
    assert found is not None, "make_app puts them into the context"
    return found
