"""Certificates of exactness: speculative decoding against plain decoding, prompt by prompt.

Every prompt is decoded plainly (``none``) and with the speculative methods, through one engine. Where the tokens
differ, teacher forcing computes which of the two tokens the target would choose. The difference is a *near tie* if
the scores of the two tokens lie within the numerical band of the target's logits, and *structural* otherwise. The
band is measured: it is twice the largest difference between the log-probabilities that plain decoding reported and
the teacher's. Under ``numerics: strict`` even a near tie is a failure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ...config.sections import Config
from ...errors import RequestError
from ...request.methods import METHODS, WITH_DRAFT, Method
from ...request.output import RequestOutput, SpeculationRecord
from ...request.sampling_params import SamplingParams, completion_seed
from ..measure.compare import BASELINE, REFERENCE, first_difference, versions
from ..measure.prompts import Prompt

if TYPE_CHECKING:
    from ...engine.llm import LLM
    from .teacher import Teacher

LOGPROBS = 4
"""Tokens per row whose log-probabilities are compared, besides the chosen one."""
MEASURED = 8
"""Outputs of plain decoding the band is measured on, besides those from which a method differed."""
PORTION = 4
"""Batches decoded plainly before the other methods decode the same prompts."""
CONTEXT_TOKENS = 24
"""Tokens before a divergence that are reported."""

Kind = Literal["near_tie", "structural"]
Progress = Callable[[int, int], None]
"""Called with the number of prompts done and the total."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A request to certify. Its ``method`` is ignored."""

    name: str
    prompt: str | tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """The first place where a method's output differs from plain decoding's."""

    trial: str
    method: Method
    temperature: float
    seed: int
    kind: Kind
    position: int
    """Index among the generated tokens."""
    context: str
    """The last tokens before it, as text."""
    tokens: tuple[int | None, int | None]
    """Plain decoding's and the method's token; None: the output ended."""
    texts: tuple[str, str]
    scores: tuple[float, float] | None
    """The teacher's scores of both, with the request's noise. None: an output ended, so there was no choice."""
    gap: float | None
    band: float | None


