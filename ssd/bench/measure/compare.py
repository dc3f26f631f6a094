"""Comparing methods on the same prompts: their tokens and their speed.

``none`` (plain decoding, strict numerics) defines the tokens; ``none_fast`` (plain decoding, one row, unpadded) is
the baseline of speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from statistics import median
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...config.load import load_config
from ...config.sections import Config
from ...errors import RequestError
from ...request.methods import DRAFTING, METHODS, WITH_DRAFT, Method
from ...request.output import RequestOutput
from .interleave import Arm, MethodArm, Progress, Runs, Tally, interleave, merge
from .prompts import Prompt

if TYPE_CHECKING:
    from ...engine.llm import LLM

BASELINE: Method = "none_fast"
REFERENCE: Method = "none"
TIMINGS = ("round_ms", "hit_round_ms", "forward_ms", "draft_ms")
PACKAGES = ("torch", "transformers", "ray", "pyzmq")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """An output whose tokens differ from plain decoding's."""

    method: str
    prompt: str
    repeat: int
    position: int
    """Index of the first token that differs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What :func:`compare` returns."""

    prompts: tuple[Prompt, ...]
    methods: tuple[str, ...]
    """Names of the methods and peers, in the order of the report."""
    runs: Runs
    lookahead: int | str
    references: dict[str, RequestOutput]
    """Plain decoding's output, by prompt name."""
    tallies: dict[tuple[str, str], list[Tally]]
    """By method and category: one for each repeat."""
    timings_ms: dict[str, dict[str, float | None]]
    """By method: medians over the requests, in ms."""
    mismatches: tuple[Mismatch, ...]
    verify: str = "coupled"
    """The verification rule, ``speculation.verify``."""
    peers: tuple[str, ...] = ()
    """The ``methods`` that are other programs, whose tokens may differ."""

    @property
    def identity_promised(self) -> bool:
        """Whether the methods' tokens must be equal. ``rejection`` and ``block`` promise that at temperature 0 only;
        above it their tokens differ but have the same distribution."""
        from ...decoding.sampling import GREEDY_BELOW  # imports torch, which importing this module must not

        return self.verify == "coupled" or self.runs.temperature < GREEDY_BELOW

    def identical(self, method: str) -> bool:
        """Returns whether the method's tokens equal plain decoding's, for every prompt and repeat."""
        return all(mismatch.method != method for mismatch in self.mismatches)

    @property
    def identical_all(self) -> bool:
        """Whether all methods agree. ``none_fast`` and peers do not count: they promise less."""
        return all(self.identical(method) for method in self.methods if self.counts(method))

    def counts(self, method: str) -> bool:
        """Returns whether the method's tokens must equal plain decoding's."""
        return method != BASELINE and method not in self.peers

    @property
    def categories(self) -> list[str]:
        return list(dict.fromkeys(prompt.category for prompt in self.prompts))

    def repeats(self, method: str, category: str | None = None) -> list[Tally]:
        """Returns the method's tallies, one for each repeat: of one category, or of all."""
        if category is not None:
            return self.tallies[method, category]
        return [merge(parts) for parts in zip(*(self.tallies[method, c] for c in self.categories), strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Returns the figures, ready for :func:`json.dumps`.

        ``tokens`` is what plain decoding generated over all prompts. Counts and times are medians over the repeats;
        the histogram of accepted draft tokens is a sum over them.
        """
        return {
            "identical_all": self.identical_all,
            "identity_promised": self.identity_promised,
            "verify": self.verify,
            "prompts": len(self.prompts),
            "tokens": sum(len(output.token_ids) for output in self.references.values()),
            "seed": self.runs.seed,
            "temperature": self.runs.temperature,
            "lookahead": self.lookahead,
            "batch": self.runs.batch,
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
    runs: Runs,
    *,
    methods: Sequence[str] = ("none", *WITH_DRAFT),
    beside: Sequence[Arm] = (),
    peers: Sequence[Arm] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Runs each prompt with each method and peer, in turns, and compares tokens and speed.

    Args:
        methods: ``none_fast`` and ``none`` always run, named here or not.
        beside: other pipelines of the same models; their tokens must be the same.
        peers: other programs; their tokens may differ.

    Raises:
        RequestError: an unknown method, no prompts, or a prompt the model cannot take.
    """
    order = _order(methods)
    if not prompts:
        raise RequestError("there are no prompts to compare on")
    if len({prompt.name for prompt in prompts}) < len(prompts):
        raise RequestError("the prompts' names must differ")
    arms: list[Arm] = [*(MethodArm(llm, method) for method in order), *beside, *peers]
    found = interleave(arms, prompts, runs, progress=progress)
    names = tuple(arm.name for arm in arms)
    references = {prompt.name: found.outputs[REFERENCE, 0, prompt.name] for prompt in prompts}
    return Comparison(
        prompts=tuple(prompts),
        methods=names,
        peers=tuple(arm.name for arm in peers),
        runs=runs,
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
    """Returns the index of the first token that differs or is missing in one of them; None if they are equal."""
    for position, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            return position
    return None if len(tokens) == len(others) else min(len(tokens), len(others))


def versions() -> dict[str, str | None]:
    """Returns the versions of Python, this package and its main dependencies; None for one that is not installed."""
    found: dict[str, str | None] = {"python": python_version(), "ssd": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def parse_methods(names: str) -> tuple[str, ...]:
    """Splits ``"none, sd"`` into method names.

    Raises:
        RequestError: an unknown method.
    """
    methods = tuple(name.strip() for name in names.split(",") if name.strip())
    _order(methods)
    return methods


def prepared(config: Config, methods: Sequence[str]) -> Config:
    """Returns the configuration with the sections the methods need: ``self`` gets the default self-draft if none is
    configured."""
    needs = "self" in methods and config.speculation.self_draft is None
    return load_config(config, ["speculation.self={}"]) if needs else config


def _order(methods: Sequence[str]) -> tuple[Method, ...]:
    """Returns the baseline, the reference, then the requested methods."""
    for method in methods:
        if method not in METHODS:
            raise RequestError(f"method {method!r} is unknown; methods are {', '.join(METHODS)}")
    return (BASELINE, REFERENCE, *(method for method in DRAFTING if method in methods))


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _median(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return median(present) if present else None
