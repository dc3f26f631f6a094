"""Recommendations by simulation (lookahead, budget, rows, devices, batch), and the simulator's error against real
pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from ...config.load import load_config
from ...config.sections import Config
from ...request.methods import WITH_DRAFT, Modelled
from ..measure.interleave import Launch, MethodArm, Runs, interleave
from ..measure.prompts import Prompt
from .calibrate import ROWS, Size
from .cost import UNPRICED, Prices, cost, cost_figures, sources
from .profile import Profile, hit_curve, survival
from .replay import BUDGETS
from .simulator import Setting, Simulated, Simulator, simulate

DEVICES = (2, 3, 4, 5, 8, 9)
BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """The settings to search; trees the profile has not measured are left out."""

    lookaheads: Sequence[int] = tuple(range(1, 9))
    budgets: Sequence[int] = BUDGETS
    rows: Sequence[int] = ROWS
    """Rows W of combs, besides the chains."""

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
    """Simulates every setting of the space and returns the results, fastest first.

    Args:
        around: values of everything the space does not vary.
        tokens: length of each simulated run.
    """
    found = [simulator.run(setting, tokens=tokens) for setting in space.settings(simulator.profile, around)]
    return sorted(found, key=lambda one: -one.tokens_per_second)


def advise(
    profile: Profile, temperature: float, space: Space = Space(), *, prices: Prices = UNPRICED
) -> dict[str, Any]:
    """Returns the answers of ``ssd plan`` at one temperature, ready for JSON."""
    around, simulator = Setting(temperature=temperature), Simulator(profile)
    by_method = {method: ranked(simulator, replace(around, method=method), space) for method in WITH_DRAFT}
    best = by_method["ssd"][0]
    plain = simulator.run(replace(around, method="none_fast"))
    content = profile.at(temperature)[1]
    at = best.setting
    by_batch = {batch: _batch(simulator, around, space, batch) for batch in BATCHES}
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
        "batch": {
            str(batch): {method: figures(one) for method, one in found.items()} for batch, found in by_batch.items()
        },
        "cost": {
            "prices": {**asdict(prices), "assumed": list(prices.assumed)},
            "batch": {
                str(batch): {method: cost_figures(one, found["none_fast"], prices) for method, one in found.items()}
                for batch, found in by_batch.items()
            },
            "sources": sources(profile, temperature, prices),
        },
        "devices": {str(count): _shares(simulator, around, space, count) for count in DEVICES},
    }


def figures(one: Simulated) -> dict[str, Any]:
    """Returns the figures of a simulation, ready for JSON."""
    return {
        "setting": asdict(one.setting),
        "tokens_per_second": one.tokens_per_second,
        "acceptance_length": one.acceptance_length,
        "hit_rate": one.hit_rate,
        "round_ms": 1e3 * one.seconds / one.count,
        "verifier_busy": one.verifier_busy_s / one.seconds,
        "draft_busy": one.draft_busy_s / one.seconds,
    }


def _batch(simulator: Simulator, around: Setting, space: Space, batch: int) -> dict[str, Simulated]:
    """Returns each method's best setting for ``batch`` sequences."""
    found = {method: ranked(simulator, replace(around, method=method, batch=batch), space)[0] for method in WITH_DRAFT}
    plain = simulator.run(replace(around, method="none_fast", batch=batch))
    return {"none_fast": plain, **found}


def _shares(simulator: Simulator, around: Setting, space: Space, devices: int) -> list[dict[str, Any]]:
    """Returns the ways to divide devices between target and draft, best first.

    The target's share is a power of two, as tensor parallelism requires. ``sd`` and plain decoding, which need no
    device for the draft, are listed too.
    """
    found: list[Simulated] = []
    for target in (1, 2, 4, 8):
        if target < devices:
            shares = replace(around, target_devices=target, draft_devices=devices - target)
            found.append(ranked(simulator, shares, space)[0])
        if target <= devices:
            # The draft of sd works only while the target waits, so it can share the target's device.
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
    """Speed of the machine relative to the profile's: measured over simulated rate of plain decoding, which takes
    turns with the setting. The speed of a shared host changes within minutes."""

    @property
    def error(self) -> float:
        """Relative error of the simulated rate, corrected for the machine's speed."""
        return self.simulated * self.machine / self.measured - 1

    def to_json(self) -> dict[str, Any]:
        return {
            "setting": asdict(self.setting),
            "measured": self.measured,
            "simulated": self.simulated,
            "machine": self.machine,
            "error": self.error,
            "device_seconds_per_million": {
                "measured": self._device_seconds(self.measured),
                "simulated": self._device_seconds(self.simulated * self.machine),
            },
        }

    def _device_seconds(self, tokens_per_second: float) -> float | None:
        if not tokens_per_second:
            return None
        found = cost(self.setting, tokens_per_second, UNPRICED)
        return found.target_device_seconds + found.draft_device_seconds


VALIDATION = tuple(Size(lookahead=depth, budget=budget) for depth, budget in ((1, 8), (3, 16), (5, 8), (6, 24)))
"""Sizes that the costs were not fitted to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What :func:`validate` measures; by default 16 settings."""

    sizes: Sequence[Size] = VALIDATION
    temperatures: Sequence[float] = (0.0, 1.0)
    methods: Sequence[Modelled] = WITH_DRAFT
    max_tokens: int = 96


def validate(
    launch: Launch,
    profile: Profile,
    config: Config,
    prompts: Sequence[Prompt],
    options: Validation = Validation(),
    *,
    say: Callable[[str], None] = lambda text: None,
) -> list[Check]:
    """Returns tokens per second of real runs (decoding only) and of their simulations.

    Args:
        prompts: those the profile was measured on.
        say: called with what runs next.
    """
    checks = []
    for number, size in enumerate(options.sizes, start=1):
        say(f"start {number}/{len(options.sizes)}: lookahead {size.lookahead}, budget {size.budget}")
        with launch(load_config(config, size.overrides)) as llm:
            arms = [MethodArm(llm, method) for method in ("none_fast", *options.methods)]
            for temperature in options.temperatures:
                runs = Runs(temperature=temperature, max_tokens=options.max_tokens, batch=size.batch)
                found = interleave(arms, prompts, runs)
                plain = Setting(method="none_fast", batch=size.batch, temperature=temperature)
                usual = simulate(profile, plain).tokens_per_second
                machine = (found.total("none_fast").tokens_per_second or 0.0) / usual
                for method in options.methods:
                    whole = found.total(method)
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
    """Returns the mean of the errors' absolute values."""
    return fmean(abs(check.error) for check in checks)