@dataclass(kw_only=True, slots=True)
class Group:
    """Counts of one method at one temperature."""

    method: Method
    temperature: float
    outputs: int = 0
    equal: int = 0
    near_ties: int = 0
    structural: int = 0
    tokens: int = 0
    """Tokens compared, as plain decoding generated them."""
    largest_difference: float = 0.0
    """Largest difference between log-probabilities of the same row, up to the first divergence; 0: identical."""
    record: SpeculationRecord = field(default_factory=SpeculationRecord)


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """What :func:`certify` returns."""

    config: Config
    groups: tuple[Group, ...]
    divergences: tuple[Divergence, ...]
    noise: float | None
    """Largest difference between plain decoding's and the teacher's log-probabilities; None: nothing differed, so it
    was not measured."""
    degraded: str | None
    """Why the draft was lost, if it was: everything after that was plain decoding."""

    @property
    def faults(self) -> list[str]:
        """The reasons for which the certificate is refused; empty if it passed."""
        found = []
        structural = sum(group.structural for group in self.groups)
        ties = sum(group.near_ties for group in self.groups)
        if structural:
            found.append(f"{structural} structural divergence{'s' * (structural > 1)}")
        if ties and self.config.numerics == "strict":
            found.append(f"{ties} near tie{'s' * (ties > 1)}, which numerics: strict rules out")
        if self.degraded:
            found.append(f"the draft was lost ({' '.join(self.degraded.split())})")
        found += [
            f"{group.method} at temperature {group.temperature:g} verified no draft token"
            for group in self.groups
            if not group.record.drafted
        ]
        return found

    @property
    def passed(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """Returns the certificate, ready for :func:`json.dumps`."""
        return {
            "passed": self.passed,
            "faults": self.faults,
            "numerics": self.config.numerics,
            "groups": [asdict(group) for group in self.groups],
            "divergences": [asdict(divergence) for divergence in self.divergences],
            "noise": self.noise,
            "band": None if self.noise is None else 2 * self.noise,
            "config": self.config.model_dump(),
            "versions": versions(),
        }


def trials(prompts: Sequence[Prompt], temperatures: Sequence[float], *, seed: int = 0, **params: Any) -> list[Trial]:
    """Returns a trial for each prompt at each temperature.

    Args:
        seed: each prompt's own seed is derived from it.
        params: further fields of ``SamplingParams``.
    """
    return [
        Trial(
            name=prompt.name,
            prompt=prompt.text,
            params=SamplingParams(temperature=temperature, seed=completion_seed(seed, index), **params),
        )
        for temperature in temperatures
        for index, prompt in enumerate(prompts)
    ]


def speculative(methods: Sequence[str]) -> tuple[Method, ...]:
    """Returns the methods that speculate. Raises RequestError if one is unknown, or none speculates."""
    for method in methods:
        if method not in METHODS or method == BASELINE:
            known = ", ".join(name for name in METHODS if name != BASELINE)
            raise RequestError(f"method {method!r} cannot be certified; methods are {known}")
    chosen: tuple[Method, ...] = tuple(m for m in METHODS if m in methods and m != REFERENCE)
    if not chosen:
        raise RequestError("there is nothing to certify: name a speculative method, for example --methods sd,ssd")
    return chosen


def check_promise(config: Config, temperatures: Sequence[float]) -> None:
    """Raises RequestError if the verification rule does not promise plain decoding's tokens at a temperature."""
    from ...decoding.sampling import GREEDY_BELOW

    hot = [temperature for temperature in temperatures if temperature >= GREEDY_BELOW]
    if config.speculation.verify != "coupled" and hot:
        raise RequestError(
            f"speculation.verify={config.speculation.verify} keeps plain decoding's distribution, not its tokens, at "
            f"temperature {hot[0]:g}, so tokens cannot be certified (docs/verification.md tells how the distribution "
            "is checked); certify at temperature 0, or use speculation.verify=coupled"
        )


@dataclass(kw_only=True, slots=True)
class Decoded:
    """What :func:`decode` returns: counts of equal outputs, and the others for :func:`judge`."""

    config: Config
    groups: dict[tuple[Method, float], Group] = field(default_factory=dict)
    departed: list[_Departure] = field(default_factory=list)
    sample: list[RequestOutput] = field(default_factory=list)
    """Outputs of plain decoding the band is measured on."""
    degraded: str | None = None

    def add(self, trial: Trial, method: Method, output: RequestOutput, reference: RequestOutput) -> None:
        """Counts an output, and keeps it if it differs from the reference."""
        key = method, trial.params.temperature
        group = self.groups.setdefault(key, Group(method=method, temperature=trial.params.temperature))
        if _count(group, output, reference):
            self.departed.append(_Departure(trial, method, output, reference))


def certify(
    llm: LLM, asked: Sequence[Trial], methods: Sequence[str] = WITH_DRAFT, *, progress: Progress | None = None
) -> Certificate:
    """Runs :func:`decode`, then :func:`judge`; the target is in memory twice if outputs differ."""
    return judge(decode(llm, asked, methods, progress=progress))


def decode(
    llm: LLM, asked: Sequence[Trial], methods: Sequence[str] = WITH_DRAFT, *, progress: Progress | None = None
) -> Decoded:
    """Decodes every trial plainly and with each method.

    Trials are decoded in portions of a few batches: first plainly, then with all methods at once, so that methods
    share batches and requests start while others run.

    Raises:
        RequestError: there is nothing to certify, or equal tokens are not promised (``check_promise``).
    """
    chosen = speculative(methods)
    if not asked:
        raise RequestError("there are no prompts to certify")
    check_promise(llm.config, [trial.params.temperature for trial in asked])
    found = Decoded(config=llm.config)
    size, done = PORTION * llm.config.engine.max_batch, 0
    for portion in (asked[start : start + size] for start in range(0, len(asked), size)):
        plain = [outputs[REFERENCE] for outputs in _run(llm, portion, (REFERENCE,))]
        for trial, reference, outputs in zip(portion, plain, _run(llm, portion, chosen), strict=True):
            for method, output in outputs.items():
                found.add(trial, method, output, reference)
        found.sample += plain[: MEASURED - len(found.sample)]
        done += len(portion)
        if progress is not None:
            progress(done, len(asked))
    found.degraded = llm.degraded
    return found


def judge(found: Decoded) -> Certificate:
    """Classifies the outputs that differ. The teacher is loaded only if there are any."""
    noise, divergences = None, []
    if found.departed:
        from .teacher import Teacher  # imports torch and transformers, which are not needed if all is equal

        teacher = Teacher(found.config)
        measured = [*found.sample, *(departure.reference for departure in found.departed[:MEASURED])]
        noise = max(teacher.noise_of(output) for output in measured)
        divergences = [_classified(teacher, 2 * noise, departure) for departure in found.departed]
    kinds = Counter((one.method, one.temperature, one.kind) for one in divergences)
    groups = [
        replace(group, near_ties=kinds[*key, "near_tie"], structural=kinds[*key, "structural"])
        for key, group in sorted(found.groups.items(), key=lambda item: (item[0][1], METHODS.index(item[0][0])))
    ]
    return Certificate(
        config=found.config,
        groups=tuple(groups),
        divergences=tuple(divergences),
        noise=noise,
        degraded=found.degraded,
    )


class _Departure(NamedTuple):
    trial: Trial
    method: Method
    output: RequestOutput
    reference: RequestOutput


def _run(llm: LLM, portion: Sequence[Trial], methods: Sequence[Method]) -> list[dict[Method, RequestOutput]]:
    """Returns the outputs of every trial by method; all requests run at the same time."""
    params = [replace(trial.params, method=m, logprobs=LOGPROBS) for trial in portion for m in methods]
    prompts: Any = [trial.prompt for trial in portion for _ in methods]
    outputs = llm.generate(prompts, params)
    return [
        dict(zip(methods, outputs[at : at + len(methods)], strict=True)) for at in range(0, len(outputs), len(methods))
    ]


def _count(group: Group, output: RequestOutput, reference: RequestOutput) -> bool:
    """Counts one output; returns whether it differs from the reference."""
    same = (output.token_ids, output.text, output.finish_reason) == (
        reference.token_ids,
        reference.text,
        reference.finish_reason,
    )
    group.outputs += 1
    group.equal += same
    group.tokens += len(reference.token_ids)
    group.record.add(output.speculation)
    # The row with the first different token still has the same prefix.
    rows = first_difference(output.token_ids, reference.token_ids)
    for one, other in list(zip(output.logprobs or (), reference.logprobs or (), strict=False))[: rows and rows + 1]:
        theirs = {other.token_id: other.logprob, **dict(other.top)}
        for token, value in ((one.token_id, one.logprob), *one.top):
            difference = abs(value - theirs.get(token, value))
            group.largest_difference = max(group.largest_difference, difference)
    return not same


def _classified(teacher: Teacher, band: float, departure: _Departure) -> Divergence:
    tokenizer = teacher.tokenizer
    trial, method, output, reference = departure
    position = first_difference(output.token_ids, reference.token_ids)
    position = len(output.token_ids) if position is None else position
    common = reference.token_ids[:position]
    pair = tuple(ids[position] if position < len(ids) else None for ids in (reference.token_ids, output.token_ids))
    forced = None
    if pair[0] is not None and pair[1] is not None:
        forced = teacher.force(reference.prompt_token_ids, common, trial.params, (pair[0], pair[1]), band)
    return Divergence(
        trial=trial.name,
        method=method,
        temperature=trial.params.temperature,
        seed=trial.params.seed,
        kind="near_tie" if forced is not None and forced.within else "structural",
        position=position,
        context=tokenizer.decode([*reference.prompt_token_ids, *common][-CONTEXT_TOKENS:]),
        tokens=(pair[0], pair[1]),
        texts=tuple("" if token is None else tokenizer.decode([token]) for token in pair),  # type: ignore[arg-type]
        scores=None if forced is None else forced.scores,
        gap=None if forced is None else forced.gap,
        band=None if forced is None else band,
    )
