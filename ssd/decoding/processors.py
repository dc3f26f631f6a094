"""Logits processors: penalties, biases and bans, applied wherever a token is chosen.

The order is vLLM's (``vllm/v1/sample/sampler.py``): tokens that ids or a grammar do not allow are excluded, and so
are bad words, and end ids before ``min_tokens``; ``logit_bias`` is added; penalties follow, and after them
temperature, filters and noise (``sampling.py``). An excluded token has the logit -inf.

Where these exclude every token a grammar allows, a token it does not allow is chosen, and the owner of
the sequence ends it there.

A candidate's row chooses the token after its *own* path: penalties count the candidates above it,
and bad words and ``min_tokens`` see them, as if they had been decoded one by one. Counts are
integers and every operation is per element, so a row's logits are the same bits however its
history is divided into committed tokens and tokens on the path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .exclusions import EXCLUDED, BadWords, constrain, exclude, tails
from .sampling import has_operators
from .trees.shape import ABSENT, TreeShape


class Constraint(Protocol):
    """A grammar, positioned after the committed tokens. The owner of the sequence advances it by every
    committed token."""

    @property
    def complete(self) -> bool:
        """Whether the output is complete, so that nothing may follow."""
        ...

    @property
    def error(self) -> str | None:
        """Why the grammar has failed, if it has."""
        ...

    def advance(self, token: int) -> bool:
        """Advances by a committed token. Returns False, and changes nothing, if it is not allowed."""
        ...

    def allowed(self, paths: Sequence[Sequence[int]]) -> Tensor:
        """Returns the tokens that may follow the committed ones and each of R paths: ``[R, V]`` bool on the host.
        After a path that is itself not allowed, every token is."""
        ...

    def mended(self, path: Sequence[int], chain: Sequence[int]) -> list[int]:
        """Returns a guess at the tokens after the committed ones and ``path``: ``chain``, corrected by the grammar."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorSettings:
    """Processors of one sequence; ids are below the vocabulary size. The defaults do nothing."""

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    end_ids: tuple[int, ...] = ()
    """Excluded from the first ``min_tokens`` tokens."""

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)

    @property
    def biases(self) -> bool:
        """Whether some tokens' logits change by the same amount at every position."""
        return bool(self.logit_bias) or self.allowed_token_ids is not None or any(len(w) == 1 for w in self.bad_words)


class _Row:
    """Host-side state of one slot."""

    def __init__(
        self,
        settings: ProcessorSettings,
        output: Sequence[int],
        constraint: Constraint | None,
        device: torch.device | str,
    ):
        self.settings, self.constraint = settings, constraint
        longer = [word for word in settings.bad_words if len(word) > 1]
        self.words = BadWords(longer, device) if longer else None
        self.ends = torch.tensor(sorted(set(settings.end_ids)), dtype=torch.int64, device=device)
        self.generated, self.tail = 0, []
        self.extend(output)

    def extend(self, output: Sequence[int]) -> None:
        self.generated += len(output)
        if self.words is not None:
            self.tail = [*self.tail, *output][-self.words.length :]

    @property
    def too_short(self) -> bool:
        """Whether the next token must not be an end id."""
        return self.generated < self.settings.min_tokens and len(self.ends) > 0

    @property
    def active(self) -> bool:
        settings = self.settings
        excludes = self.constraint is not None or self.words is not None or self.too_short
        return settings.penalizes or settings.biases or excludes


