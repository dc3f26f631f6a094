"""Log-probabilities of tokens, from the rows before them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS_AT_ONCE = 64
"""Rows whose log-probabilities are in memory at the same time: a chunk of a prompt has many, of a large vocabulary."""


class Logprobs(NamedTuple):
    """Log-probabilities of R rows, as lists, ready for a message."""

    chosen: list[float]
    """``[R]``: log-probability of the row's token."""
    ranks: list[int]
    """``[R]``: 1 + the number of tokens that are more probable."""
    top_ids: list[list[int]]
    """``[R, n]``: the most probable tokens, best first."""
    top: list[list[float]]
    """``[R, n]``: their log-probabilities."""


def token_logprobs(logits: Tensor, tokens: list[int], count: int) -> Logprobs:
    """Returns the log-softmax of raw logits at the chosen tokens and at the ``count`` best ones. Waits for the device.

    Args:
        logits: float ``[R, V]``, straight from the model (vLLM's ``raw_logprobs``: before
            temperature, filters, penalties and biases).
        tokens: the chosen tokens, R of them.
        count: n; at most V are returned.
    """
    starts = range(0, len(tokens) or 1, ROWS_AT_ONCE)
    parts = [_some(logits[at : at + ROWS_AT_ONCE], tokens[at : at + ROWS_AT_ONCE], count) for at in starts]
    return Logprobs(*([value for part in column for value in part] for column in zip(*parts, strict=True)))


def _some(logits: Tensor, tokens: list[int], count: int) -> Logprobs:
    logprobs = logits.to(torch.float32).log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, dtype=torch.int64, device=logits.device)[:, None])
    ranks = 1 + (logprobs > chosen).sum(-1)
    best = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    return Logprobs(chosen[:, 0].tolist(), ranks.tolist(), best.indices.tolist(), best.values.tolist())
