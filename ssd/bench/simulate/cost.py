"""What a million tokens cost: device-seconds, money, and when the draft's device saves more than it costs.

Formulas, with R tokens per second of a batch of b sequences, D_t and D_d devices of target and draft at p_t and p_d per
hour, K the lookahead, and R_0 plain decoding's rate on the same D_t devices:

* device-seconds per million tokens: 10⁶ D_t / R for the target, 10⁶ D_d / R for the draft;
* money per million tokens: (D_t p_t + D_d p_d) / 3600 · 10⁶ / R;
* break-even speedup: S = (D_t p_t + D_d p_d) / (D_t p_t), the R / R_0 at which the money is plain decoding's;
* break-even tokens per round: L = S R_0 T / b, with the simulated round time T in seconds;
* break-even acceptance: the α with 1 + α + α² + … + α^K = L, for a chain of K tokens that are each accepted with
  probability α.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...config.sections import CostConfig
from .profile import Profile, Replay
from .simulator import Setting, Simulated

MILLION, HOUR_S = 1_000_000, 3600.0
ASSUMED = (
    "devices are paid for while rounds run; idle time is not counted",
    "sd holds no device for its draft, which works on the target's while the target waits; with devices of its own it "
    "costs theirs too, as ssd does",
    "break-even: the round time stays as simulated, and every draft token is accepted with the same probability",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """Prices of one device for an hour."""

    target: float
    draft: float
    currency: str
    assumed: tuple[str, ...] = ()
    """Which of them the configuration does not give."""

    @classmethod
    def of(cls, cost: CostConfig) -> Prices:
        """Returns the configured prices. Without a price of the target's device, both are 1 device-hour."""
        if cost.target_per_hour is None:
            return cls(target=1.0, draft=1.0, currency="device-hours", assumed=("target_per_hour", "draft_per_hour"))
        if cost.draft_per_hour is None:
            target = cost.target_per_hour
            return cls(target=target, draft=target, currency=cost.currency, assumed=("draft_per_hour",))
        return cls(target=cost.target_per_hour, draft=cost.draft_per_hour, currency=cost.currency)


UNPRICED = Prices.of(CostConfig())
"""Every device costs the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a million tokens cost with one method."""

    target_device_seconds: float
    draft_device_seconds: float
    money: float
    """In the currency of the prices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakEven:
    """Where a method with a draft costs as much as plain decoding on the same target devices."""

    speedup: float
    acceptance_length: float
    """Tokens per round, the bonus token included."""
    acceptance: float | None
    """α; None if even accepting everything costs more."""


def devices(setting: Setting) -> tuple[int, int]:
    """Returns how many devices target and draft hold."""
    return setting.target_devices, setting.draft_devices if setting.method == "ssd" else 0


def cost(setting: Setting, tokens_per_second: float, prices: Prices) -> Cost:
    """Returns what a million tokens cost at this rate of the whole batch."""
    target, draft = devices(setting)
    seconds = MILLION / tokens_per_second
    return Cost(
        target_device_seconds=target * seconds,
        draft_device_seconds=draft * seconds,
        money=(target * prices.target + draft * prices.draft) * seconds / HOUR_S,
    )


def break_even(setting: Setting, round_s: float, plain_tokens_per_second: float, prices: Prices) -> BreakEven:
    """Returns where ``setting`` costs as much as plain decoding.

    Args:
        round_s: Mean duration of its rounds.
        plain_tokens_per_second: Of the same batch on the same target devices.
    """
    target, draft = devices(setting)
    base = target * prices.target
    # Free target devices: the draft can never be worth a price.
    speedup = (base + draft * prices.draft) / base if base else (1.0 if not draft * prices.draft else float("inf"))
    length = speedup * plain_tokens_per_second * round_s / setting.batch
    return BreakEven(speedup=speedup, acceptance_length=length, acceptance=acceptance_of(length, setting.lookahead))


def acceptance_of(length: float, lookahead: int) -> float | None:
    """Returns the α in [0, 1] with 1 + α + … + α^K = ``length``, 0 below 1; None above K + 1."""
    if length > lookahead + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(lookahead + 1)) < length else (low, middle)
    return (low + high) / 2


def cost_figures(one: Simulated, plain: Simulated, prices: Prices) -> dict[str, Any]:
    """Returns the cost of a simulated setting beside plain decoding's, ready for JSON."""
    own = cost(one.setting, one.tokens_per_second, prices)
    usual = cost(plain.setting, plain.tokens_per_second, prices)
    target, draft = devices(one.setting)
    found = {
        "setting": asdict(one.setting),
        "devices": {"target": target, "draft": draft},
        **asdict(own),
        "over_plain": own.money / usual.money if usual.money else None,
        "acceptance_length": one.acceptance_length,
    }
    if one.setting.method in ("sd", "ssd"):
        at = break_even(one.setting, one.seconds / one.count, plain.tokens_per_second, prices)
        found["break_even"] = {key: value if value != float("inf") else None for key, value in asdict(at).items()}
    return found


def sources(profile: Profile, temperature: float, prices: Prices) -> dict[str, list[str]]:
    """Returns which of the figures were measured, simulated, configured and assumed."""
    content = profile.at(temperature)[1]
    acceptance = "acceptance and hits, replayed from recorded text"
    measured = ["forward times" + (f" ({profile.machine})" if profile.machine else "")]
    assumed = [f"{name}: the same for all devices" for name in prices.assumed] + list(ASSUMED)
    if isinstance(content, Replay):
        measured.append(acceptance)
    else:
        assumed.append("acceptance and hits, by the profile's closed form")
    given = [name for name in ("target_per_hour", "draft_per_hour") if name not in prices.assumed]
    return {
        "measured": measured,
        "simulated": ["tokens per second, and with them device-seconds and money"],
        "configured": given,
        "assumed": assumed,
    }
