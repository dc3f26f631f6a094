"""The ``ssd`` command.

Exit codes: 0 success; 1 compared outputs differ, a certificate or a model is refused, or lines of a batch failed;
2 wrong input; 3 the pipeline failed; 130 interrupted.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .. import __version__
from ..errors import PipelineError, UsageError
from . import bench, compare, generate, models, plan, remote, serving, tune
from .options import ConfigOption, Makers, SetOption, settings_of

if TYPE_CHECKING:
    from ..config.sections import ModelConfig

EXIT_USAGE, EXIT_PIPELINE, EXIT_INTERRUPTED = 2, 3, 130
STYLE: dict[str, Any] = {"rich_markup_mode": None}
Command = TypeVar("Command", bound=Callable[..., Any])


def make_app(given: Makers | None = None) -> typer.Typer:
    """Builds the ``ssd`` command.

    Args:
        given: what makes pipelines and batches; by default they run on this machine.
    """
    app = typer.Typer(
        name="ssd",
        help="Speculative speculative decoding: the target's own tokens, faster.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        **STYLE,
    )

    @app.callback()
    def root(
        context: typer.Context,
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        """Speculative speculative decoding: the target's own tokens, faster."""
        context.obj = given or Makers()

    for module in (generate, compare, serving, remote, bench, plan):
        for command in module.COMMANDS:
            app.command()(reports_errors(command))
    app.command()(reports_errors(info))
    for name, group, module in (("tune", tune.TuneGroup, tune), ("models", models.ModelsGroup, models)):
        commands = typer.Typer(cls=group, name=name, help=module.__doc__, **STYLE)
        for command in module.COMMANDS:
            commands.command()(reports_errors(command))
        app.add_typer(commands)
    return app


def main() -> None:
    """Entry point of the console script."""
    make_app()()


def reports_errors(command: Command) -> Command:
    """Turns errors that users can act on into a line on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            _check_temporary_folder()
            return command(*args, **kwargs)
        except UsageError as error:
            _fail(error, EXIT_USAGE)
        except PipelineError as error:
            _fail(error, EXIT_PIPELINE)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our output is gone; nothing must be written to it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(128 + signal.SIGPIPE) from None

    return wrapped  # type: ignore[return-value]


def info(config: ConfigOption = "embedded", overrides: SetOption = None) -> None:
    """Show the machine, its devices, the configured models, and versions."""
    from ..bench.measure.compare import versions

    settings = settings_of(config, overrides, models_needed=False)

    import torch

    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    _row("machine", f"{len(usable)} usable cores of {os.cpu_count()}, {memory_gib:.1f} GiB memory")
    devices = ["cpu"] + [
        f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())
    ]
    _row("devices", ", ".join(devices))
    _row("versions", ", ".join(f"{name} {number or 'missing'}" for name, number in versions().items()))
    _row("config", config)
    _row("target", _describe_model(settings.target))
    _row("draft", _describe_model(settings.draft) if settings.draft else "none")
    speculation = settings.speculation
    _row(
        "speculation",
        f"{speculation.method}, lookahead {speculation.lookahead}, {speculation.tree}, "
        f"{speculation.forecast.shape} forecast of {speculation.forecast.budget}, fallback {speculation.fallback}",
    )
    _row("numerics", settings.numerics)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


def _check_temporary_folder() -> None:
    """Raises: UsageError: there is none. torch cannot even be imported then."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise UsageError("there is no writable folder for temporary files; set TMPDIR to one") from None


def _fail(error: Exception, code: int) -> None:
    typer.echo("error: " + " ".join(str(error).split()), err=True)
    raise typer.Exit(code) from None


def _row(name: str, text: str) -> None:
    typer.echo(f"{name:<12} {text}")


def _describe_model(model: ModelConfig) -> str:
    from ..config.load import resolve_model_path
    from ..errors import ModelError

    place = f"{model.model}, {model.dtype} on {model.device}"
    if model.cores:
        place += f" cores {', '.join(map(str, model.cores))}"
    if model.adapter is not None:
        place += f", adapter {model.adapter}"
    try:
        path = resolve_model_path(model.model)
    except ModelError as error:
        return f"{place}, missing on this machine: {error}"
    try:
        if path.suffix == ".gguf":
            return f"{place}, {_describe_gguf(path, model)}"
        return f"{place}, {_describe_folder(path, model)}"
    except ModelError as error:
        return f"{place}: {error}"


def _describe_gguf(path: Path, model: ModelConfig) -> str:
    """Returns a GGUF file's size and quantisation, and how its weights will be kept. Raises: ModelError."""
    from math import prod

    from ..models.checkpoints.gguf_weights import packs
    from ..models.checkpoints.loading import read_header

    header = read_header(path)
    parameters = sum(prod(tensor.shape) for tensor in header.tensors.values())
    kept = packs(header, weights=model.weights, dtype=model.dtype, device=model.device)
    size = f"{path.stat().st_size / 1e6:.0f} MB"
    return f"{parameters / 1e6:.1f} M parameters, GGUF of {size} ({', '.join(header.types())}), weights " + (
        "packed" if kept else "dequantised"
    )


def _describe_folder(folder: Path, model: ModelConfig) -> str:
    """Returns a folder's size and quantisation, and how its weights will be kept. Raises: ModelError."""
    from math import prod

    from ..models.checkpoints import loading, quantised

    stored = quantised.stored_tensors(folder)
    if not stored:
        return "no safetensors found"
    if "quantization_config" not in (folder / "config.json").read_text(encoding="utf-8"):
        return f"{sum(prod(tensor.shape) for tensor in stored.values()) / 1e6:.1f} M parameters"
    config = loading.read_config(folder)
    found = quantised.find_quantisation(folder, config)
    kept = loading.check_weights(folder, config, weights=model.weights, device=model.device, adapter=model.adapter)
    packed = quantised.stays_packed(folder, found, weights=kept, device=model.device)
    return f"{loading.count_parameters(config) / 1e6:.1f} M parameters, {found}, weights " + (
        "packed" if packed else "dequantised"
    )


if __name__ == "__main__":
    main()
