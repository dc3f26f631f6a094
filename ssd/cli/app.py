"""The ``ssd`` command.

Exit codes: 0 done; 1 the outputs compared differ, or a certificate is refused; 2 the input cannot work;
3 the machinery failed; 130 interrupted.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .. import __version__
from ..errors import PipelineError, RequestError, UsageError
from ..request.output import RequestOutput, StreamEvent
from ..request.sampling_params import SamplingParams
from . import bench as cli_bench
from . import certify as cli_certify
from . import plan as cli_plan
from . import remote as cli_remote
from . import serving as cli_serving
from . import tune as cli_tune
from .values import bias, ids, structured

if TYPE_CHECKING:
    from ..bench.measure.compare import Comparison
    from ..config.load import Config, ModelConfig

EXIT_DIFFERENT, EXIT_USAGE, EXIT_PIPELINE, EXIT_INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    name="ssd",
    help="Speculative speculative decoding: the target's own tokens, faster.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="A YAML file, or the name of a shipped configuration.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one configuration value; repeatable.")
]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
SeedOption = Annotated[int, typer.Option(help="Same seed, same tokens.")]
Command = TypeVar("Command", bound=Callable[..., Any])


def main() -> None:
    """Entry point of the console script."""
    app()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Speculative speculative decoding: the target's own tokens, faster."""


