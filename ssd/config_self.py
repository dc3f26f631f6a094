"""Settings of method ``self``."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Layers = list[Annotated[int, Field(ge=0)]]


class SelfConfig(BaseModel):
    """The draft that is the target with sublayers skipped. Layers count from 0; ``ssd tune layers`` finds them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    skip_attention: Layers | None = None
    """Layers whose attention is skipped. None: of every second layer, first and last kept."""
    skip_mlp: Layers | None = None
    """Layers whose MLP is skipped; None as above."""
    confidence: Annotated[float, Field(strict=False, ge=0, le=1)] = 0.6
    """A chain ends with the first token that the draft gives less probability than this; 0: never."""
