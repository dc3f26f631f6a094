"""Measuring contenders in turns: every arm runs a group of prompts before any arm runs the next group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

from ...config.sections import Config
from ...errors import RequestError
from ...request.methods import Method
from ...request.output import RequestOutput, SpeculationRecord
from ...request.sampling_params import SamplingParams
from .prompts import Prompt

if TYPE_CHECKING:
    from ...engine.llm import LLM

NGRAM = 8

Launch: TypeAlias = "Callable[[Config], LLM]"
"""Starts a pipeline; a context manager that ends it."""
Progress = Callable[[int, int, str], None]
"""Called with the runs done, the runs in total, and the name of the next run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """How prompts are run: what is generated, and how often it is measured.

    Raises:
        RequestError: a value out of range.
    """

    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 128
    """Tokens generated for each prompt."""
    repeat: int = 1
    """How often everything is measured."""
    warmup_tokens: int = 16
    """Tokens each arm generates before measuring starts; 0: no warm-up."""
    batch: int = 1
    """Prompts run together."""

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise RequestError("repeat must be an integer >= 1")
        _ = self.params

    @property
    def params(self) -> SamplingParams:
        """Sampling parameters of a request; end-of-text does not end it, so that all generate as much."""
        return SamplingParams(temperature=self.temperature, seed=self.seed, max_tokens=self.max_tokens, ignore_eos=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Result of one run of an arm."""

    outputs: list[RequestOutput]
    """One for each prompt."""
    decode_s: float
    """Seconds of decoding, without loading, compiling and prefill."""
    timings: dict[str, float | None] = field(default_factory=dict)
    """Medians over the run's rounds, in ms."""


class Arm(Protocol):
    """One contender of a measurement."""

    @property
    def name(self) -> str: ...

    def run(self, prompts: Sequence[Prompt], params: SamplingParams) -> Sample:
        """Completes the prompts as one batch."""
        ...


@dataclass(frozen=True, slots=True)
class MethodArm:
    """A method of one of our pipelines."""

    llm: LLM
    method: Method
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.method

    def run(self, prompts: Sequence[Prompt], params: SamplingParams) -> Sample:
        params, texts = replace(params, method=self.method), [prompt.text for prompt in prompts]
        if len(texts) == 1:
            outputs = self.llm.generate(texts, params)
            decode_s = outputs[0].decode_s
        else:
            # A request's own time includes the prefill of those admitted after it; the rounds' times do not.
            with self.llm.watch() as rounds:
                outputs = self.llm.generate(texts, params)
            decode_s = sum(one.round_s for one in rounds)
        return Sample(outputs=outputs, decode_s=decode_s, timings=self.llm.timings(reset=True))


@dataclass(kw_only=True, slots=True)
class Tally:
    """Sums over some runs of one arm in one repeat."""

    tokens: int = 0
    decode_s: float = 0.0
    speculation: SpeculationRecord = field(default_factory=SpeculationRecord)
    ngrams: int = 0
    repeated_ngrams: int = 0

    def add(self, sample: Sample) -> None:
        self.decode_s += sample.decode_s
        for output in sample.outputs:
            self.tokens += len(output.token_ids)
            self.speculation.add(output.speculation)
            ngrams, repeated = count_ngrams(output.token_ids)
            self.ngrams += ngrams
            self.repeated_ngrams += repeated

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.decode_s if self.decode_s > 0 else None


@dataclass(kw_only=True, slots=True)
class Measured:
    """What :func:`interleave` returns."""

    tallies: dict[tuple[str, str], list[Tally]]
    """By arm and category: one for each repeat."""
    samples: dict[tuple[str, str], list[float | None]]
    """By arm and name of a timing: one for each run, in ms."""
    outputs: dict[tuple[str, int, str], RequestOutput]
    """By arm, repeat and prompt."""

    def total(self, arm: str) -> Tally:
        """Returns the sum over all categories and repeats of an arm."""
        return merge(tally for (name, _), tallies in self.tallies.items() if name == arm for tally in tallies)


def interleave(
    arms: Sequence[Arm], prompts: Sequence[Prompt], runs: Runs, *, progress: Progress | None = None
) -> Measured:
    """Runs all prompts with all arms, in turns.

    Every arm runs a group of ``runs.batch`` prompts of one category before any arm runs the next group, so that
    a machine that slows down slows all arms alike. The order of the arms rotates from repeat to repeat.
    """
    groups = list(_groups(prompts, runs.batch))
    total, done = len(groups) * len(arms) * runs.repeat, 0
    report = progress or (lambda done, total, label: None)
    params = runs.params
    if runs.warmup_tokens:
        for arm in arms:
            report(0, total, f"warming up {arm.name}")
            arm.run(groups[0], replace(params, max_tokens=min(runs.warmup_tokens, params.max_tokens)))
    found = Measured(
        tallies=defaultdict(lambda: [Tally() for _ in range(runs.repeat)]), samples=defaultdict(list), outputs={}
    )
    for turn in range(runs.repeat):
        shift = turn % len(arms)
        for group in groups:
            for arm in [*arms[shift:], *arms[:shift]]:
                report(done, total, f"{group[0].name} {arm.name}")
                sample = arm.run(group, params)
                done += 1
                for name, value in sample.timings.items():
                    found.samples[arm.name, name].append(value)
                found.tallies[arm.name, group[0].category][turn].add(sample)
                for prompt, output in zip(group, sample.outputs, strict=True):
                    found.outputs[arm.name, turn, prompt.name] = output
    report(total, total, "done")
    return found


def merge(parts: Iterable[Tally]) -> Tally:
    """Returns the sum of the tallies."""
    whole = Tally()
    for part in parts:
        whole.tokens += part.tokens
        whole.decode_s += part.decode_s
        whole.speculation.add(part.speculation)
        whole.ngrams += part.ngrams
        whole.repeated_ngrams += part.repeated_ngrams
    return whole


def count_ngrams(tokens: Sequence[int], size: int = NGRAM) -> tuple[int, int]:
    """Returns the number of n-grams, and how many of them occurred before in the same tokens.

    Where a text repeats itself, its acceptance rate says little.
    """
    seen: set[tuple[int, ...]] = set()
    total = max(len(tokens) - size + 1, 0)
    for start in range(total):
        seen.add(tuple(tokens[start : start + size]))
    return total, total - len(seen)


def _groups(prompts: Sequence[Prompt], batch: int) -> Iterator[list[Prompt]]:
    for category in dict.fromkeys(prompt.category for prompt in prompts):
        same = [prompt for prompt in prompts if prompt.category == category]
        for start in range(0, len(same), batch):
            yield same[start : start + batch]
