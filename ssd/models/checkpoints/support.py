"""Checks what a configuration alone tells: whether this engine can decode with a model, and how long a text may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MOVING = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies change, for all keys at once, when a text outgrows its first length."""


def check_supported(config: PretrainedConfig, max_positions: int) -> None:
    """Checks what a configuration alone tells. Whether the layers decode right is found by running them (``layers``).

    Args:
        config: the model's.
        max_positions: positions it will be asked for.

    Raises:
        ModelError: an encoder-decoder, or too few positions.
    """
    text = config.get_text_config()
    kind = text.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind}: encoder-decoder models are not supported")
    positions = usable_positions(text)
    if positions is None or max_positions <= positions:
        return
    if moving := {rope["rope_type"] for rope in _ropes(text)} & {*_MOVING}:
        raise ModelError(
            f"{kind}: its {moving.pop()} rotary embeddings change all keys of a text that grows beyond {positions} "
            f"tokens; set engine.max_model_len to at most {positions} (now {max_positions})"
        )
    raise ModelError(f"{kind}: knows {positions} positions, {max_positions} are needed; lower engine.max_model_len")


def usable_positions(text: PretrainedConfig) -> int | None:
    """Returns the most tokens of a text that a model decodes right; None if nothing limits them.

    Args:
        text: the text part of a configuration.
    """
    known: int | None = getattr(text, "max_position_embeddings", None)
    if known is None or known < 1:  # XLNet's -1
        return None
    ropes = _ropes(text)
    if moving := [rope for rope in ropes if rope["rope_type"] in _MOVING]:
        firsts = [rope.get("original_max_position_embeddings") for rope in moving]
        return min([known, *(first for first in firsts if first)])
    return max([known, *(_scaled(rope, known) for rope in ropes)])


def _scaled(rope: dict[str, Any], known: int) -> int:
    """Returns the positions that scaled embeddings reach. ``known``: as configured, which some count scaled already."""
    original = rope.get("original_max_position_embeddings")
    if rope["rope_type"] == "yarn" and original:
        return int(original * (rope.get("factor") or 1.0))
    if rope["rope_type"] == "linear" and original in (None, known):
        return int(known * (rope.get("factor") or 1.0))
    return known


def _ropes(text: PretrainedConfig) -> list[dict[str, Any]]:
    """Returns the parameters of rotary embeddings: one set, or one for each kind of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    return [one for one in (rope, *rope.values()) if isinstance(one, dict) and isinstance(one.get("rope_type"), str)]
