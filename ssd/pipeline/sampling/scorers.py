"""The scorers of a drafting walk: likely candidates inside compiled functions, exact ones step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...decoding.processors import TreePaths
from ...decoding.trees.shape import TreeShape
from ...request.sampling_params import SamplingParams
from .slots import SlotSampling
from .walk import Rows, Scorer


class Requested(NamedTuple):
    """What the requests of the selected slots ask for, as arguments of a compiled function."""

    packed: Tensor
    """``[B, 4]``, ``SlotSampling.packed``."""
    noise: Tensor
    """``[B, H, V]``; zeros if no slot samples."""
    adjustments: Tensor | None = None
    """``[B, 3, V]``, ``Processors.fixed``; None if nothing but noise is asked for."""
    allowed: Tensor | None = None
    """bool ``[B, W, V]``, ``Processors.allowed`` of the trees' rows, or of the roots in the first row; None as
    ``adjustments``."""


class RequestTensors:
    """Builds ``Requested`` for walks below trees of one shape, in tensors that stay in place.

    Args:
        sampling: of the B slots.
        shape: the candidate tree.
        batch: B.
        vocabulary: V.
        device: of the draft.
    """

    def __init__(self, sampling: SlotSampling, shape: TreeShape, batch: int, vocabulary: int, device: torch.device):
        self._sampling, self._paths = sampling, TreePaths(shape, device)
        self._size, self._device = (batch, shape.nodes, vocabulary), device
        zeros = torch.zeros(batch, 2 * shape.depth + 1, vocabulary, device=device)
        self._zero_noise = {count: zeros[:count] for count in range(1, batch + 1)}
        self._adjustments: Tensor | None = None
        self._allowed: Tensor | None = None
        self._restricted = False
        """Whether ``_allowed`` excludes anything."""

    @property
    def kinds(self) -> Sequence[SamplingParams]:
        """One request per form of compiled function: the CPU operators need a single form; elsewhere plain requests
        have one without filters and adjustments."""
        plain, filtered = SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9)
        return (plain,) if self._sampling.filters else (plain, filtered)

    def requested(self, tokens: Tensor, lengths: Tensor) -> Requested:
        """What is asked for now below the trees ``tokens [B, W]`` or roots ``[B, 1]`` above L ``[B]``."""
        sampling, count = self._sampling, len(tokens)
        noise = sampling.noise(lengths)
        noise = self._zero_noise[count] if noise is None else noise
        if sampling.plain and not sampling.filters:
            return Requested(sampling.packed, noise)
        if self._adjustments is None or self._allowed is None:
            batch, nodes, vocabulary = self._size
            self._adjustments = torch.zeros(batch, 3, vocabulary, device=self._device)
            self._allowed = torch.ones(batch, nodes, vocabulary, dtype=torch.bool, device=self._device)
        # While processors are active all slots are selected, so these are the rows of the selected slots.
        sampling.processors.fixed(self._adjustments)
        constrained = sampling.processors.constrained
        if constrained:
            paths = paths_of(self._paths, tokens)
            sampling.processors.allowed(self._allowed[:, : paths.shape[1]], paths)
        elif self._restricted:
            self._allowed.fill_(True)
        self._restricted = constrained
        return Requested(sampling.packed, noise, self._adjustments[:count], self._allowed[:count])


class LikelyScorer(Scorer):
    """Scores inside a compiled function (``SlotSampling.score``): processors count the certain tokens only, and
    grammars restrict only the rows of the tree under verification.

    Args:
        requested: of the selected slots, when the function runs.
    """

    def __init__(self, sampling: SlotSampling, width: int, requested: Requested):
        super().__init__(sampling, width)
        self._requested = requested

    def score(self, logits: Tensor, rows: Rows, paths: Tensor | None = None) -> Tensor:
        packed, noise, adjustments, allowed = self._requested
        allowed = allowed[:, : logits.shape[1]] if rows.in_tree and allowed is not None else None
        return self._sampling.score(logits, noise, rows.ahead, packed, adjustments, allowed)


class ExactScorer(Scorer):
    """Scores with everything the requests ask for, the candidates above each row included.

    Args:
        noise: ``[B, H, V]`` of the selected slots; None if no slot samples.
        tree_paths: of the candidate tree.
    """

    def __init__(self, sampling: SlotSampling, width: int, noise: Tensor | None, tree_paths: TreePaths):
        super().__init__(sampling, width)
        self._noise, self._tree_paths = noise, tree_paths

    def paths(self, tokens: Tensor) -> Tensor | None:
        return paths_of(self._tree_paths, tokens) if self._sampling.processors.active else None

    def score(self, logits: Tensor, rows: Rows, paths: Tensor | None) -> Tensor:
        return self._sampling.exact(logits, self._noise, rows.ahead, paths)[1]


def paths_of(tree_paths: TreePaths, tokens: Tensor) -> Tensor:
    """Returns the candidates ``[B, W, K]`` above the rows of trees ``[B, W]``, or none ``[B, 1, 0]`` above roots."""
    return tokens.new_empty(len(tokens), 1, 0) if tokens.shape[1] == 1 else tree_paths.of(tokens)
