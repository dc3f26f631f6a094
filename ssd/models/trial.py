"""The trial of a model: the first tokens that its runner decodes, compared with the model's own forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ModelError, first_line
from .layers import TRIAL, UNUSABLE, Layers
from .rows import RowPlan

if TYPE_CHECKING:
    from .runner import ForwardRunner
    from .states import StateSlots

_APART = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.2}
"""Relative difference (of norms) of logits that only rounding explains, with a wide margin: a wrong mask, position
or cache gives differences near 1."""


_CONTINUED = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}
"""The same where both ways compute in the model's own order: a prompt at once, and token by token."""


@torch.no_grad()
def compare(runner: ForwardRunner, layers: Layers) -> None:
    """Decodes what the model was run on: a prompt, then rows that are verified together.

    Raises:
        ModelError: it does not run, or its logits are not those of the model's own forward.
    """
    first, rows, kind = TRIAL // 4, TRIAL - TRIAL // 4, runner.model.config.get_text_config().model_type
    ids = layers.tokens[0].tolist()
    lengths, whole = torch.full((runner.batch,), first, device=runner.device), RowPlan.sequential("trial", rows)
    tokens = layers.tokens[:, first:].expand(runner.batch, -1).contiguous()
    try:
        runner.prefill(0, ids[:first])
        logits = runner.logits(whole, tokens, lengths, runner.contexts[0])[0]
    except UNUSABLE as error:
        what = f"{kind}: does not run with this engine's attention and cache ({first_line(error)}); not supported"
        raise ModelError(what) from error
    expected = layers.logits[first:, : runner.vocabulary]
    if not expected.isfinite().all():
        return  # every request will end with an error that says so
    apart = ((logits - expected).norm() / expected.norm()).item()
    if not apart < _APART[runner.dtype]:  # also if it is not a number
        raise ModelError(
            f"{kind}: decoding with this engine's cache gives other logits than the model's own forward "
            f"(relative difference {apart:.2g}); not supported"
        )
    if runner.cache.states is not None:
        runner.cache.states.advance_together(_continues(runner, runner.cache.states))


def _continues(runner: ForwardRunner, slots: StateSlots) -> bool:
    """Returns whether the model's own code for prompts continues a state as its steps do."""
    random = torch.Generator().manual_seed(1)
    size = min(slots.ring + TRIAL, runner.chunk)
    if size < slots.ring + 2 or 2 * size > runner.cache.capacity:
        return False  # nothing to gain
    prompt = torch.randint(runner.vocabulary, (2 * size,), generator=random).tolist()

    def states(together: bool) -> list[Tensor]:
        slots.advance_together(together)
        for start in (0, size):
            runner.prefill(0, prompt[start : start + size], start)
        return [kept[0, (len(prompt) - 1) % slots.ring].clone() for kept in slots.main.values()]

    expected = states(False)
    try:
        found = states(True)
    except UNUSABLE:
        return False
    return all(
        bool((one.double() - other).norm() <= _CONTINUED[runner.dtype] * other.double().norm())
        for one, other in zip(found, expected, strict=True)
    )
