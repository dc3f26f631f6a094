"""Checks what a model's configuration alone tells: whether this engine can decode with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_supported(config: PretrainedConfig, max_positions: int) -> None:
    """Checks what a configuration alone tells. Whether the layers decode right is found by running them (``layers``).

    Args:
        config: the model's.
        max_positions: positions it will be asked for.

    Raises:
        ModelError: an encoder-decoder, rotary embeddings that depend on the text's length, or too few positions.
    """
    text = config.get_text_config()
    kind = text.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind}: encoder-decoder models are not supported")
    rope = getattr(text, "rope_parameters", None) or {}
    moving = {p.get("rope_type") for p in (rope, *rope.values()) if isinstance(p, dict)} & {"dynamic", "longrope"}
    if moving:
        raise ModelError(f"{kind}: {moving.pop()} rotary embeddings change with the length of the text; not supported")
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and max_positions > positions:
        raise ModelError(f"{kind}: knows {positions} positions, {max_positions} are needed; lower engine.max_model_len")
