"""What draft and verifier must agree on, from the configuration, with the checks that need no weights.

A front makes it and never runs a model: nothing imported here imports transformers' models, which takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...config.load import resolve_model_path
from ...config.sections import Config, ModelConfig
from ...decoding.forecast.base import ConfidenceForecast, FanOutForecast, Forecast, fan_out
from ...decoding.forecast.measured import MeasuredForecast
from ...decoding.trees.shape import TreeShape
from ...decoding.trees.widths import siblings_within
from ...errors import ConfigError
from ...grammars.compiler import Grammars
from ...models.checkpoints.loading import load_tokenizer
from ...models.rows import RowPlan, verify_plans
from ..policy.lookahead import lookahead_tiers
from ..round.frames import Frames, ProbsLayout, probs_layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What draft and verifier must agree on, derived from the configuration."""

    config: Config
    vocabulary: int
    """V: token ids are below it."""
    ends: tuple[int, ...]
    """End-of-text ids."""
    mapped: bool = False
    """Whether the draft has other token ids than the target."""
    draft_context: int | None = None
    """Tokens of a sequence that the draft can hold; None: ``engine.max_model_len``."""

    @property
    def roles(self) -> tuple[str, ...]:
        return self.config.roles

    def for_role(self, role: str) -> Plan:
        """As the role's worker reads it."""
        return replace(self, config=self.config.for_role(role))

    @property
    def draft_limit(self) -> int | None:
        """Length of a sequence from which on the draft does not speculate, because its branches would leave its
        context; None: it speculates to the end."""
        return None if self.draft_context is None else self.draft_context - 2 * self.shape.depth - 2

    @property
    def verify_plans(self) -> list[RowPlan]:
        """Rows of verifications."""
        return list(verify_plans(self.shape, () if self.config.numerics == "strict" else self.lookaheads).values())

    @property
    def shape(self) -> TreeShape:
        wanted = self.config.speculation
        beside = wanted.beside if wanted.rows is None else siblings_within(wanted.rows, wanted.depth)
        return TreeShape.comb(wanted.depth, beside)

    @property
    def lookaheads(self) -> tuple[int, ...]:
        """What may be chosen from, ascending."""
        wanted = self.config.speculation
        return lookahead_tiers(wanted.depth) if wanted.lookahead == "auto" else (wanted.depth,)

    @property
    def branches(self) -> int:
        """Of a round's speculation set: N for every rank of the draft."""
        return self.config.speculation.forecast.budget * max(1, len(self.config.draft_roles))

    def forecast(self, device: str) -> Forecast:
        """Of all ranks of the draft together."""
        wanted, budget = self.config.speculation.forecast, self.branches
        if wanted.shape == "confidence":
            return ConfidenceForecast(self.shape, budget, wanted.sharpness, device)
        if wanted.shape == "measured":
            return MeasuredForecast(self.shape, budget, self.config.engine.max_batch, device)
        counts = fan_out(self.shape, budget, kind=wanted.shape, acceptance=wanted.acceptance, power=wanted.power)
        return FanOutForecast(self.shape, counts, device)

    @property
    def jit(self) -> bool:
        return self.config.speculation.fallback in ("jit", "auto")

    @property
    def ngram(self) -> bool:
        return self.config.speculation.fallback in ("ngram", "auto")

    @property
    def probs(self) -> ProbsLayout | None:
        """How the draft's distributions travel; None under ``coupled``."""
        wanted = self.config.speculation
        return probs_layout(wanted.verify, self.shape, wanted.support, self.vocabulary)

    def grammars(self, model: ModelConfig) -> Grammars:
        """For a worker of ``model``; its tokenizer is read when a grammar is first asked for."""
        folder = resolve_model_path((self.config.target if self.mapped else model).model)
        return Grammars(lambda: load_tokenizer(folder), vocabulary=self.vocabulary, ends=self.ends)

    def frames(self, epoch: int = 0, *, share: bool = False) -> Frames:
        """``share``: those in which a rank of the draft sends its own part of the set."""
        return Frames(
            batch=self.config.engine.max_batch,
            branches=self.config.speculation.forecast.budget if share else self.branches,
            nodes=self.shape.nodes,
            probs=self.probs,
            epoch=epoch,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(),
            "vocabulary": self.vocabulary,
            "ends": list(self.ends),
            "mapped": self.mapped,
            "draft_context": self.draft_context,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Plan:
        return cls(
            config=Config.model_validate(raw["config"]),
            vocabulary=int(raw["vocabulary"]),
            ends=tuple(raw["ends"]),
            mapped=raw["mapped"],
            draft_context=raw["draft_context"],
        )


def check_sizes(config: Config) -> None:
    """Raises: ConfigError if the speculation cannot fit the context."""
    lookahead, longest = config.speculation.depth, config.engine.max_model_len
    if lookahead + 2 > longest // 2:
        which = "_max" if config.speculation.lookahead == "auto" else ""
        raise ConfigError(
            f"speculation.lookahead{which}={lookahead} is too deep for engine.max_model_len={longest}; "
            f"use at most {longest // 2 - 2}"
        )
