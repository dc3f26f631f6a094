"""Run the methods side by side on the same prompts.

Methods take turns prompt by prompt, one request (or batch) at a time. ``none`` (plain decoding, strict numerics)
defines the tokens; ``none_fast`` (plain decoding, one row, unpadded) is the speed to beat.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from statistics import median
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...config.load import Config, load_config
from ...errors import RequestError
from ...request.methods import METHODS, Method
from ...request.output import RequestOutput
from ...request.sampling_params import SamplingParams
from .arms import Arm, MethodArm, Progress, Tally, interleave, merge
from .prompts import Prompt

if TYPE_CHECKING:
    from ...engine.llm import LLM

BASELINE: Method = "none_fast"
REFERENCE: Method = "none"
TIMINGS = ("round_ms", "hit_round_ms", "forward_ms", "draft_ms")
PACKAGES = ("torch", "transformers", "ray", "pyzmq")


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
    methods: tuple[str, ...]
    """And peers, by name."""
    seed: int
    temperature: float
    lookahead: int | str
    references: dict[str, RequestOutput]
    """Plain decoding's output, by prompt name."""
    tallies: dict[tuple[str, str], list[Tally]]
    """By method and category, one per repeat."""
    timings_ms: dict[str, dict[str, float | None]]
    """By method: medians over the requests."""
    mismatches: tuple[Mismatch, ...]
    verify: str = "coupled"
    """The verification rule."""
    peers: tuple[str, ...] = ()
    """Those of ``methods`` that are other programs: nothing is promised of their tokens."""
    batch: int = 1
    """Prompts run together."""

    @property
    def identity_promised(self) -> bool:
        """Whether the methods' tokens must be equal. ``rejection`` and ``block`` promise that at
        temperature 0 only: above it their tokens have plain decoding's law and are others."""
        from ...decoding.sampling import GREEDY_BELOW  # torch: only when it is there anyway

        return self.verify == "coupled" or self.temperature < GREEDY_BELOW

    def identical(self, method: str) -> bool:
        """Whether the method's tokens equal plain decoding's, for every prompt and repeat."""
        return all(mismatch.method != method for mismatch in self.mismatches)

    @property
    def identical_all(self) -> bool:
        """Whether all methods agree; ``none_fast`` and peers, which promise less, are not counted."""
        return all(self.identical(method) for method in self.methods if self.counts(method))

    def counts(self, method: str) -> bool:
        """Whether the method's tokens must be plain decoding's."""
        return method != BASELINE and method not in self.peers

    @property
    def categories(self) -> list[str]:
        return list(dict.fromkeys(prompt.category for prompt in self.prompts))

    def repeats(self, method: str, category: str | None = None) -> list[Tally]:
        """The method's tallies, one per repeat: of one category, or of all together."""
        if category is not None:
            return self.tallies[method, category]
        return [merge(parts) for parts in zip(*(self.tallies[method, c] for c in self.categories), strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Numbers only, ready for :func:`json.dumps`. ``tokens`` counts what plain decoding
        generated over all prompts; counts and times are medians over the repeats, the histogram of
        accepted draft tokens is their sum."""
        return {
            "identical_all": self.identical_all,
            "identity_promised": self.identity_promised,
            "verify": self.verify,
            "prompts": len(self.prompts),
            "tokens": sum(len(output.token_ids) for output in self.references.values()),
            "seed": self.seed,
            "temperature": self.temperature,
            "lookahead": self.lookahead,
            "batch": self.batch,
            "versions": versions(),
            "methods": {method: self._method(method) for method in self.methods},
        }

    def _method(self, method: str) -> dict[str, Any]:
        rates = self._rates(method)
        return {
            "tokens_per_second": rates.pop("tokens_per_second"),
            "speedup": rates.pop("speedup"),
            "identical": self.identical(method),
            **rates,
            "rounds": _median(tally.speculation.rounds for tally in self.repeats(method)),
            "accepted_histogram": merge(self.repeats(method)).speculation.accepted_histogram,
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
    batch: int = 1,
    beside: Sequence[Arm] = (),
    peers: Sequence[Arm] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Run each prompt with each method and peer, ``repeat`` times, and compare tokens and speed.

    ``none_fast`` and ``none`` always run. ``beside``: other pipelines of the same models, whose tokens must be the
    same. How turns are taken: :func:`ssd.bench.measure.arms.interleave`.

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

    arms: list[Arm] = [*(MethodArm(llm, method) for method in order), *beside, *peers]
    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens, ignore_eos=True)
    found = interleave(
        arms, prompts, params, repeat=repeat, warmup_tokens=warmup_tokens, batch=batch, progress=progress
    )
    names = tuple(arm.name for arm in arms)
    references = {prompt.name: found.outputs[REFERENCE, 0, prompt.name] for prompt in prompts}
    return Comparison(
        prompts=tuple(prompts),
        methods=names,
        peers=tuple(arm.name for arm in peers),
        batch=batch,
        seed=seed,
        temperature=temperature,
        lookahead=llm.config.speculation.lookahead,
        verify=llm.config.speculation.verify,
        references=references,
        tallies=dict(found.tallies),
        timings_ms={arm: {name: _median(found.samples[arm, name]) for name in TIMINGS} for arm in names},
        mismatches=tuple(
            Mismatch(method=method, prompt=name, repeat=turn, position=position)
            for (method, turn, name), output in found.outputs.items()
            if (position := first_difference(output.token_ids, references[name].token_ids)) is not None
        ),
    )


def first_difference(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """Index of the first token that differs; a missing token differs; None if all are equal."""
    for position, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            return position
    return None if len(tokens) == len(others) else min(len(tokens), len(others))


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


def prepared(config: Config, methods: Sequence[str]) -> Config:
    """The configuration with what the methods need: for ``self`` a draft within the target, the default one where
    none is configured."""
    needs = "self" in methods and config.speculation.self_draft is None
    return load_config(config, ["speculation.self={}"]) if needs else config


def _order(methods: Sequence[str]) -> tuple[Method, ...]:
    """The baseline, the reference, then the methods asked for."""
    for method in methods:
        if method not in METHODS:
            raise RequestError(f"method {method!r} is unknown; methods are {', '.join(METHODS)}")
    speculative: tuple[Method, ...] = ("self", "sd", "ssd")
    return (BASELINE, REFERENCE, *(method for method in speculative if method in methods))


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _median(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return median(present) if present else None
