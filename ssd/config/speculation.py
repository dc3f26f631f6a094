"""The part of the configuration that says how the draft speculates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import ConfigError

Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the configuration: unknown keys and values of other types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ForecastConfig(Section):
    """Which outcomes the draft prepares for."""

    budget: int = Field(default=12, ge=1, le=256)
    """Branches N = ΣF_u the draft prepares each round."""
    shape: Literal["uniform", "geometric", "confidence", "measured"] = "confidence"
    """``confidence``: the N likeliest outcomes of each round, by the draft's scores; ``measured``: those that were
    worth most so far; the others: F_u the same each round."""
    sharpness: Number = Field(default=1.4, gt=0)
    """How far ``confidence`` trusts the draft's ranking (β on its scores)."""
    acceptance: Number = Field(default=0.7, gt=0, lt=1)
    """Prior acceptance of a draft token, by which ``geometric`` weighs the nodes."""
    power: Number = Field(default=1.5, gt=0)
    """Exponent r of the miss power law: at fan-out F a share F^-r of outcomes is missed."""


Siblings = Annotated[int, Field(ge=0, le=8)]
Layers = list[Annotated[int, Field(ge=0)]]


class SelfConfig(Section):
    """The draft of method ``self``: the target with sublayers skipped. ``ssd tune layers`` finds which."""

    skip_attention: Layers | None = None
    """Layers, counted from 0, whose attention is skipped. None: every second layer's, first and last kept."""
    skip_mlp: Layers | None = None
    """Layers whose MLP is skipped; None as above."""
    confidence: Number = Field(default=0.6, ge=0, le=1)
    """A chain ends with the first token that the draft gives less probability than this; 0: never."""


class SpeculationConfig(Section):
    """How the draft speculates."""

    method: Literal["none", "sd", "self", "ssd"] = "ssd"
    self: SelfConfig | None = None
    """Needed by requests of method ``self`` where the configured method is another."""
    lookahead: Annotated[int, Field(ge=1, le=16)] | Literal["auto"] = 4
    """K: draft tokens verified in a round. ``auto``: chosen as it goes, by what is measured."""
    lookahead_max: int = Field(default=5, ge=1, le=16)
    """The deepest that ``auto`` may choose; in ``numerics: strict`` every forward has the rows for it."""
    anytime: bool = False
    """End a tree when the verifier waits for it: branches are as deep as there was time for, ``lookahead`` at most."""
    siblings: Siblings | list[Siblings] = 0
    """Next-best tokens beside the chain: at every depth, or a number for each depth from the first on (0 at those not
    named). 0 is a chain, more a comb."""
    rows: int | None = Field(default=None, ge=2, le=145)
    """W, a budget instead of ``siblings``: as many rows are verified, and siblings stand where they are likeliest
    accepted."""
    copy_bias: Annotated[list[Annotated[Number, Field(ge=0)]], Field(max_length=16)] = []
    """Nats the draft's score of a token gains if it followed the last place where the sequence's last 1, 2, .. tokens
    stood before: an entry for each length, the longest found counts. Empty: nothing."""
    forecast: ForecastConfig = ForecastConfig()
    fallback: Literal["jit", "ngram", "auto", "none"] = "jit"
    """What a missed row verifies: a speculation drafted now, one found in its text, the better, or none."""
    verify: Literal["coupled", "rejection", "block"] = "coupled"
    """``coupled``: plain decoding's very tokens. ``rejection``, ``block``: tokens of the same law
    (at temperature 0 the same tokens), higher acceptance, the draft's probabilities on the link."""
    support: int = Field(default=64, ge=1)
    """Tokens the draft samples from under those two: its most probable ones, or all there are."""
    saguaro_c: Number = Field(default=1.0, gt=0, le=1)
    """Saguaro sampling: the forecast's top tokens are drafted with this share of their weight."""
    governor: bool = True
    """Decode plainly while that is measured to be faster, and try again now and then."""

    @property
    def self_draft(self) -> SelfConfig | None:
        """Of the draft within the target, if there is one."""
        return self.self or (SelfConfig() if self.method == "self" else None)

    @property
    def depth(self) -> int:
        """The deepest lookahead there will be."""
        return self.lookahead_max if self.lookahead == "auto" else self.lookahead

    @property
    def beside(self) -> tuple[int, ...]:
        """``siblings`` at each depth ``[depth]``."""
        if isinstance(self.siblings, int):
            return (self.siblings,) * self.depth
        return (*self.siblings, *[0] * (self.depth - len(self.siblings)))

    @property
    def tree(self) -> str:
        """What stands beside the chain, in words."""
        return f"siblings {self.siblings}" if self.rows is None else f"rows {self.rows}"

    @property
    def chain(self) -> bool:
        """Whether nothing stands beside the chain."""
        return not any(self.beside) if self.rows is None else self.rows == self.depth + 1


def check_rule(speculation: SpeculationConfig, where: str) -> None:
    """What fields ask of each other. Raises: ConfigError."""
    if speculation.lookahead == "auto" and speculation.forecast.shape in ("uniform", "geometric"):
        raise ConfigError(
            f"{where}speculation.lookahead=auto needs a forecast that follows it; set speculation.forecast.shape"
            f"=confidence ({speculation.forecast.shape} would prepare for nodes that are not there)"
        )
    deepest = "lookahead_max" if speculation.lookahead == "auto" else "lookahead"
    if isinstance(speculation.siblings, list) and len(speculation.siblings) > speculation.depth:
        raise ConfigError(
            f"{where}speculation.siblings names {len(speculation.siblings)} depths; name at most "
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
            "coupled candidates are not drawn from a distribution that could be scaled"
        )
