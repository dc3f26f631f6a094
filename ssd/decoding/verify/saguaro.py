"""Saguaro sampling: a draft that trades acceptance for hits of its forecast.

After a rejection the bonus token is drawn from ``(target_probs - draft_probs)+``. The draft scales the
weights of exactly the tokens that the forecast will guess by C < 1 before it draws, which moves that
residual onto them: more hits, for a lower acceptance rate Σ min(target, draft). It helps where
the residual is diffuse, at high temperature, and is pointless at temperature 0.

Source: Saguaro (Kumar, Dao, May 2026, arXiv 2603.03251), Definition 14.
"""

from __future__ import annotations

import math

from torch import Tensor


def downscale(logits: Tensor, count: int, scale: float) -> Tensor:
    """Multiplies the weights of the ``count`` most probable tokens by ``scale``.

    Args:
        logits: ``[*R, V]`` float, divided by the temperature.
        count: guesses of the forecast after this node, >= 0.
        scale: C in (0, 1]; 1 changes nothing.

    Returns:
        ``[*R, V]``. The scaled row is the draft's distribution from here on, and travels with the
        candidates. If draft and verifier both scaled, a tie at the edge of the top ``count`` could
        be resolved differently, and the output would be biased.

    Raises:
        ValueError: scale or count is out of range.

    The tokens are chosen by probability, never by the noise of the bonus token, although the forecast
    ranks its guesses with that noise. Otherwise the draft's distribution would depend on the noise that its
    residual is drawn with, and the output would be biased (``tests/unit/decoding/test_laws.py``).
    """
    if not 0 < scale <= 1 or count < 0:
        raise ValueError(f"scale must be in (0, 1] and count >= 0, not {scale} and {count}")
    if scale == 1 or count == 0:
        return logits
    top = logits.topk(min(count, logits.shape[-1]), dim=-1).indices
    return logits.scatter_add(-1, top, logits.new_full((), math.log(scale)).expand(top.shape))
