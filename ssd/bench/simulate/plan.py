"""What to run, by simulation: lookahead, budget, rows, devices, batch; and how far the simulator
is from what real pipelines do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...config.load import Config, load_config
from ...request.sampling_params import SamplingParams
from ..measure.arms import MethodArm, interleave, merge
from ..measure.prompts import Prompt
from .calibrate import ROWS, Size
from .profile import Profile, hit_curve, survival
from .replay import BUDGETS
from .simulator import Modelled, Setting, Simulated, Simulator, simulate

if TYPE_CHECKING:
    from ...engine.llm import LLM

DEVICES = (2, 3, 4, 5, 8, 9)
BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """What is searched. Trees the profile does not know are left out."""

    lookaheads: Sequence[int] = tuple(range(1, 9))
    budgets: Sequence[int] = BUDGETS
    rows: Sequence[int] = ROWS
    """Budgets of combs, beside the chains."""

    def settings(self, profile: Profile, around: Setting) -> Iterable[Setting]:
        known = set(profile.at(around.temperature)[1].trees)
        for depth in self.lookaheads:
            for rows in sorted({depth + 1, *self.rows}):
                if (depth, rows) not in known:
                    continue
                at = replace(around, lookahead=depth, rows=rows)
                budgets = self.budgets if at.method == "ssd" else (1,)
                yield from (replace(at, budget=budget) for budget in budgets)


def ranked(simulator: Simulator, around: Setting, space: Space = Space(), *, tokens: int = 2000) -> list[Simulated]:
    """Every setting of the space, the fastest first. What is not searched is taken from ``around``."""
    found = [simulator.run(setting, tokens=tokens) for setting in space.settings(simulator.profile, around)]
    return sorted(found, key=lambda one: -one.tokens_per_second)


def advise(profile: Profile, temperature: float, space: Space = Space()) -> dict[str, Any]:
    """The answers of ``ssd plan`` at one temperature, ready for JSON."""
    around, simulator = Setting(temperature=temperature), Simulator(profile)
    by_method = {method: ranked(simulator, replace(around, method=method), space) for method in ("sd", "ssd")}
    best = by_method["ssd"][0]
    plain = simulator.run(replace(around, method="none_fast"))
    content = profile.at(temperature)[1]
    at = best.setting
    return {
        "temperature": temperature,
        "none_fast": figures(plain),
        "sd": figures(by_method["sd"][0]),
        "ssd": figures(best),
        "best": [figures(one) for one in by_method["ssd"][:5]],
        "by_lookahead": {
            method: {
                str(depth): max(
                    (one.tokens_per_second for one in found if one.setting.lookahead == depth), default=None
                )
                for depth in space.lookaheads
            }
            for method, found in by_method.items()
        },
        "acceptance_by_position": survival(content, at.lookahead, at.tree_rows),
        "hit_rate_by_budget": dict(
            zip(map(str, BUDGETS), hit_curve(content, at.lookahead, at.tree_rows, list(BUDGETS)), strict=True)
        ),
        "batch": {str(batch): _batch(simulator, around, space, batch) for batch in BATCHES},
        "devices": {str(count): _shares(simulator, around, space, count) for count in DEVICES},
    }


def figures(one: Simulated) -> dict[str, Any]:
    """A simulation as numbers."""
    return {
        "setting": asdict(one.setting),
        "tokens_per_second": one.tokens_per_second,
        "acceptance_length": one.acceptance_length,
        "hit_rate": one.hit_rate,
        "round_ms": 1e3 * one.seconds / one.count,
        "verifier_busy": one.verifier_busy_s / one.seconds,
        "draft_busy": one.draft_busy_s / one.seconds,
    }


def _batch(simulator: Simulator, around: Setting, space: Space, batch: int) -> dict[str, Any]:
    """Each method at its best with so many sequences."""
    found = {
        method: ranked(simulator, replace(around, method=method, batch=batch), space)[0] for method in ("sd", "ssd")
    }
    plain = simulator.run(replace(around, method="none_fast", batch=batch))
    return {"none_fast": figures(plain), **{method: figures(one) for method, one in found.items()}}


def _shares(simulator: Simulator, around: Setting, space: Space, devices: int) -> list[dict[str, Any]]:
    """Every way to deal devices to target and draft, best first: is one more worth more as draft or
    as tensor parallelism? The target's share is a power of two, as tensor parallelism wants it.
    ``sd`` and plain decoding with all of them for the target stand beside it."""
    found: list[Simulated] = []
    for target in (1, 2, 4, 8):
        if target < devices:
            shares = replace(around, target_devices=target, draft_devices=devices - target)
            found.append(ranked(simulator, shares, space)[0])
        if target <= devices:
            # sd's draft works only while the target waits: it needs no device of its own.
            for method in ("sd", "none_fast"):
                alone = replace(around, method=method, target_devices=target)
                found.append(ranked(simulator, alone, space)[0] if method == "sd" else simulator.run(alone))
    return [figures(one) for one in sorted(found, key=lambda one: -one.tokens_per_second)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One setting, measured and simulated, in tokens per second."""

    setting: Setting
    measured: float
    simulated: float
    machine: float = 1.0
    """How fast the machine was against the profile's: plain decoding, measured in turns with the setting, over
    simulated. A shared host's speed changes within minutes."""

    @property
    def error(self) -> float:
        """Relative, of the simulation on a machine as fast."""
        return self.simulated * self.machine / self.measured - 1

    def to_json(self) -> dict[str, Any]:
        return {
            "setting": asdict(self.setting),
            "measured": self.measured,
            "simulated": self.simulated,
            "machine": self.machine,
            "error": self.error,
        }


