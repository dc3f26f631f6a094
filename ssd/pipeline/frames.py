"""The wire layout of a round, declared once. All frames are flat int32 of fixed size.

::

    outcome frame (verifier → draft)      header(5) · rows [B, 3]: state, node u, bonus t
    speculation frame (draft → verifier)  header(5) · nodes, guesses [B, N] · trees [B, N, W - 1]
    tree frame (draft → verifier, jit)    header(5) · trees [B, W - 1]

Under verification rules that need them (``rejection``, ``block``), the draft's frames end with what
each inner node's children were drawn from: ``[B, N, I]`` (``[B, I]`` in a tree frame) distributions
as ``ProbsLayout`` lays them out.

The header is magic, the link's epoch, round, and two words of the frame's own: the outcome frame carries how many
control messages must have been applied and what comes next (with a bit that says whether missed rows
take n-grams, and how far to draft), the draft's frames carry how long
drafting took (µs) and 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from ..decoding.support import DraftProbs
from ..errors import LinkError

MAGIC = 0x55D00002
MAGIC_INT32 = MAGIC - 2**32 if MAGIC >= 2**31 else MAGIC
HEADER = 5
NGRAM_BIT = 8
LOOKAHEAD_SHIFT = 4


class Next(IntEnum):
    """What follows an exchange."""

    ROUND = 0
    IDLE = 1
    """Nothing speculates any more: wait for control messages."""
    STOP = 2


class RowState(IntEnum):
    """Of one slot, in the outcome frame."""

    EMPTY = 0
    """No request, or one that does not speculate."""
    ACTIVE = 1
    FINISHED = 2
    """The request ended with this round: forget the slot."""
    PREFILL = 3
    """The prompt is not whole yet: nothing was decided, keep the slot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbsLayout:
    """How the draft's distributions of a tree travel: per inner node, m token ids and the bits of
    m float32 weights; of whole rows the weights only."""

    inner: int
    """I, nodes with children."""
    size: int
    """m <= V."""
    vocabulary: int

    @property
    def whole(self) -> bool:
        return self.size == self.vocabulary

    @property
    def words(self) -> int:
        """Of one tree."""
        return self.inner * self.size * (1 if self.whole else 2)

    def pack(self, draft: DraftProbs) -> Tensor:
        """Flat int32 of ``[*R, I, m]``."""
        bits = draft.probs.to(torch.float32).contiguous().view(torch.int32)
        return (bits if self.whole else torch.cat([draft.tokens.to(torch.int32), bits], dim=-1)).flatten()

    def unpack(self, raw: Tensor, *shape: int) -> DraftProbs:
        """``[*shape, I, m]``; checked by ``DraftProbs.dense`` only, since anything may come."""
        rows = raw.view(*shape, self.inner, -1)
        bits = rows[..., -self.size :].contiguous().view(torch.float32)
        tokens = torch.arange(self.size).expand(bits.shape) if self.whole else rows[..., : self.size].long()
        return DraftProbs(tokens, bits)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutcomeFrame:
    round: int
    control_count: int
    next: Next
    ngram: bool = False
    """Missed rows verify an n-gram where there is one."""
    lookahead: int = 0
    """How far the draft drafts from now on; 0: as deep as the tree."""
    states: Tensor
    """``[B]`` int64 of ``RowState``."""
    nodes: Tensor
    """``[B]`` int64, u."""
    bonus: Tensor
    """``[B]`` int64, t."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculationSet:
    """A speculation per forecast outcome: branch n prepares for (``nodes[n]``, ``guesses[n]``)."""

    nodes: Tensor
    """``[B, N]`` int64 nodes u of the tree under verification."""
    guesses: Tensor
    """``[B, N]`` int64 bonus tokens; ``ABSENT`` where no branch was prepared."""
    trees: Tensor
    """``[B, N, W - 1]`` int64 node tokens below the bonus; ``ABSENT`` where there is none."""
    draft: DraftProbs | None = None
    """``[B, N, I, m]``, what inner nodes' children were drawn from; under rules that need it."""


