"""The rules that compare probabilities: ``rejection`` and ``block``.

Their tokens have the target's distribution; they are not plain decoding's tokens, as under ``coupled``. At temperature
0 all rules match tokens. Unlike ``coupled``, these rules trust what the draft says about its probabilities: a wrong
draft biases the output.

Three sources of noise are functions of seed and position: the candidates' (``DRAFT_STREAM``, by the root's position and
the depth), the acceptances' (``ACCEPT_STREAM``, by the root's position and the node), and the bonus token's, which is
plain decoding's and the only one the draft knows. A root's position occurs once in a request, so no noise is used again
after something that depends on it is known. Block verification needs that: it decides by candidates beyond the accepted
prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...decoding.noise import ACCEPT_STREAM, derive, uniform
from ...decoding.sampling import SamplingTensors
from ...decoding.trees.shape import TreeShape
from ...decoding.verify.block import verify_block
from ...decoding.verify.coupled import FAULT, Outcome
from ...decoding.verify.draft_probs import DraftProbs, scaled_logits
from ...decoding.verify.rejection import Siblings, draw_bonus, verify_rejection
from ..round.frames import ProbsLayout


class Judge:
    """The rule, applied to the draft's distributions.

    Args:
        rule: ``rejection`` or ``block`` (chains only).
        shape: the candidate tree.
        probs: how the draft's distributions travel.
        device: of the target.
    """

    def __init__(self, rule: str, shape: TreeShape, probs: ProbsLayout, device: torch.device | str):
        self.rule, self._device, self._probs = rule, device, probs
        self._siblings = Siblings(shape, device)

    def stacked(self, drawn_from: Sequence[DraftProbs | None]) -> DraftProbs:
        """The distributions of several trees ``[I, m]`` as one batch ``[B, I, m]`` on the host. None: the tree's
        candidates are point masses."""
        nothing = DraftProbs.nothing(self._probs.inner, self._probs.size)
        rows = [nothing if row is None else row for row in drawn_from]
        return DraftProbs(torch.stack([row.tokens for row in rows]), torch.stack([row.probs for row in rows]))

    def decide(
        self,
        matched: Outcome,
        chosen: Tensor,
        tokens: Tensor,
        logits: Tensor,
        lengths: Tensor,
        noise: Tensor,
        params: SamplingTensors,
        draft: DraftProbs,
    ) -> Outcome:
        """The outcomes: by the rule in rows that sample, ``matched`` in the others.

        Args:
            matched: the outcomes by matching, on the host.
            chosen: ``[B, W]`` on the host, the target's token after every node, or ``FAULT``.
            tokens: ``[B, W]`` on the host, the trees.
            logits: ``[B, W, V]`` of the target.
            lengths: ``[B]``, L.
            noise: ``[B, W, V]``, plain decoding's.
            params: of the rows.
            draft: ``[B, I, m]`` on the host, what the candidates were drawn from.

        Returns:
            node u and bonus token t of each row, on the host.
        """
        target_probs = scaled_logits(logits, params).softmax(-1)
        uniforms = uniform(derive(params.seed, ACCEPT_STREAM), lengths, tokens.shape[1])
        draft = DraftProbs(draft.tokens.to(self._device), draft.probs.to(self._device))
        tree = tokens.to(self._device)
        if self.rule == "block":
            law = verify_block(target_probs, tree[:, 1:], draft, uniforms[:, 1:])
        else:
            law = verify_rejection(target_probs, tree, draft, uniforms, self._siblings)
        rows = torch.arange(len(tokens), device=law.node.device)
        drawn = draw_bonus(law, noise[rows, law.node]).cpu()
        node, own = law.node.cpu(), law.own.cpu()
        # With nothing tried the law is the target's own, and so is the token: plain decoding's. A faulty row has none.
        plain = chosen.gather(1, node[:, None]).squeeze(1)
        bonus = torch.where(own | (plain == FAULT), plain, drawn)
        sampled = (params.temperature > 0).cpu()
        return Outcome(torch.where(sampled, node, matched.node), torch.where(sampled, bonus, matched.bonus))
