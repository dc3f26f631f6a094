"""What requests ask of a draft, inside its compiled bodies.

A guess need not be right, so what would take a step of its own there is done nearly: penalties, biases and bans are
those after the certain tokens for every row (``Processors.fixed``), a grammar masks the rows of the tree under
verification, where outcomes are guessed, and none below them, and where filters would sort they look at the likeliest
tokens only (``sampling.likely``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...decoding.processors import TreePaths, processed_alike
from ...decoding.sampling import likely, perturbed
from ...decoding.trees.combs import noise_at
from ...decoding.trees.shape import TreeShape
from ...request.sampling_params import SamplingParams
from ..sampling.slots import Chooser


class Asked(NamedTuple):
    """Of the chooser's selected slots, as tensors."""

    packed: Tensor
    """``[B, 4]``, ``Chooser.packed``."""
    noise: Tensor
    """``[B, H, V]``; zeros while nothing samples."""
    fixed: Tensor | None
    """``[B, 3, V]``, ``Processors.fixed``; None where nothing is asked for but noise."""
    allowed: Tensor | None
    """bool ``[B, W, V]``, ``Processors.allowed`` after each row of the trees, or roots; None as ``fixed``."""


class DraftScores:
    """Scores of the candidates below trees of one shape.

    Args: chooser: what the rows' requests ask for.
    """

    def __init__(self, chooser: Chooser, shape: TreeShape, batch: int, vocabulary: int, device: torch.device):
        self._chooser, self._paths = chooser, TreePaths(shape, device)
        self._size, self._device = (batch, shape.nodes, vocabulary), device
        silence = torch.zeros(batch, 2 * shape.depth + 1, vocabulary, device=device)
        self._silences = {count: silence[:count] for count in range(1, batch + 1)}
        self._fixed: Tensor | None = None
        self._allowed: Tensor | None = None
        self._narrowed = False
        """Whether ``_allowed`` leaves anything out."""

    @property
    def kinds(self) -> Sequence[SamplingParams]:
        """A request for each form of a body: with our operators one does all, elsewhere plain requests have theirs."""
        plain, filtered = SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9)
        return (plain,) if self._chooser.filters else (plain, filtered)

    def asked(self, tokens: Tensor, lengths: Tensor) -> Asked:
        """What is asked for now, below the trees ``tokens [B, W]`` or the roots ``[B, 1]``."""
        chooser, count = self._chooser, len(tokens)
        noise = chooser.noise(lengths)
        noise = self._silences[count] if noise is None else noise
        if chooser.plain and not chooser.filters:
            return Asked(chooser.packed, noise, None, None)
        if self._fixed is None or self._allowed is None:
            batch, nodes, vocabulary = self._size
            self._fixed = torch.zeros(batch, 3, vocabulary, device=self._device)
            self._allowed = torch.ones(batch, nodes, vocabulary, dtype=torch.bool, device=self._device)
        # While processors are active all slots are selected.
        chooser.processors.fixed(self._fixed)
        constrained = chooser.processors.constrained
        if constrained:
            roots = tokens.shape[1] == 1
            paths = tokens.new_empty(count, 1, 0) if roots else self._paths.of(tokens)
            chooser.processors.allowed(self._allowed[:, : paths.shape[1]], paths)
        elif self._narrowed:
            self._allowed.fill_(True)
        self._narrowed = constrained
        return Asked(chooser.packed, noise, self._fixed[:count], self._allowed[:count])

    def __call__(self, logits: Tensor, ahead: Tensor, asked: Asked, allowed: Tensor | None = None) -> Tensor:
        """Scores ``[B, R, V]`` whose ranking is the candidates'.

        Args:
            logits: float32 ``[B, R, V]``. ahead: int64 ``[B, R]``: how far above L each row chooses, less 1.
            asked: when the body runs. allowed: of ``asked``, where it is of these rows.
        """
        if self._chooser.filters:
            return torch.ops.ssd.scores(logits, asked.noise, ahead, asked.packed, asked.fixed, allowed)
        if asked.fixed is not None:
            logits = likely(processed_alike(logits, asked.fixed, allowed), asked.packed)
        return perturbed(logits, noise_at(asked.noise, ahead), asked.packed[:, 0])
