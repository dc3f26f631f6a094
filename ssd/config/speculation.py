"""The speculation section: how the draft speculates and how its tokens are verified."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import ConfigError
from ..request.methods import ServedMethod

Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the configuration. Unknown keys and values of the wrong type are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ForecastConfig(Section):
    """Which outcomes the draft prepares for."""

    budget: int = Field(default=12, ge=1, le=256)
    """N = ΣF_u: branches the draft prepares each round."""
    shape: Literal["uniform", "geometric", "confidence", "measured"] = "confidence"
    """``confidence``: the N most probable outcomes of each round, by the draft's scores. ``measured``: those that hit
    most often so far. ``uniform`` and ``geometric``: the same fan-out F_u in every round."""
    sharpness: Number = Field(default=1.4, gt=0)
    """β: factor on the draft's scores in ``confidence``; larger values trust its ranking more."""
    acceptance: Number = Field(default=0.7, gt=0, lt=1)
    """Assumed acceptance rate of a draft token, by which ``geometric`` weighs the nodes."""
    power: Number = Field(default=1.5, gt=0)
    """r: exponent of the power law of misses. At fan-out F, a share F^-r of the outcomes is missed."""


Siblings = Annotated[int, Field(ge=0, le=8)]
Layers = list[Annotated[int, Field(ge=0)]]


class SelfConfig(Section):
    """The draft of method ``self``: the target with sublayers skipped. ``ssd tune layers`` finds which to skip."""

    skip_attention: Layers | None = None
    """Layers, counted from 0, whose attention is skipped. None: every second layer, but not the first and the last."""
    skip_mlp: Layers | None = None
    """Layers whose MLP is skipped. None: as for ``skip_attention``."""
    confidence: Number = Field(default=0.6, ge=0, le=1)
    """A chain ends at the first token to which the draft gives a lower probability. 0: chains have full length."""


class SpeculationConfig(Section):
    """How the draft speculates and how its tokens are verified."""

    method: ServedMethod = "ssd"
    self: SelfConfig | None = None
    """Required for requests of method ``self`` if the configured method is another one."""
    lookahead: Annotated[int, Field(ge=0, le=16)] | Literal["auto"] = 4
    """K: draft tokens verified in a round. ``auto``: chosen while decoding, from measurements. 0 is another way to
    write ``method: none``, plain decoding; requests that ask for another method find the default here."""
    lookahead_max: int = Field(default=5, ge=1, le=16)
    """The largest lookahead ``auto`` may choose. With ``numerics: strict`` every forward has the rows for it."""
    anytime: bool = False
    """End drafting when the verifier is waiting: branches are as deep as time allowed, at most ``lookahead``."""
    siblings: Siblings | list[Siblings] = 0
    """Next-best tokens beside the chain: one number for all depths, or a list with a number for each depth, first to
    last (0 for depths not listed). 0 gives a chain, more gives a comb."""
    rows: int | None = Field(default=None, ge=2, le=145)
    """W: verified rows per sequence, as a budget instead of ``siblings``. Siblings are placed where they are most
    likely to be accepted."""
    copy_bias: Annotated[list[Annotated[Number, Field(ge=0)]], Field(max_length=16)] = []
    """Bias in nats on the token that followed the most recent earlier occurrence of the sequence's last n tokens.
    Entry n - 1 is for a match of n tokens; the longest match counts. Empty: no bias."""
    forecast: ForecastConfig = ForecastConfig()
    fallback: Literal["jit", "ngram", "auto", "none"] = "jit"
    """What a missed row verifies. ``jit``: a speculation drafted now. ``ngram``: one found in the sequence itself.
    ``auto``: the better of the two, as measured. ``none``: nothing, the row decodes plainly."""
    verify: Literal["coupled", "rejection", "block"] = "coupled"
    """``coupled``: the same tokens as plain decoding. ``rejection``, ``block``: tokens from the same distribution
    (at temperature 0 the same tokens), with higher acceptance; the draft's probabilities cross the link."""
    support: int = Field(default=64, ge=1)
    """With ``rejection`` and ``block``, the draft samples from its ``support`` most probable tokens."""
    saguaro_c: Number = Field(default=1.0, gt=0, le=1)
    """C of Saguaro sampling: factor on the draft's probabilities of the forecast's top tokens."""
    governor: bool = True
    """Decode plainly while that is measured to be faster; try speculating again from time to time."""

    @model_validator(mode="before")
    @classmethod
    def _plain_without_lookahead(cls, given: Any) -> Any:
        """Reads ``lookahead: 0`` as ``method: none``, so that nothing below meets a tree without nodes."""
        if isinstance(given, Mapping) and given.get("lookahead") == 0 and type(given["lookahead"]) is int:
            return {**{key: value for key, value in given.items() if key != "lookahead"}, "method": "none"}
        return given

    @property
    def self_draft(self) -> SelfConfig | None:
        """The self-speculation section; None if no request can use it."""
        return self.self or (SelfConfig() if self.method == "self" else None)

    @property
    def depth(self) -> int:
        """The largest lookahead of any round."""
        return self.lookahead_max if self.lookahead == "auto" else self.lookahead

    @property
    def beside(self) -> tuple[int, ...]:
        """``siblings`` for each depth, ``depth`` numbers."""
        if isinstance(self.siblings, int):
            return (self.siblings,) * self.depth
        return (*self.siblings, *[0] * (self.depth - len(self.siblings)))

    @property
    def tree(self) -> str:
        """The key that sets the tree's shape, with its value."""
        return f"siblings {self.siblings}" if self.rows is None else f"rows {self.rows}"

    @property
    def chain(self) -> bool:
        """Whether the tree is a chain: no siblings at any depth."""
        return not any(self.beside) if self.rows is None else self.rows == self.depth + 1


def check_rule(speculation: SpeculationConfig, where: str) -> None:
    """Raises ConfigError, beginning with ``where``, if two keys contradict each other."""
    if speculation.lookahead == "auto" and speculation.forecast.shape in ("uniform", "geometric"):
        raise ConfigError(
            f"{where}speculation.lookahead=auto needs a forecast that follows it; set speculation.forecast.shape"
            f"=confidence ({speculation.forecast.shape} is computed for a fixed depth)"
        )
    deepest = "lookahead_max" if speculation.lookahead == "auto" else "lookahead"
    if isinstance(speculation.siblings, list) and len(speculation.siblings) > speculation.depth:
        raise ConfigError(
            f"{where}speculation.siblings lists {len(speculation.siblings)} depths; list at most "
            f"speculation.{deepest}={speculation.depth}"
        )
    if speculation.rows is not None:
        if any(speculation.beside):
            raise ConfigError(f"{where}speculation.rows chooses the siblings; leave speculation.siblings at 0")
        if not speculation.depth < speculation.rows <= 1 + 9 * speculation.depth:
            raise ConfigError(
                f"{where}speculation.rows={speculation.rows} must be from {speculation.depth + 1} (root and chain of "
                f"speculation.{deepest}={speculation.depth}) to {1 + 9 * speculation.depth} (8 siblings at each depth)"
            )
    if speculation.verify == "block" and not speculation.chain:
        raise ConfigError(
            f"{where}speculation.verify=block verifies chains only; set speculation.siblings=0 and leave "
            "speculation.rows out (or speculation.verify=rejection)"
        )
    if speculation.verify == "coupled" and speculation.saguaro_c != 1:
        raise ConfigError(
            f"{where}speculation.saguaro_c={speculation.saguaro_c:g} needs speculation.verify=rejection or block: "
            "coupled verification does not use the draft's probabilities"
        )
