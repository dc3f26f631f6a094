"""Run the methods side by side on the same prompts.

Every prompt is run by every method before the next prompt, one request at a time, so that a
machine that slows down slows all methods alike. ``none`` (plain decoding, strict numerics)
defines the tokens; ``none_fast`` (plain decoding, one row, unpadded) is the speed to beat.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from statistics import median
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import RequestError
from ..params import METHODS, Method, RequestOutput, SamplingParams, SpeculationRecord
from .prompts import Prompt

if TYPE_CHECKING:
    from ..engine.llm import LLM

BASELINE: Method = "none_fast"
REFERENCE: Method = "none"
TIMINGS = ("round_ms", "hit_round_ms", "forward_ms", "draft_ms")
PACKAGES = ("torch", "transformers", "ray", "pyzmq")
NGRAM = 8

Progress = Callable[[int, int, str], None]
"""Called with the requests done, the requests in all, and what runs next."""


@dataclass(kw_only=True, slots=True)
class Tally:
    """What one method did in one repeat, over some prompts."""

    tokens: int = 0
    decode_s: float = 0.0
    speculation: SpeculationRecord = field(default_factory=SpeculationRecord)
    ngrams: int = 0
    repeated_ngrams: int = 0

    def add(self, output: RequestOutput) -> None:
        self.tokens += len(output.token_ids)
        self.decode_s += output.decode_s
        self.speculation.add(output.speculation)
        ngrams, repeated = count_ngrams(output.token_ids)
        self.ngrams += ngrams
        self.repeated_ngrams += repeated

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.decode_s if self.decode_s > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """A method's tokens differed from plain decoding's."""

    method: str
    prompt: str
    repeat: int
    position: int
    """Index of the first token that differs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What :func:`compare` measured."""

    prompts: tuple[Prompt, ...]
    methods: tuple[Method, ...]
    seed: int
    temperature: float
    lookahead: int
    references: dict[str, RequestOutput]
    """Plain decoding's output, by prompt name."""
    tallies: dict[tuple[str, str], list[Tally]]
    """By method and category, one per repeat."""
    timings_ms: dict[str, dict[str, float | None]]
    """By method: medians over the requests."""
    mismatches: tuple[Mismatch, ...]
    verify: str = "coupled"
    """The verification rule."""

    @property
    def identity_promised(self) -> bool:
        """Whether the methods' tokens must be equal. ``rejection`` and ``block`` promise that at
        temperature 0 only: above it their tokens have plain decoding's law and are others."""
        from ..decoding.sampling import GREEDY_BELOW  # torch: only when it is there anyway

        return self.verify == "coupled" or self.temperature < GREEDY_BELOW

    def identical(self, method: str) -> bool:
        """Whether the method's tokens equal plain decoding's, for every prompt and repeat."""
        return all(mismatch.method != method for mismatch in self.mismatches)

    @property
    def identical_all(self) -> bool:
        """Whether all methods agree; ``none_fast``, which promises less, is not counted."""
        return all(self.identical(method) for method in self.methods if method != BASELINE)

    @property
    def categories(self) -> list[str]:
        return list(dict.fromkeys(prompt.category for prompt in self.prompts))

    def repeats(self, method: str, category: str | None = None) -> list[Tally]:
        """The method's tallies, one per repeat: of one category, or of all together."""
        if category is not None:
            return self.tallies[method, category]
        return [_merge(parts) for parts in zip(*(self.tallies[method, c] for c in self.categories), strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Numbers only, ready for :func:`json.dumps`. ``tokens`` counts what plain decoding
        generated over all prompts; counts and times are medians over the repeats."""
        return {
            "identical_all": self.identical_all,
            "identity_promised": self.identity_promised,
            "verify": self.verify,
            "prompts": len(self.prompts),
            "tokens": sum(len(output.token_ids) for output in self.references.values()),
            "seed": self.seed,
            "temperature": self.temperature,
            "lookahead": self.lookahead,
            "versions": versions(),
            "methods": {method: self._method(method) for method in self.methods},
        }

    def _method(self, method: Method) -> dict[str, Any]:
        rates = self._rates(method)
        return {
            "tokens_per_second": rates.pop("tokens_per_second"),
            "speedup": rates.pop("speedup"),
            "identical": self.identical(method),
            **rates,
            "rounds": _median(tally.speculation.rounds for tally in self.repeats(method)),
            **self.timings_ms[method],
            "categories": {category: self._rates(method, category) for category in self.categories},
        }

    def _rates(self, method: str, category: str | None = None) -> dict[str, float | None]:
        tallies, baseline = self.repeats(method, category), self.repeats(BASELINE, category)
        pairs = zip(tallies, baseline, strict=True)
        return {
            "tokens_per_second": _median(tally.tokens_per_second for tally in tallies),
            "speedup": _median(_ratio(tally.tokens_per_second, base.tokens_per_second) for tally, base in pairs),
            "acceptance_rate": _median(tally.speculation.acceptance_rate for tally in tallies),
            "acceptance_length": _median(tally.speculation.acceptance_length for tally in tallies),
            "hit_rate": _median(tally.speculation.hit_rate for tally in tallies),
            "repeated_8gram_share": _median(_ratio(tally.repeated_ngrams, tally.ngrams) for tally in tallies),
        }


def compare(
    llm: LLM,
    prompts: Sequence[Prompt],
    *,
    methods: Sequence[str] = ("none", "sd", "ssd"),
    temperature: float = 0.0,
    seed: int = 0,
    max_tokens: int = 128,
    repeat: int = 1,
    warmup_tokens: int = 16,
    progress: Progress | None = None,
) -> Comparison:
    """Run each prompt with each method, ``repeat`` times, and compare tokens and speed.

    ``none_fast`` and ``none`` always run. The order of the methods rotates from repeat to
    repeat. Before measuring, each method generates ``warmup_tokens`` that do not count.

    Raises:
        RequestError: an unknown method, no prompts, or a prompt the model cannot take.
    """
    order = _order(methods)
    if not prompts:
        raise RequestError("there are no prompts to compare on")
    if len({prompt.name for prompt in prompts}) < len(prompts):
        raise RequestError("the prompts' names must differ")
    if repeat < 1:
        raise RequestError("repeat must be an integer >= 1")

    def request(prompt: Prompt, method: Method, tokens: int) -> RequestOutput:
        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=tokens, ignore_eos=True, method=method)
        return llm.generate([prompt.text], params)[0]

    total = len(prompts) * len(order) * repeat
    report = progress or (lambda done, total, label: None)
    if warmup_tokens:
        for method in order:
            report(0, total, f"warming up {method}")
            request(prompts[0], method, min(warmup_tokens, max_tokens))
        llm.timings(reset=True)

    tallies: dict[tuple[str, str], list[Tally]] = defaultdict(lambda: [Tally() for _ in range(repeat)])
    samples: dict[tuple[str, str], list[float | None]] = defaultdict(list)
    outputs: dict[tuple[str, int, str], RequestOutput] = {}
    for turn in range(repeat):
        shift = turn % len(order)
        for prompt in prompts:
            for method in order[shift:] + order[:shift]:
                report(len(outputs), total, f"{prompt.name} {method}")
                output = request(prompt, method, max_tokens)
                for name, value in llm.timings(reset=True).items():
                    samples[method, name].append(value)
                tallies[method, prompt.category][turn].add(output)
                outputs[method, turn, prompt.name] = output
    report(total, total, "done")

    references = {prompt.name: outputs[REFERENCE, 0, prompt.name] for prompt in prompts}
    return Comparison(
        prompts=tuple(prompts),
        methods=order,
        seed=seed,
        temperature=temperature,
        lookahead=llm.config.speculation.lookahead,
        verify=llm.config.speculation.verify,
        references=references,
        tallies=dict(tallies),
        timings_ms={method: {name: _median(samples[method, name]) for name in TIMINGS} for method in order},
        mismatches=tuple(
            Mismatch(method=method, prompt=name, repeat=turn, position=position)
            for (method, turn, name), output in outputs.items()
            if (position := first_difference(output.token_ids, references[name].token_ids)) is not None
        ),
    )


def first_difference(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """Index of the first token that differs; a missing token differs; None if all are equal."""
    for position, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            return position
    return None if len(tokens) == len(others) else min(len(tokens), len(others))


def count_ngrams(tokens: Sequence[int], size: int = NGRAM) -> tuple[int, int]:
    """How many n-grams the tokens have, and how many of them occurred before in the same
    tokens: where text loops, acceptance says little."""
    seen: set[tuple[int, ...]] = set()
    total = max(len(tokens) - size + 1, 0)
    for start in range(total):
        seen.add(tuple(tokens[start : start + size]))
    return total, total - len(seen)


def versions() -> dict[str, str | None]:
    """Versions of Python, this package and what it stands on; none where not installed."""
    found: dict[str, str | None] = {"python": python_version(), "ssd": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def parse_methods(names: str) -> tuple[str, ...]:
    """``"none, sd"`` as names, checked.

    Raises:
        RequestError: an unknown method.
    """
    methods = tuple(name.strip() for name in names.split(",") if name.strip())
    _order(methods)
    return methods


def _order(methods: Sequence[str]) -> tuple[Method, ...]:
    """The baseline, the reference, then the methods asked for."""
    for method in methods:
        if method not in METHODS:
            raise RequestError(f"method {method!r} is unknown; methods are {', '.join(METHODS)}")
    speculative: tuple[Method, ...] = ("sd", "ssd")
    return (BASELINE, REFERENCE, *(method for method in speculative if method in methods))


def _merge(parts: Iterable[Tally]) -> Tally:
    whole = Tally()
    for part in parts:
        whole.tokens += part.tokens
        whole.decode_s += part.decode_s
        whole.speculation.add(part.speculation)
        whole.ngrams += part.ngrams
        whole.repeated_ngrams += part.repeated_ngrams
    return whole


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _median(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return median(present) if present else None
