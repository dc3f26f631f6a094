"""The wire layout of a round, declared once. All frames are flat int32 arrays of fixed size.

::

    outcome frame (verifier → draft)      header(5) · rows [B, 3]: state, node u, bonus t
    speculation frame (draft → verifier)  header(5) · nodes, guesses [B, N] · trees [B, N, W - 1]
    tree frame (draft → verifier, jit)    header(5) · trees [B, W - 1]

Under the rules that compare probabilities (``rejection``, ``block``), the draft's frames end with the distributions
that each inner node's children were drawn from: ``[B, N, I]`` of them (``[B, I]`` in a tree frame), laid out by
``ProbsLayout``.

The header holds magic, the link's epoch, the round, and two words that depend on the frame. In the outcome frame they
are the number of control messages that must have been applied, and what comes next (with the n-gram bit and the
lookahead). In the draft's frames they are the time that drafting took (µs) and 0.

Frames are numpy arrays and lists, not tensors. They are small and on the critical path of a round, and right after a
forward a call of torch takes 24 to 77 µs where one of numpy takes about 20.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from ...decoding.trees.shape import TreeShape
from ...decoding.verify.draft_probs import DraftProbs
from ...decoding.verify.rejection import inner_nodes
from ...errors import LinkError

MAGIC = 0x55D00002
HEADER = 5
NGRAM_BIT = 8
LOOKAHEAD_SHIFT = 4


class Next(IntEnum):
    """What follows an exchange."""

    ROUND = 0
    IDLE = 1
    """Nothing speculates any more: wait for control messages."""


class RowState(IntEnum):
    """The state of a slot in the outcome frame."""

    EMPTY = 0
    """No request, or one that does not speculate."""
    ACTIVE = 1
    FINISHED = 2
    """The request ended with this round: forget the slot."""
    PREFILL = 3
    """The prompt is not complete yet: nothing was decided, keep the slot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbsLayout:
    """How the draft's distributions for one tree travel: for each inner node m token ids and the bits of m float32
    weights, or the weights alone where m = V."""

    inner: int
    """I, the number of nodes with children."""
    size: int
    """m <= V."""
    vocabulary: int
    """V."""

    @property
    def whole(self) -> bool:
        """Whether a distribution covers the whole vocabulary."""
        return self.size == self.vocabulary

    @property
    def words(self) -> int:
        """Words of one tree."""
        return self.inner * self.size * (1 if self.whole else 2)

    def pack(self, draft: DraftProbs) -> Tensor:
        """Distributions ``[*R, I, m]`` as flat int32."""
        bits = draft.probs.to(torch.float32).contiguous().view(torch.int32)
        return (bits if self.whole else torch.cat([draft.tokens.to(torch.int32), bits], dim=-1)).flatten()

    def unpack(self, raw: Tensor, *shape: int) -> DraftProbs:
        """Distributions ``[*shape, I, m]``. The draft may send anything: ``DraftProbs.dense`` checks them."""
        rows = raw.view(*shape, self.inner, -1)
        bits = rows[..., -self.size :].contiguous().view(torch.float32)
        tokens = torch.arange(self.size).expand(bits.shape) if self.whole else rows[..., : self.size].long()
        return DraftProbs(tokens, bits)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutcomeFrame:
    """What a round decided, for the draft."""

    round: int
    control_count: int
    """Control messages that the draft must have applied first."""
    next: Next
    ngram: bool = False
    """Missed rows verify an n-gram where there is one."""
    lookahead: int = 0
    """How far the draft drafts from now on; 0: as deep as the tree."""
    states: list[int]
    """``[B]`` of ``RowState``."""
    nodes: list[int]
    """``[B]``, u."""
    bonus: list[int]
    """``[B]``, t."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculationSet:
    """A speculation for each forecast outcome: branch n prepares for (``nodes[n]``, ``guesses[n]``)."""

    nodes: np.ndarray
    """``[B, N]``, nodes u of the tree under verification."""
    guesses: np.ndarray
    """``[B, N]``, bonus tokens t; ``ABSENT`` where no branch was prepared."""
    trees: np.ndarray
    """``[B, N, W - 1]``, node tokens below the bonus token; ``ABSENT`` where there is none."""
    draft: DraftProbs | None = None
    """``[B, N, I, m]``, what the inner nodes' children were drawn from, under rules that need it."""