class Frames:
    """Packs and unpacks the frames of one link: batch B, branches N, tree nodes W; ``probs``: how the
    draft's distributions go along, if they do; ``epoch``: of the link, frames of others are refused."""

    def __init__(self, *, batch: int, branches: int, nodes: int, probs: ProbsLayout | None = None, epoch: int = 0):
        self.batch, self.branches, self.nodes, self.probs, self.epoch = batch, branches, nodes, probs, epoch
        words = probs.words if probs is not None else 0
        self.outcome_size = HEADER + batch * 3
        self.speculation_size = HEADER + batch * branches * (nodes + 1 + words)
        self.tree_size = HEADER + batch * (nodes - 1 + words)

    def new(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32)

    def pack_outcome(self, frame: OutcomeFrame) -> Tensor:
        raw = np.empty(self.outcome_size, dtype=np.int32)
        word = frame.next | NGRAM_BIT * frame.ngram | frame.lookahead << LOOKAHEAD_SHIFT
        raw[:HEADER] = self._header(frame.round, frame.control_count, word)
        for column, values in enumerate((frame.states, frame.nodes, frame.bonus)):
            raw[HEADER + column :: 3] = values.numpy()
        return torch.from_numpy(raw)

    def unpack_outcome(self, raw: Tensor, round: int) -> OutcomeFrame:
        control_count, word = self._check(raw, round)
        lookahead, low = divmod(word, 1 << LOOKAHEAD_SHIFT)
        try:
            next_ = Next(low & ~NGRAM_BIT)
            if not 0 <= lookahead < self.nodes:
                raise ValueError
        except ValueError:
            raise LinkError(f"the verifier announced {word} next, which is nothing known") from None
        rows = _long(raw[HEADER:]).view(self.batch, 3)
        return OutcomeFrame(
            round=round,
            control_count=control_count,
            next=next_,
            ngram=bool(word & NGRAM_BIT),
            lookahead=lookahead,
            states=rows[:, 0],
            nodes=rows[:, 1],
            bonus=rows[:, 2],
        )

    def pack_speculation(self, speculation: SpeculationSet, round: int, spent_us: int) -> Tensor:
        parts = (speculation.nodes.numpy(), speculation.guesses.numpy(), speculation.trees.numpy())
        return self._pack(round, spent_us, 0, *parts, *self._packed(speculation.draft))

    def unpack_speculation(self, raw: Tensor, round: int) -> tuple[SpeculationSet, int]:
        """The set and the draft's time in µs."""
        spent_us, _ = self._check(raw, round)
        cut, end = self.batch * self.branches, HEADER + self.batch * self.branches * (self.nodes + 1)
        body = raw.numpy()[HEADER:end].astype(np.int64)
        outcomes = body[: 2 * cut].reshape(2, self.batch, self.branches)
        trees = body[2 * cut :].reshape(self.batch, self.branches, self.nodes - 1)
        return SpeculationSet(
            nodes=torch.from_numpy(outcomes[0]),
            guesses=torch.from_numpy(outcomes[1]),
            trees=torch.from_numpy(trees),
            draft=self.probs.unpack(raw[end:], self.batch, self.branches) if self.probs is not None else None,
        ), spent_us

    def pack_trees(self, trees: Tensor, round: int, spent_us: int, draft: DraftProbs | None = None) -> Tensor:
        """``draft`` ``[B, I, m]`` under rules that need it."""
        return self._pack(round, spent_us, 0, trees.numpy(), *self._packed(draft))

    def unpack_trees(self, raw: Tensor, round: int) -> tuple[Tensor, int]:
        """``[B, W - 1]`` int64 and the draft's time in µs."""
        spent_us, _ = self._check(raw, round)
        end = HEADER + self.batch * (self.nodes - 1)
        return _long(raw[HEADER:end]).view(self.batch, self.nodes - 1), spent_us

    def unpack_tree_probs(self, raw: Tensor) -> DraftProbs | None:
        """Of a tree frame: ``[B, I, m]``, under rules that need it."""
        if self.probs is None:
            return None
        return self.probs.unpack(raw[HEADER + self.batch * (self.nodes - 1) :], self.batch)

    def _packed(self, draft: DraftProbs | None) -> list[np.ndarray]:
        if self.probs is None:
            return []
        assert draft is not None, "this rule's trees travel with what they were drawn from"
        return [self.probs.pack(draft).numpy()]

    # Frames are small and on the critical path of a round: numpy takes a fifth of torch's time per call.

    def _header(self, round: int, first: int, second: int) -> tuple[int, int, int, int, int]:
        return MAGIC_INT32, self.epoch, round & 0x7FFFFFFF, min(first, 2**31 - 1), second

    def _pack(self, round: int, first: int, second: int, *body: np.ndarray) -> Tensor:
        parts = [np.array(self._header(round, first, second), dtype=np.int32), *(part.ravel() for part in body)]
        return torch.from_numpy(np.concatenate(parts, dtype=np.int32, casting="same_kind"))

    def _check(self, raw: Tensor, round: int) -> tuple[int, int]:
        magic, epoch, got, first, second = raw.numpy()[:HEADER].tolist()
        if magic != MAGIC_INT32:
            raise LinkError("the other side of the link does not speak this version's frames")
        if epoch != self.epoch:
            raise LinkError(f"a frame of epoch {epoch} came on the link of epoch {self.epoch}")
        if got != round & 0x7FFFFFFF:
            raise LinkError(f"the link is out of step: round {got} where {round} was due")
        return first, second


def _long(raw: Tensor) -> Tensor:
    return torch.from_numpy(raw.numpy().astype(np.int64))
