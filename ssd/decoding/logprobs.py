"""Log-probabilities of emitted tokens, from the rows that verified them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    logprobs = logits.to(torch.float32).log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, dtype=torch.int64, device=logits.device)[:, None])
    ranks = 1 + (logprobs > chosen).sum(-1)
    best = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    return Logprobs(chosen[:, 0].tolist(), ranks.tolist(), best.indices.tolist(), best.values.tolist())