def _reports_errors(command: Command) -> Command:
    """Errors users can act on become one line on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except UsageError as error:
            _fail(error, EXIT_USAGE)
        except PipelineError as error:
            _fail(error, EXIT_PIPELINE)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read our output has gone; let nothing be written to it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(128 + signal.SIGPIPE) from None

    return wrapped  # type: ignore[return-value]


def _fail(error: Exception, code: int) -> None:
    typer.echo("error: " + " ".join(str(error).split()), err=True)
    raise typer.Exit(code) from None


@app.command()
@_reports_errors
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: fewer tokens of prompt and output again.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken off the logit of tokens of the output.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for every time they came.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=BIAS", help="Added to a token's logit; repeatable.")
    ] = None,
    bad_words: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Not in the output; repeatable.")] = None,
    allowed_token_ids: Annotated[
        str | None, typer.Option(metavar="ID,ID,...", help="Choose from these tokens only.")
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Completions; printed one after another.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 256,
    min_tokens: Annotated[int, typer.Option(help="Do not stop before so many tokens.")] = 0,
    seed: SeedOption = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; repeatable.")] = None,
    stop_token_ids: Annotated[str | None, typer.Option(metavar="ID,ID,...", help="Stop at these tokens.")] = None,
    include_stop_str_in_output: Annotated[
        bool, typer.Option("--include-stop-str-in-output", help="Show the stop text too.")
    ] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after end-of-text.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="List every token's log-probability, and so many of the likeliest.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The answer is JSON in one line that follows this schema.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="The answer matches this regular expression.")] = None,
    method: Annotated[str | None, typer.Option(help="none, sd, self or ssd; by default as configured.")] = None,
) -> None:
    """Continue PROMPT, printing text as it becomes certain."""
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=dict(bias(given) for given in logit_bias or ()),
        bad_words=tuple(bad_words or ()),
        allowed_token_ids=None if allowed_token_ids is None else ids(allowed_token_ids, "--allowed-token-ids"),
        n=n,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        seed=seed,
        stop=tuple(stop or ()),
        stop_token_ids=() if stop_token_ids is None else ids(stop_token_ids, "--stop-token-ids"),
        include_stop_str_in_output=include_stop_str_in_output,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        structured_outputs=structured(json_schema, regex),
        method=method,  # type: ignore[arg-type]
    )
    if not prompt:
        raise RequestError("the prompt is empty; give at least one character to continue")
    settings = _settings(config, overrides)

    from ssd import LLM

    with LLM(settings) as llm:
        if n == 1:
            outputs = _print_as_it_comes(llm.stream(prompt, params))
        else:
            outputs = list(llm.generate(prompt, params)[0].outputs)
            for output in outputs:
                sys.stdout.write(f"--- {output.index + 1} of {n}\n{output.text}\n")
        sys.stdout.flush()
        degraded = llm.degraded
        tokenizer = llm.tokenizer
    for output in outputs:
        _print_logprobs(output, tokenizer)
    _warn(degraded)
    for output in outputs:
        typer.echo(_statistics(output), err=True)
    for output in outputs:
        if output.error:
            raise PipelineError(output.error)


@app.command()
@_reports_errors
def compare(
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines; by default six prompts of code and prose.")] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated; none and none_fast always run.")] = "none,sd,ssd",
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Measure so often; medians are reported.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The built-in prompts; show the answers too.")] = False,
) -> None:
    """Run the methods on the same prompts; compare tokens and speed.

    Ends with exit code 1 if any method's tokens differ from plain decoding's.
    """
    from rich.console import Console

    from ..bench.measure.compare import compare as run
    from ..bench.measure.compare import parse_methods, prepared
    from ..bench.measure.prompts import DEMO_PROMPTS, load_prompts
    from ..bench.report.tables import print_comparison

    if demo and prompts is not None:
        raise RequestError("--demo brings its own prompts; give --demo or --prompts, not both")
    SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens)
    chosen = parse_methods(methods)
    workload = list(DEMO_PROMPTS) if prompts is None else load_prompts(prompts)
    if json_file is not None and not json_file.parent.is_dir():
        raise UsageError(f"--json {json_file}: the folder {str(json_file.parent)!r} does not exist; create it first")
    # Methods are compared as such: a governor would turn them into plain decoding where they do not pay.
    settings = prepared(_settings(config, ["speculation.governor=false", *(overrides or ())]), chosen)

    from ssd import LLM

    progress_console = Console(stderr=True)
    # Tables wrapped at 80 columns are no use in a log.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    # The first start on a machine compiles the models' forwards: say so, it takes a minute.
    with progress_console.status("starting (the first time on a machine compiles)") as status, LLM(settings) as llm:

        def progress(done: int, total: int, label: str) -> None:
            status.update(f"{done}/{total} {label}")

        comparison = run(
            llm,
            workload,
            methods=chosen,
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            repeat=repeat,
            progress=progress,
        )
        degraded = llm.degraded
    if demo:
        _print_answers(comparison, console)
    print_comparison(comparison, console)
    _warn(degraded)
    if json_file is not None:
        json_file.write_text(json.dumps(comparison.to_json(), indent=2) + "\n", encoding="utf-8")
    if comparison.identity_promised and not comparison.identical_all:
        raise typer.Exit(EXIT_DIFFERENT)


@app.command()
@_reports_errors
def info(config: ConfigOption = "embedded", overrides: SetOption = None) -> None:
    """Show the machine, its devices, the models configured, and versions."""
    from ..bench.measure.compare import versions

    settings = _settings(config, overrides, models_needed=False)

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


def _print_as_it_comes(events: Iterable[StreamEvent]) -> list[RequestOutput]:
    outputs = []
    for event in events:
        sys.stdout.write(event.text)
        sys.stdout.flush()
        if event.output is not None:
            outputs.append(event.output)
    sys.stdout.write("\n")
    return outputs


def _print_logprobs(output: RequestOutput, tokenizer: Any) -> None:
    """One line a token on stderr: log-probability, rank, token; then the likeliest."""
    for token in output.logprobs or ():
        best = "  ".join(f"{tokenizer.decode([token_id])!r} {value:.3f}" for token_id, value in token.top)
        text = repr(tokenizer.decode([token.token_id]))
        typer.echo(f"{token.logprob:9.3f} {token.rank:5} {text:<16} {best}".rstrip(), err=True)


def _settings(config: str, overrides: list[str] | None, *, models_needed: bool = True) -> Config:
    """The checked configuration; missing models are found before anything is started."""
    from ..config.load import load_config, resolve_model_path

    settings = load_config(config, overrides or ())
    if models_needed:
        for model in (settings.target, settings.draft):
            if model is not None:
                resolve_model_path(model.model)
    return settings


def _warn(degraded: str | None) -> None:
    """Say that the draft was lost on the way: the tokens hold, the speed does not."""
    if degraded:
        typer.echo(f"warning: without a draft: {' '.join(degraded.split())}", err=True)


def _statistics(output: RequestOutput) -> str:
    """One line about a finished request."""
    from ..bench.report.tables import number

    record = output.speculation
    tokens = len(output.token_ids)
    rate = tokens / output.decode_s if output.decode_s > 0 else None
    return (
        f"{tokens} tokens, {number(rate, 1)} tok/s, acceptance rate {number(record.acceptance_rate, 2)}, "
        f"acceptance length {number(record.acceptance_length, 2)}, hit rate {number(record.hit_rate, 2)}, "
        f"{record.rounds} rounds, finished: {output.finish_reason}"
    )


def _print_answers(comparison: Comparison, console: Any) -> None:
    for prompt in comparison.prompts:
        console.rule(f"{prompt.category}: {prompt.name}", align="left")
        console.print(prompt.text, style="dim", end="", markup=False, highlight=False, soft_wrap=True)
        answer = comparison.references[prompt.name].text
        console.print(answer, markup=False, highlight=False, soft_wrap=True)
    console.rule()


def _row(name: str, text: str) -> None:
    typer.echo(f"{name:<12} {text}")


def _describe_model(model: ModelConfig) -> str:
    from ..config.load import resolve_model_path
    from ..errors import ModelError

    place = f"{model.model}, {model.dtype} on {model.device}"
    if model.cores:
        place += f" cores {', '.join(map(str, model.cores))}"
    try:
        parameters = _count_parameters(resolve_model_path(model.model))
    except ModelError:
        return f"{place}, missing on this machine"
    return f"{place}, {parameters / 1e6:.1f} M parameters" if parameters else f"{place}, no safetensors found"


def _count_parameters(folder: Path) -> int:
    """Stored numbers of a model, from the headers of its safetensors files."""
    from math import prod

    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        count += sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return count


for _module in (cli_serving, cli_remote, cli_certify, cli_bench, cli_plan):
    for _command in _module.COMMANDS:
        app.command()(_reports_errors(_command))
for _command in cli_tune.COMMANDS:
    cli_tune.app.command()(_reports_errors(_command))
app.add_typer(cli_tune.app)


if __name__ == "__main__":
    main()
