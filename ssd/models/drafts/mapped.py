"""A draft that reads and writes the target's token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ModelError
from ..checkpoints.pairs import VocabularyMap


class MappedOutput(NamedTuple):
    """The part of a causal LM's output that runners read."""

    logits: Tensor


class MappedModel(nn.Module):
    """Maps ids on their way into a causal LM, and logits on their way out, without leaving the device.

    Takes the place of ``model`` in a runner (``ForwardRunner.over``), inside its compiled and captured forwards.

    Args:
        model: the draft.
        ids: the map of the pair.
        extra: tokens of the draft that are fed for the ids from V on.
    """

    def __init__(self, model: PreTrainedModel, ids: VocabularyMap, extra: Sequence[int] = ()):
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device
        fed = torch.cat([ids.to_draft, torch.tensor(extra, dtype=torch.int64)])
        to_target = ids.to_target.to(model.device)
        rows = torch.full_like(ids.to_draft, -1, device=model.device)
        known = to_target >= 0
        rows[to_target[known]] = known.nonzero().flatten()
        self._to_draft, self._rows, self._unknown = fed.to(model.device), rows.clamp(min=0), rows < 0

    def forward(self, input_ids: Tensor, **inputs: Any) -> MappedOutput:
        """Runs the model. ``input_ids [B, R]`` and the logits ``[B, R, V]`` are the target's; tokens that the draft
        does not have get the logit -inf. Other arguments are the model's."""
        logits = self.model(input_ids=self._to_draft[input_ids], **inputs).logits
        return MappedOutput(logits[..., self._rows].masked_fill(self._unknown, -torch.inf))


def trim_head(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Keeps these rows of the model's output head, in this order, unless it has no others.

    The embedding stays as it is, also where head and embedding share their weights.

    Raises:
        ModelError: the head is no linear layer, or a row does not exist.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{model.config.get_text_config().model_type}: its output head cannot be trimmed")
    if head.out_features == len(kept):
        return
    if max(kept) >= head.out_features:
        raise ModelError(f"the trimmed vocabulary has token {max(kept)}; the output head has {head.out_features} rows")
    rows = torch.tensor(kept, device=head.weight.device)
    trimmed = nn.Linear(head.in_features, len(kept), bias=head.bias is not None, device="meta")
    trimmed.weight = nn.Parameter(head.weight.detach()[rows], requires_grad=False)
    if head.bias is not None:
        trimmed.bias = nn.Parameter(head.bias.detach()[rows], requires_grad=False)
    model.set_output_embeddings(trimmed)
