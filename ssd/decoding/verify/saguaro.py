"""Saguaro sampling: a draft that leaves room for its own forecast.

After a rejection the bonus token is drawn from ``(target_probs - draft_probs)+``. Scaling the
draft's weights of exactly the tokens the forecast will guess by C < 1 before drawing moves that
residual onto them: more hits, for a lower acceptance rate Σ min(target, draft). Worth it where
the residual is diffuse, at high temperature; pointless at temperature 0.

Source: Saguaro (Kumar, Dao, May 2026, arXiv 2603.03251), Definition 14.
"""

from __future__ import annotations

import math

from torch import Tensor


def downscale(logits: Tensor, count: int, scale: float) -> Tensor:
    """Weights of the ``count`` most probable tokens times ``scale``.

    Args:
        logits: ``[*R, V]`` float, over temperature. count: how many guesses the forecast makes
            after this node, >= 0. scale: C in (0, 1]; 1 changes nothing.

    Returns:
        ``[*R, V]``. The scaled row is the draft's distribution from here on: it travels with the
        candidates. Were draft and verifier to scale each for itself, a tie at the edge of the top
        ``count`` could fall differently and the output would be biased.

    Raises:
        ValueError: scale or count out of range.

    The tokens to scale are picked by probability, never by the noise of the bonus token, although
    the forecast's guesses are ranked with it: then the distribution judged by would depend on the
    noise its residual is drawn with, and the output would be biased (``tests/unit/test_laws.py``).
    """
    if not 0 < scale <= 1 or count < 0:
        raise ValueError(f"scale must be in (0, 1] and count >= 0, not {scale} and {count}")
    if scale == 1 or count == 0:
        return logits
    top = logits.topk(min(count, logits.shape[-1]), dim=-1).indices
    return logits.scatter_add(-1, top, logits.new_full((), math.log(scale)).expand(top.shape))