VALIDATION = tuple(Size(lookahead=depth, budget=budget) for depth, budget in ((1, 8), (3, 16), (5, 8), (6, 24)))
"""With ``sd`` and ``ssd`` at two temperatures: 16 settings, none of those the costs were fitted to."""


def validate(
    profile: Profile,
    config: Config,
    prompts: Sequence[Prompt],
    *,
    sizes: Sequence[Size] = VALIDATION,
    temperatures: Sequence[float] = (0.0, 1.0),
    methods: Sequence[Modelled] = ("sd", "ssd"),
    max_tokens: int = 96,
    launch: Callable[[Config], LLM] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Check]:
    """Tokens per second of real runs (decoding only) and of their simulations, on the profile's
    prompts; plain decoding (``none_fast``) beside each."""
    from ...engine.llm import LLM

    checks = []
    for number, size in enumerate(sizes, start=1):
        say(f"start {number}/{len(sizes)}: lookahead {size.lookahead}, budget {size.budget}")
        with (launch or LLM)(load_config(config, size.overrides)) as llm:
            arms = [MethodArm(llm, method) for method in ("none_fast", *methods)]
            for temperature in temperatures:
                params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)
                found = interleave(arms, prompts, params, repeat=1, warmup_tokens=16, batch=size.batch)
                rates = {
                    arm.name: merge(t for (name, _), part in found.tallies.items() for t in part if name == arm.name)
                    for arm in arms
                }
                plain = Setting(method="none_fast", batch=size.batch, temperature=temperature)
                machine = (rates["none_fast"].tokens_per_second or 0.0) / simulate(profile, plain).tokens_per_second
                for method in methods:
                    whole = rates[method]
                    setting = Setting(
                        method=method,
                        lookahead=size.lookahead,
                        budget=size.budget,
                        rows=size.rows,
                        batch=size.batch,
                        temperature=temperature,
                        fallback="none" if config.speculation.fallback == "none" else "jit",
                    )
                    simulated = simulate(profile, setting, tokens=whole.tokens).tokens_per_second
                    measured = whole.tokens_per_second or 0.0
                    checks.append(Check(setting=setting, measured=measured, simulated=simulated, machine=machine))
    return checks


def mean_error(checks: Sequence[Check]) -> float:
    """Mean of the errors' sizes."""
    return fmean(abs(check.error) for check in checks)