class Frames:
    """Packs and unpacks the frames of one link. Every ``unpack_*`` raises LinkError if the frame is of another version,
    epoch or round.

    Args:
        batch: B.
        branches: N.
        nodes: W.
        probs: how the draft's distributions travel; None under rules that do not need them.
        epoch: of the link.
    """

    def __init__(self, *, batch: int, branches: int, nodes: int, probs: ProbsLayout | None = None, epoch: int = 0):
        self.batch, self.branches, self.nodes, self.probs, self.epoch = batch, branches, nodes, probs, epoch
        words = probs.words if probs is not None else 0
        self.outcome_size = HEADER + batch * 3
        self.speculation_size = HEADER + batch * branches * (nodes + 1 + words)
        self.tree_size = HEADER + batch * (nodes - 1 + words)

    def new(self, size: int) -> np.ndarray:
        """An empty frame of ``size`` words."""
        return np.zeros(size, dtype=np.int32)

    def pack_outcome(self, frame: OutcomeFrame) -> np.ndarray:
        word = frame.next | NGRAM_BIT * frame.ngram | frame.lookahead << LOOKAHEAD_SHIFT
        words = self._header(frame.round, frame.control_count, word)
        for row in zip(frame.states, frame.nodes, frame.bonus, strict=True):
            words += row
        return np.array(words, dtype=np.int32)

    def unpack_outcome(self, raw: np.ndarray, round: int) -> OutcomeFrame:
        words = raw.tolist()
        control_count, word = self._check(words, round)
        lookahead, low = divmod(word, 1 << LOOKAHEAD_SHIFT)
        try:
            next_ = Next(low & ~NGRAM_BIT)
            if not 0 <= lookahead < self.nodes:
                raise ValueError
        except ValueError:
            raise LinkError(f"the verifier announced {word} as what comes next, which is unknown") from None
        return OutcomeFrame(
            round=round,
            control_count=control_count,
            next=next_,
            ngram=bool(word & NGRAM_BIT),
            lookahead=lookahead,
            states=words[HEADER::3],
            nodes=words[HEADER + 1 :: 3],
            bonus=words[HEADER + 2 :: 3],
        )

    def pack_speculation(self, speculation: SpeculationSet, round: int, spent_us: int) -> np.ndarray:
        parts = (speculation.nodes, speculation.guesses, speculation.trees)
        return self._pack(round, spent_us, *parts, *self._packed(speculation.draft))

    def unpack_speculation(self, raw: np.ndarray, round: int) -> tuple[SpeculationSet, int]:
        """The set, which shares memory with ``raw``, and the draft's time in µs."""
        spent_us, _ = self._check(raw[:HEADER].tolist(), round)
        cut, end = self.batch * self.branches, HEADER + self.batch * self.branches * (self.nodes + 1)
        outcomes = raw[HEADER : HEADER + 2 * cut].reshape(2, self.batch, self.branches)
        return SpeculationSet(
            nodes=outcomes[0],
            guesses=outcomes[1],
            trees=raw[HEADER + 2 * cut : end].reshape(self.batch, self.branches, self.nodes - 1),
            draft=self._unpacked(raw[end:], self.batch, self.branches),
        ), spent_us

    def pack_trees(
        self, trees: list[list[int]], round: int, spent_us: int, draft: DraftProbs | None = None
    ) -> np.ndarray:
        """Args:
        trees: ``[B, W - 1]``.
        draft: ``[B, I, m]``, under rules that need it.
        """
        return self._pack(round, spent_us, np.array(trees, dtype=np.int32), *self._packed(draft))

    def unpack_trees(self, raw: np.ndarray, round: int) -> tuple[list[list[int]], int]:
        """Trees ``[B, W - 1]``, and the draft's time in µs."""
        spent_us, _ = self._check(raw[:HEADER].tolist(), round)
        end = HEADER + self.batch * (self.nodes - 1)
        return raw[HEADER:end].reshape(self.batch, self.nodes - 1).tolist(), spent_us

    def unpack_tree_probs(self, raw: np.ndarray) -> DraftProbs | None:
        """The distributions ``[B, I, m]`` of a tree frame, under rules that need them."""
        return self._unpacked(raw[HEADER + self.batch * (self.nodes - 1) :], self.batch)

    def _packed(self, draft: DraftProbs | None) -> list[np.ndarray]:
        if self.probs is None:
            return []
        assert draft is not None, "under this rule, trees travel with what they were drawn from"
        return [self.probs.pack(draft).numpy()]

    def _unpacked(self, raw: np.ndarray, *shape: int) -> DraftProbs | None:
        return self.probs.unpack(torch.from_numpy(raw), *shape) if self.probs is not None else None

    def _header(self, round: int, first: int, second: int) -> list[int]:
        return [MAGIC, self.epoch, round & 0x7FFFFFFF, min(first, 2**31 - 1), second]

    def _pack(self, round: int, spent_us: int, *body: np.ndarray) -> np.ndarray:
        parts = [np.array(self._header(round, spent_us, 0), dtype=np.int32), *(part.ravel() for part in body)]
        return np.concatenate(parts, dtype=np.int32, casting="same_kind")

    def _check(self, words: list[int], round: int) -> tuple[int, int]:
        magic, epoch, got, first, second = words[:HEADER]
        if magic != MAGIC:
            raise LinkError("the other side of the link does not speak this version's frames")
        if epoch != self.epoch:
            raise LinkError(f"a frame of epoch {epoch} came on the link of epoch {self.epoch}")
        if got != round & 0x7FFFFFFF:
            raise LinkError(f"the link is out of step: round {got} where {round} was due")
        return first, second


def probs_layout(rule: str, shape: TreeShape, support: int, vocabulary: int) -> ProbsLayout | None:
    """How distributions travel under a rule; None if it needs none."""
    if rule == "coupled":
        return None
    return ProbsLayout(inner=len(inner_nodes(shape)), size=min(support, vocabulary), vocabulary=vocabulary)
