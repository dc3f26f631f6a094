"""The draft's copy bias: raises the score of the token that followed the same text earlier in the sequence.

A small draft often fails to notice that it is repeating text from a few lines above, and a search finds that without
a model. For each row of a draft forward the longest ending of its sequence (at most n tokens) that occurred earlier is
looked up, and the token that followed it there gains ``gains[length - 1]`` on its logit. This is one hand-written
induction head (Olsson et al. 2022, arXiv 2209.11895), or a cache model with one entry (Grave et al. 2017, arXiv
1612.04426, section 3). The biased logits *are* the draft's distribution, so every verification rule stays exact.

All shapes are static, and the search runs on the draft's device, inside its compiled forwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..trees.shape import TreeShape

EMPTY = -1
"""Fills the columns before the first token of a sequence."""


class CopyBias:
    """The certain tokens of B sequences, and the gains that the draft's logits get from them.

    Args:
        gains: in nats, for endings of 1, 2, ... tokens; longer endings count as the longest. Empty: no bias.
        shape: the candidate tree.
        batch: B.
        capacity: tokens of a sequence; later ones are ignored.
        device: of the draft.
    """

    def __init__(
        self, gains: Sequence[float], shape: TreeShape, *, batch: int, capacity: int, device: torch.device | str = "cpu"
    ):
        device, n = torch.device(device), len(gains)
        self.longest, self.capacity = n, capacity
        self.gains = torch.tensor([0.0, *gains], dtype=torch.float32, device=device)
        # n columns of EMPTY come first, so the tokens k places back are the same columns shifted by k.
        self._host = torch.full((batch, n + capacity), EMPTY, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._written = self._host.numpy()
        self.tokens = self._host.to(device)
        """``[B, n + capacity]`` int32 on the draft's device."""
        self._endings: dict[int, Tensor] = {}
        for width in (1, shape.nodes):
            paths = [[*reversed(shape.path(node)), 0, *range(width, width + n)][:n] for node in range(width)]
            self._endings[width] = torch.tensor(paths, dtype=torch.int64, device=device).reshape(width, n)

    def write(self, slot: int, start: int, tokens: Sequence[int]) -> None:
        """Records certain tokens at the positions from ``start`` on. The root is the last certain token."""
        if self.longest:
            place = self.longest + start
            room = tokens[: self._written.shape[1] - place]
            self._written[slot, place : place + len(room)] = room

    def flush(self) -> None:
        """Copies what was written to the draft's device."""
        if self.tokens is not self._host:
            # Not waited for: if a later write races the copy, only the quality of a guess suffers.
            self.tokens.copy_(self._host, non_blocking=True)

    def source(self, lengths: Tensor, slots: Tensor | None = None) -> CopySource | None:
        """Returns the sequences that a forward above L ``[B]`` continues: those of ``slots [B]``, or all; None if there
        is no bias."""
        if not self.longest:
            return None
        return CopySource(self, self.tokens if slots is None else self.tokens[slots], lengths)

    def endings(self, tokens: Tensor, before: Tensor) -> Tensor:
        """Returns the endings ``[B, W, n]`` of the rows of a tree.

        Args:
            tokens: int64 ``[B, W]``, the nodes of the tree, or ``[B, 1]``, its root alone.
            before: int32 ``[B, n]``, the tokens before the root, the latest first.
        """
        return torch.cat([tokens.to(torch.int32), before], dim=1)[:, self._endings[tokens.shape[1]]]


class CopySource:
    """The certain tokens of B sequences, searched for the endings of the rows of a draft forward.

    Endings are int32 ``[B, R, n]``, a row's own token first.

    Args:
        bias: the gains.
        known: int32 ``[B, n + capacity]``, the tokens, with n ``EMPTY`` columns before them.
        lengths: L ``[B]``, the position of the roots.
    """

    def __init__(self, bias: CopyBias, known: Tensor, lengths: Tensor):
        self._bias, self._known, self._lengths = bias, known, lengths

    def endings(self, tokens: Tensor) -> Tensor:
        """Returns the endings of the rows of a tree ``[B, W]``, or of its root alone ``[B, 1]``."""
        n = self._bias.longest
        places = n + self._lengths[:, None] - torch.arange(1, n + 1, device=self._lengths.device)
        return self._bias.endings(tokens, self._known.gather(1, places))

    def continued(self, endings: Tensor, nodes: Tensor) -> Tensor:
        """Returns the endings ``[B, N, n]`` of branches that continue the rows ``nodes [B, N]``."""
        return endings.gather(1, nodes[..., None].expand(-1, -1, self._bias.longest))

    def fed(self, endings: Tensor, tokens: Tensor) -> Tensor:
        """Returns the endings after the rows' next tokens ``[B, R]``."""
        return torch.cat([tokens[..., None].to(torch.int32), endings[..., : self._bias.longest - 1]], dim=-1)

    def biased(self, logits: Tensor, endings: Tensor) -> Tensor:
        """Returns ``logits [B, R, V]`` of rows with these endings, with their gains added."""
        n, size, known = self._bias.longest, self._bias.capacity, self._known
        places = torch.arange(size, dtype=torch.int32, device=logits.device)
        # A match counts only if the token after it is certain; the root, at L, is the last certain token.
        matched = (places < self._lengths[:, None])[:, None, :]
        length = torch.zeros((), dtype=torch.int32, device=logits.device)
        for back in range(n):
            matched = matched & (known[:, None, n - back : n - back + size] == endings[..., back : back + 1])
            length = length + matched.to(torch.int32)
        best = (length * size + places).amax(-1).to(torch.int64)  # the longest match, and the latest of those
        found, gain = (best % size + n + 1).clamp(max=n + size - 1), self._bias.gains[best // size]
        follower = known.gather(1, found).clamp(min=0).to(torch.int64)
        return logits.scatter_add(-1, follower[..., None], gain[..., None])
