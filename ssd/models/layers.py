"""What each layer of a model attends, read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ..errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Reach = Literal["full", "window", "chunk"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attended:
    """The tokens before itself that a token of a layer attends."""

    reach: Reach = "full"
    size: int = 0
    """Tokens of a window, the token itself included, or of a chunk."""

    def starts(self, positions: Tensor) -> Tensor:
        """Returns the first position that rows at ``positions`` attend. Both ``[B, R]`` int64."""
        if self.reach == "chunk":
            return positions // self.size * self.size
        return (positions - (self.size - 1)).clamp(min=0)


FULL = Attended()
_KINDS: dict[str, Reach] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "window",
    "chunked_attention": "chunk",
}


def attended(text: PretrainedConfig, capacity: int) -> tuple[Attended, ...]:
    """Returns what every layer attends. A window that holds ``capacity`` tokens hides nothing and counts as full.

    Args:
        text: the text part of a model's configuration.
        capacity: tokens of a sequence.

    Raises:
        ModelError: a layer is of a kind that this engine does not know.
    """
    window = getattr(text, "sliding_window", None)
    chunk = getattr(text, "attention_chunk_size", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        slides = window is not None and getattr(text, "use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"] * text.num_hidden_layers

    def one(kind: str) -> Attended:
        if kind not in _KINDS:
            raise ModelError(f"{text.model_type}: layers of kind {kind} are not supported")
        reach = _KINDS[kind]
        size = {"full": None, "window": window, "chunk": chunk}[reach]
        return FULL if size is None or size >= capacity else Attended(reach=reach, size=size)

    return tuple(one(kind) for kind in kinds)
