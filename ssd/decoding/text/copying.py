"""The draft's copy bias: a score goes up where the text has been there before.

A small draft seldom notices that what it writes stands a few lines above; whether it does is a search that
needs no model. Each row of a draft forward is given the longest ending of its sequence (at most n tokens)
that stood in the sequence before, and the token that followed it there gains ``gains[length - 1]`` on its
logit. That is one induction head written down (Olsson et al. 2022, arXiv 2209.11895), or a cache model
(Grave et al. 2017, arXiv 1612.04426, section 3) of one entry. What comes out *is* the draft's
distribution, so every verification rule stays exact.

Everything is static in shape and runs on the draft's device, inside its compiled forwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..trees.shape import TreeShape

EMPTY = -1
"""Before the first token of a sequence."""


class CopyBias:
    """The certain tokens of B sequences, and what draft scores gain by them.

    Args:
        gains: in nats, for endings of 1, 2, .. tokens; longer ones count as the longest. None: no bias.
        shape: the candidate tree. batch: B. capacity: tokens of a sequence; later ones are not kept.
    """

    def __init__(
        self, gains: Sequence[float], shape: TreeShape, *, batch: int, capacity: int, device: torch.device | str = "cpu"
    ):
        device, n = torch.device(device), len(gains)
        self.longest, self.capacity = n, capacity
        self.gains = torch.tensor([0.0, *gains], dtype=torch.float32, device=device)
        # n columns of EMPTY first: the tokens k places back are the same columns k to the left.
        self._host = torch.full((batch, n + capacity), EMPTY, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._written = self._host.numpy()
        self.tokens = self._host.to(device)
        """``[B, n + capacity]`` int32 on the draft's device."""
        self._endings: dict[int, Tensor] = {}
        for width in (1, shape.nodes):
            paths = [[*reversed(shape.path(node)), 0, *range(width, width + n)][:n] for node in range(width)]
            self._endings[width] = torch.tensor(paths, dtype=torch.int64, device=device).reshape(width, n)

    def write(self, slot: int, start: int, tokens: Sequence[int]) -> None:
        """The certain tokens from position ``start`` on, the root the last of them."""
        if self.longest:
            place = self.longest + start
            room = tokens[: self._written.shape[1] - place]
            self._written[slot, place : place + len(room)] = room

    def flush(self) -> None:
        """Bring what was written to the draft's device."""
        if self.tokens is not self._host:
            # Not waited for: should a write overtake the copy, a guess is worse, and what is drafted still exact.
            self.tokens.copy_(self._host, non_blocking=True)

    def trail(self, tokens: Tensor, lengths: Tensor, slots: Tensor | None = None) -> Trail:
        """Of the rows of a tree ``[B, W]`` or of its root alone ``[B, 1]``, above L ``[B]``. ``slots`` ``[B]``: whose
        sequences they continue, if not those of all."""
        known = self.tokens if slots is None else self.tokens[slots]
        if not self.longest:
            return Trail(self, known, tokens[..., None][..., :0], lengths)
        places = self.longest + lengths[:, None] - torch.arange(1, self.longest + 1, device=lengths.device)
        before = known.gather(1, places)  # the root's predecessor first
        both = torch.cat([tokens.to(torch.int32), before], dim=1)
        return Trail(self, known, both[:, self._endings[tokens.shape[1]]], lengths)


class Trail:
    """The endings of the rows of a forward ``[B, R, n]``, the rows' own tokens first, as a drafting goes on."""

    def __init__(self, bias: CopyBias, known: Tensor, endings: Tensor, lengths: Tensor):
        self._bias, self._known, self._endings, self._lengths = bias, known, endings, lengths

    def follow(self, nodes: Tensor) -> None:
        """Go on from rows ``nodes [B, N]``."""
        if n := self._bias.longest:
            self._endings = self._endings.gather(1, nodes[..., None].expand(-1, -1, n))

    def feed(self, tokens: Tensor) -> None:
        """The rows' next tokens ``[B, R]``."""
        if n := self._bias.longest:
            self._endings = torch.cat([tokens[..., None].to(torch.int32), self._endings[..., : n - 1]], dim=-1)

    def add(self, logits: Tensor) -> Tensor:
        """``logits [B, R, V]`` of the rows, with what they gain."""
        n, size, known = self._bias.longest, self._bias.capacity, self._known
        if not n:
            return logits
        places = torch.arange(size, dtype=torch.int32, device=logits.device)
        # An ending at a place counts if its follower is certain: the root, at L, is the last that is.
        matched = (places < self._lengths[:, None])[:, None, :]
        length = torch.zeros((), dtype=torch.int32, device=logits.device)
        for back in range(n):
            matched = matched & (known[:, None, n - back : n - back + size] == self._endings[..., back : back + 1])
            length = length + matched.to(torch.int32)
        best = (length * size + places).amax(-1).to(torch.int64)  # the longest, and of those the last
        found, gain = (best % size + n + 1).clamp(max=n + size - 1), self._bias.gains[best // size]
        follower = known.gather(1, found).clamp(min=0).to(torch.int64)
        return logits.scatter_add(-1, follower[..., None], gain[..., None])