class Processors:
    """The processors of B slots. A batch without processors costs one attribute check.

    Memory is allocated when a sequence first needs it: 5 bytes per slot and token of the vocabulary for
    penalties, 4 for biases.

    Args:
        batch: B.
        vocabulary: V.
        device: device of the logits.
    """

    def __init__(self, batch: int, vocabulary: int, device: torch.device | str):
        self._batch, self._vocabulary, self._device = batch, vocabulary, device
        self._rows: list[_Row | None] = [None] * batch
        self._slots: list[int] = []
        self._index = torch.empty(0, dtype=torch.int64, device=device)
        self._counts: Tensor | None = None
        """``[B, V]`` int32: how often a token is in the output."""
        self._in_prompt: Tensor | None = None
        """``[B, V]`` bool."""
        self._bias: Tensor | None = None
        """``[B, V]`` float32, -inf for tokens never chosen."""
        self._penalties = torch.tensor([[1.0], [0.0], [0.0]], device=device).repeat(1, batch)
        """Repetition, presence, frequency ``[3, B]`` float32; neutral where nothing is penalized."""
        self._penalizes = self._biases = False
        self.active = False
        """Whether ``apply`` has anything to do."""

    def set(
        self,
        slot: int,
        settings: ProcessorSettings,
        *,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        """Begins a sequence in a slot; waits for the device.

        Args:
            slot: 0 <= slot < B.
            settings: what the sequence asks for.
            prompt: its prompt.
            output: its committed output.
            constraint: a grammar positioned after both.
        """
        self.clear(slot)
        row = _Row(settings, output, constraint, self._device)
        self._rows[slot] = row
        if settings.penalizes:
            self._set_penalties(slot, settings, prompt, output)
        if settings.biases:
            self._set_bias(slot, settings)
        self._list_active()

    def clear(self, slot: int) -> None:
        """Ends the slot's sequence, if it has one."""
        row = self._rows[slot]
        if row is None:
            return
        self._rows[slot] = None
        if row.settings.penalizes:
            self._penalties[:, slot] = torch.tensor([1.0, 0.0, 0.0])
        if self._bias is not None and row.settings.biases:
            self._bias[slot] = 0
        self._list_active()

    def commit(self, slot: int, tokens: Sequence[int]) -> None:
        """Appends committed tokens to the slot's output, without waiting for the device. Its ``constraint`` is advanced
        by its owner."""
        row = self._rows[slot]
        if row is None or not row.active:
            return
        row.extend(tokens)
        if self._counts is not None and row.settings.penalizes:
            known = [token for token in tokens if token < self._vocabulary]
            index = torch.tensor(known, dtype=torch.int64).to(self._device, non_blocking=True)
            self._counts[slot].index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        if not row.active:
            self._list_active()

    def apply(self, logits: Tensor, paths: Tensor | None = None) -> Tensor:
        """Returns processed logits; the argument is left unchanged. Waits for the device where a grammar reads paths.

        Args:
            logits: float ``[B, R, V]``.
            paths: int64 ``[B, R, D]``, the tokens between the committed ones and each row's choice, padded with
                ``ABSENT`` on the left; None: there are none.

        Returns:
            float32 ``[B, R, V]``; rows of slots without settings are unchanged.
        """
        if not self.active:
            return logits.to(torch.float32)
        if paths is None:
            paths = torch.empty(*logits.shape[:2], 0, dtype=torch.int64, device=logits.device)
        paths = paths[self._index]
        # An invalid token belongs to a candidate that is never accepted.
        paths.masked_fill_(paths >= self._vocabulary, ABSENT)
        present = paths >= 0
        rows = logits[self._index].to(torch.float32)
        if self._biases:
            assert self._bias is not None
            rows += self._bias[self._index][:, None]
        for at, slot in enumerate(self._slots):
            row = self._rows[slot]
            assert row is not None
            if row.words is not None:
                row.words.exclude(rows[at], tails(row.tail, row.words.length, paths[at], present[at]))
            if row.too_short:
                short = row.generated + present[at].sum(-1) < row.settings.min_tokens
                exclude(rows[at], row.ends, short)
            if row.constraint is not None:
                constrain(rows[at], row.constraint, paths[at])
        if self._penalizes:
            self._penalize(rows, paths, present)
        if len(self._slots) == self._batch:
            return rows
        return logits.to(torch.float32).index_copy(0, self._index, rows)

    @property
    def constrained(self) -> bool:
        """Whether some slot has a grammar."""
        return any(row is not None and row.constraint is not None for row in self._rows)

    def fixed(self, out: Tensor) -> None:
        """Writes what ``apply`` does directly after the committed tokens, as numbers that a draft applies to all rows:
        ``x = logit + bias``, then ``x / factor`` (``x * factor`` where x <= 0), then minus ``penalty``.

        Grammars are left to ``allowed``, and bad words of several tokens are left out: a draft's proposals may be
        wrong.

        Args:
            out: float32 ``[B, 3, V]``, receives bias, factor and penalty of each token. The first factor is 0 in
                slots without settings.
        """
        out[:, 1, 0] = 0
        for slot in self._slots:
            row, (bias, factor, penalty) = self._rows[slot], out[slot]
            assert row is not None
            bias.copy_(self._bias[slot]) if self._bias is not None else bias.zero_()
            if row.too_short:
                bias[row.ends] = EXCLUDED
            factor.fill_(1.0)
            penalty.zero_()
            if row.settings.penalizes:
                assert self._counts is not None and self._in_prompt is not None
                repetition, presence, frequency = self._penalties[:, slot]
                counts = self._counts[slot]
                # Not masked_fill_: CUDA reads its value back to the host.
                factor.copy_(torch.where((counts > 0) | self._in_prompt[slot], repetition, 1.0))
                penalty.add_(frequency * counts).add_(presence * (counts > 0))

    def allowed(self, out: Tensor, paths: Tensor) -> None:
        """Writes which tokens grammars allow after each path, for slots with settings. Waits for the device.

        Args:
            out: bool ``[B, R, V]``.
            paths: as for ``apply``.
        """
        for slot, after in zip(self._slots, paths[self._index].tolist(), strict=True):
            row = self._rows[slot]
            assert row is not None
            if row.constraint is None:
                out[slot] = True
            else:
                out[slot] = row.constraint.allowed([[token for token in path if token >= 0] for path in after])

    def _penalize(self, rows: Tensor, paths: Tensor, present: Tensor) -> None:
        """Penalizes ``[A, R, V]`` in place, A active slots: repetition over prompt and output, presence and
        frequency over the output (``vllm.model_executor.layers.utils.apply_penalties``; repetition: Keskar et al.
        2019, arXiv 1909.05858, as in transformers)."""
        assert self._counts is not None and self._in_prompt is not None
        if has_operators(rows.device):
            torch.ops.ssd.penalize(rows, self._counts, self._in_prompt, self._penalties, self._index, paths)
            return
        counts = self._counts[self._index][:, None].repeat(1, rows.shape[1], 1)
        counts.scatter_add_(2, paths.clamp(min=0), present.to(counts.dtype))
        repetition, presence, frequency = self._penalties[:, self._index, None, None]
        in_output = counts > 0
        seen = in_output | self._in_prompt[self._index][:, None]
        penalized = torch.where(rows > 0, rows / repetition, rows * repetition)
        rows.copy_(torch.where(seen, penalized, rows))
        rows -= frequency * counts
        rows -= presence * in_output

    def _set_penalties(
        self, slot: int, settings: ProcessorSettings, prompt: Iterable[int], output: Iterable[int]
    ) -> None:
        if self._counts is None or self._in_prompt is None:
            shape = self._batch, self._vocabulary
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
        self._counts[slot] = self._count(output)
        self._in_prompt[slot] = self._count(prompt) > 0
        self._penalties[:, slot] = torch.tensor(
            [settings.repetition_penalty, settings.presence_penalty, settings.frequency_penalty]
        )

    def _set_bias(self, slot: int, settings: ProcessorSettings) -> None:
        if self._bias is None:
            self._bias = torch.zeros(self._batch, self._vocabulary, device=self._device)
        bias = torch.zeros(self._vocabulary)
        for token, value in settings.logit_bias:
            bias[token] = value
        if settings.allowed_token_ids is not None:
            dropped = torch.ones(self._vocabulary, dtype=torch.bool)
            dropped[list(settings.allowed_token_ids)] = False
            bias[dropped] = EXCLUDED
        for word in settings.bad_words:
            if len(word) == 1:
                bias[word[0]] = EXCLUDED
        self._bias[slot] = bias.to(self._device)

    def _count(self, tokens: Iterable[int]) -> Tensor:
        counts = torch.bincount(torch.tensor(list(tokens), dtype=torch.int64), minlength=self._vocabulary)
        return counts[: self._vocabulary].to(self._device, torch.int32)

    def _list_active(self) -> None:
        rows = [(slot, row) for slot, row in enumerate(self._rows) if row is not None and row.active]
        slots = [slot for slot, _ in rows]
        if slots != self._slots:
            self._slots, self._index = slots, torch.tensor(slots, dtype=torch.int64, device=self._device)
        self._penalizes = any(row.settings.penalizes for _, row in rows)
        self._biases = any(row.settings.biases for _, row in rows)
        self.active = bool(slots)


def processed_alike(logits: Tensor, fixed: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Returns ``logits`` ``[B, R, V]`` processed by the results of ``Processors.fixed`` ``[B, 3, V]`` and
    ``Processors.allowed`` ``[B, R, V]``."""
    bias, factor, penalty = fixed[:, :, None].unbind(1)
    biased = logits + bias
    changed = torch.where(biased > 0, biased / factor, biased * factor) - penalty
    if allowed is not None:
        changed = changed.masked_fill(~allowed, EXCLUDED)
    return torch.where(factor[..., :1] == 0, logits, changed)


class TreePaths:
    """Turns node tokens of a tree into the paths before each row's choice."""

    def __init__(self, shape: TreeShape, device: torch.device | str = "cpu"):
        depth, nodes = shape.depth, shape.nodes
        # Padded on the left, by reading a column of ABSENT that is appended to the nodes.
        rows = [[nodes] * (depth - shape.depths[node]) + list(shape.path(node)) for node in range(nodes)]
        self._index = torch.tensor(rows, dtype=torch.int64, device=device).reshape(nodes, depth)

    def of(self, tokens: Tensor) -> Tensor:
        """Returns ``[B, W, K]`` for node tokens ``[B, W]``. The root is committed, so it is on no path."""
        absent = torch.full_like(tokens[:, :1], ABSENT)
        return torch.cat([tokens, absent], dim=1)[:, self._index]
