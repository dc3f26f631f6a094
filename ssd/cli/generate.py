"""``ssd generate``: continue a prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import PipelineError, RequestError, UsageError
from ..request import prompts
from ..request.output import RequestOutput, StreamEvent
from ..request.sampling_params import SamplingParams
from ..request.structured import StructuredOutputsParams
from .options import ConfigOption, SeedOption, SetOption, TemperatureOption, makers, settings_of
from .terminal import say, warn_degraded

if TYPE_CHECKING:
    from ..config.sections import Config


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    config: ConfigOption = "embedded",
    overrides: SetOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the most probable tokens up to this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")] = 0,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this share of the most probable token's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens of the prompt and the output become less likely.")
    ] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted from the logit of tokens of the output.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, once for each occurrence.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=BIAS", help="Added to a token's logit; repeatable.")
    ] = None,
    bad_words: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Must not occur in the output; repeatable.")
    ] = None,
    allowed_token_ids: Annotated[
        str | None, typer.Option(metavar="ID,ID,...", help="Choose among these tokens only.")
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Number of completions, printed one after another.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Stop after this number of tokens.")] = 256,
    min_tokens: Annotated[int, typer.Option(help="Do not stop before this number of tokens.")] = 0,
    seed: SeedOption = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; repeatable.")] = None,
    stop_token_ids: Annotated[str | None, typer.Option(metavar="ID,ID,...", help="Stop at these tokens.")] = None,
    include_stop_str_in_output: Annotated[
        bool, typer.Option("--include-stop-str-in-output", help="Print the stop text too.")
    ] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after end-of-text.")] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(help="List each token's log-probability, and this number of the most probable tokens."),
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The output is one line of JSON that follows this schema.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="The output matches this regular expression.")] = None,
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
        logit_bias=dict(_bias(given) for given in logit_bias or ()),
        bad_words=tuple(bad_words or ()),
        allowed_token_ids=None if allowed_token_ids is None else _ids(allowed_token_ids, "--allowed-token-ids"),
        n=n,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        seed=seed,
        stop=tuple(stop or ()),
        stop_token_ids=() if stop_token_ids is None else _ids(stop_token_ids, "--stop-token-ids"),
        include_stop_str_in_output=include_stop_str_in_output,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        structured_outputs=_structured(json_schema, regex),
        method=method,  # type: ignore[arg-type]
    )
    if not prompt:
        raise RequestError("the prompt is empty; give at least one character to continue")
    prompts.one(prompt)  # before the models load
    _run(context, settings_of(config, overrides), prompt, params)


def _run(context: typer.Context, settings: Config, prompt: str, params: SamplingParams) -> None:
    with makers(context).llm(settings) as llm:
        if params.n == 1:
            outputs = _print_as_it_comes(llm.stream(prompt, params))
        else:
            outputs = list(llm.generate(prompt, params)[0].outputs)
            for output in outputs:
                sys.stdout.write(f"--- {output.index + 1} of {params.n}\n{output.text}\n")
        sys.stdout.flush()
        degraded = llm.degraded
    if params.logprobs is not None:
        _print_logprobs(outputs, settings)
    warn_degraded(degraded)
    for output in outputs:
        say(_statistics(output))
    for output in outputs:
        if output.error:
            raise PipelineError(output.error)


def _print_as_it_comes(events: Iterable[StreamEvent]) -> list[RequestOutput]:
    outputs = []
    for event in events:
        sys.stdout.write(event.text)
        sys.stdout.flush()
        if event.output is not None:
            outputs.append(event.output)
    sys.stdout.write("\n")
    return outputs


def _print_logprobs(outputs: list[RequestOutput], settings: Config) -> None:
    """Prints a line for each token to stderr: log-probability, rank, text, then the most probable tokens."""
    from ..config.load import resolve_model_path
    from ..models.checkpoints.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(resolve_model_path(settings.target.model))
    for token in (token for output in outputs for token in output.logprobs or ()):
        best = "  ".join(f"{tokenizer.decode([token_id])!r} {value:.3f}" for token_id, value in token.top)
        text = repr(tokenizer.decode([token.token_id]))
        say(f"{token.logprob:9.3f} {token.rank:5} {text:<16} {best}".rstrip())


def _statistics(output: RequestOutput) -> str:
    """Returns a line about a finished request."""
    from ..bench.report.tables import number

    record = output.speculation
    tokens = len(output.token_ids)
    rate = tokens / output.decode_s if output.decode_s > 0 else None
    return (
        f"{tokens} tokens, {number(rate, 1)} tok/s, acceptance rate {number(record.acceptance_rate, 2)}, "
        f"acceptance length {number(record.acceptance_length, 2)}, hit rate {number(record.hit_rate, 2)}, "
        f"{record.rounds} rounds, finished: {output.finish_reason}"
    )


def _bias(given: str) -> tuple[int, float]:
    token, _, bias = given.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise RequestError(f"--logit-bias {given!r} must look like ID=BIAS, for example 42=-1.5") from None


def _ids(given: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(token) for token in given.split(","))
    except ValueError:
        raise RequestError(f"{option} {given!r} must be token ids separated by commas, for example 13,198") from None


def _structured(schema: Path | None, regex: str | None) -> StructuredOutputsParams | None:
    if schema is None and regex is None:
        return None
    try:
        text = None if schema is None else schema.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--json-schema {schema}: cannot be read ({error})") from None
    # White space is not allowed between tokens of JSON: small models would indent without end.
    return StructuredOutputsParams(json=text, regex=regex, disable_any_whitespace=schema is not None)


COMMANDS = (generate,)
