"""What is compared: an arm runs prompts and says how long decoding took. Arms take turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from ...request.methods import Method
from ...request.output import RequestOutput, SpeculationRecord
from ...request.sampling_params import SamplingParams
from .prompts import Prompt

if TYPE_CHECKING:
    from ...engine.llm import LLM

NGRAM = 8

Progress = Callable[[int, int, str], None]
"""Called with the runs done, the runs in all, and what runs next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What one run of an arm gave."""

    outputs: list[RequestOutput]
    """One for every prompt."""
    decode_s: float
    """Seconds of decoding: loading, compiling and prefill are no part of it."""
    timings: dict[str, float | None] = field(default_factory=dict)
    """Medians over its rounds, ms."""


class Arm(Protocol):
    """One contender."""

    @property
    def name(self) -> str: ...

    def run(self, prompts: Sequence[Prompt], params: SamplingParams) -> Sample:
        """Complete the prompts together."""
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
            # Each request's own time includes the prefill of those admitted after it; rounds do not.
            with self.llm.watch() as rounds:
                outputs = self.llm.generate(texts, params)
            decode_s = sum(one.round_s for one in rounds)
        return Sample(outputs=outputs, decode_s=decode_s, timings=self.llm.timings(reset=True))


@dataclass(kw_only=True, slots=True)
class Tally:
    """What one arm did in one repeat, over some prompts."""

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
    """What :func:`interleave` found."""

    tallies: dict[tuple[str, str], list[Tally]]
    """By arm and category, one per repeat."""
    samples: dict[tuple[str, str], list[float | None]]
    """By arm and name of a timing."""
    outputs: dict[tuple[str, int, str], RequestOutput]
    """By arm, repeat and prompt."""


def interleave(
    arms: Sequence[Arm],
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    repeat: int,
    warmup_tokens: int,
    batch: int = 1,
    progress: Progress | None = None,
) -> Measured:
    """Every group of ``batch`` prompts (of one category) is run by every arm before the next one, so
    that a machine that slows down slows all alike. The order of the arms rotates from repeat to
    repeat. Before measuring, each arm generates ``warmup_tokens`` that do not count."""
    groups = list(_groups(prompts, batch))
    total, done = len(groups) * len(arms) * repeat, 0
    report = progress or (lambda done, total, label: None)
    if warmup_tokens:
        for arm in arms:
            report(0, total, f"warming up {arm.name}")
            arm.run(groups[0], replace(params, max_tokens=min(warmup_tokens, params.max_tokens)))
    found = Measured(
        tallies=defaultdict(lambda: [Tally() for _ in range(repeat)]), samples=defaultdict(list), outputs={}
    )
    for turn in range(repeat):
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
    """All of them as one."""
    whole = Tally()
    for part in parts:
        whole.tokens += part.tokens
        whole.decode_s += part.decode_s
        whole.speculation.add(part.speculation)
        whole.ngrams += part.ngrams
        whole.repeated_ngrams += part.repeated_ngrams
    return whole


def count_ngrams(tokens: Sequence[int], size: int = NGRAM) -> tuple[int, int]:
    """How many n-grams the tokens have, and how many of them occurred before in the same
    tokens: where text loops, acceptance says little."""
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
