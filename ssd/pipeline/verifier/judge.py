"""Verification rules that compare probabilities, in the pipeline: the draft's and the verifier's half.

Under ``rejection`` and ``block`` the emitted tokens have the target's *law*; they are not the tokens
of plain decoding (``coupled`` gives those). At temperature 0 all rules are one: rows of temperature
0 are verified by matching here too, whatever the draft says of its probabilities. So "identical"
in ``ssd compare`` can be asked for at temperature 0 only.

Three sources of noise, all functions of (seed, position): the candidates' (``DRAFT_STREAM``, keyed
by the root's position and the depth below it), the acceptances' (``ACCEPT_STREAM``, keyed by the
root's position and the node), and the bonus token's, which is plain decoding's own noise at the
bonus token's position. A root's position occurs once in a request, so nothing is ever used again
after something that depends on it was seen: block verification decides by candidates beyond the
accepted prefix, whose noise the next round's candidates at those positions must not share. The
bonus token's noise is known to the draft: it forecasts with it (and only that).

A draft that lies about its probabilities biases the output: unlike ``coupled``, these rules trust it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...decoding.noise import ACCEPT_STREAM, derive, uniform
from ...decoding.sampling import SamplingTensors
from ...decoding.trees.shape import TreeShape
from ...decoding.verify.block import verify_block
from ...decoding.verify.coupled import Outcome
from ...decoding.verify.draft_probs import DraftProbs, scaled_logits
from ...decoding.verify.rejection import Siblings, draw_bonus, verify_rejection
from ..round.frames import ProbsLayout


class Judge:
    """The verifier's half: the draft's distributions of the trees under verification, and the rule.

    Args:
        rule: ``rejection`` or ``block`` (chains only).
    """

    def __init__(self, rule: str, shape: TreeShape, probs: ProbsLayout, *, batch: int, device: torch.device | str):
        self.rule, self._device = rule, device
        self._siblings = Siblings(shape, device)
        self._draft = DraftProbs.nothing(batch, probs.inner, probs.size)  # on the host, where frames arrive

    def take(self, branches: Sequence[int | None], draft: DraftProbs | None) -> None:
        """The next trees are these branches' (None: a miss): keep their distributions, of all ``[B, N, I, m]``."""
        assert draft is not None, "this rule's trees travel with what they were drawn from"
        self._draft = draft[torch.arange(len(branches)), torch.tensor([branch or 0 for branch in branches])]

    def fill(self, missed: Sequence[bool], draft: DraftProbs) -> None:
        """``[B]``: in these rows the tree was drafted now, from ``draft`` ``[B, I, m]``."""
        at = torch.tensor(missed)[:, None, None]
        self._draft = DraftProbs(
            torch.where(at, draft.tokens, self._draft.tokens), torch.where(at, draft.probs, self._draft.probs)
        )

    def name(self, slot: int) -> None:
        """The slot's tree was named by a rule known to all (an n-gram), not drawn: point masses."""
        nothing = DraftProbs.nothing(1, *self._draft.tokens.shape[1:])
        self._draft.tokens[slot], self._draft.probs[slot] = nothing.tokens[0], nothing.probs[0]

    def decide(
        self,
        matched: Outcome,
        chosen: Tensor,
        tokens: Tensor,
        logits: Tensor,
        lengths: Tensor,
        noise: Tensor,
        params: SamplingTensors,
    ) -> Outcome:
        """The outcome: by the rule in rows that sample, ``matched`` in the others.

        Args:
            matched: by matching. chosen, tokens: ``[B, W]``, the target's token after every node and the
                tree. logits: ``[B, W, V]`` of the target. lengths: ``[B]``, L. noise: ``[B, W, V]``, plain
                decoding's.
        """
        target_probs = scaled_logits(logits, params).softmax(-1)
        uniforms = uniform(derive(params.seed, ACCEPT_STREAM), lengths, tokens.shape[1])
        draft = DraftProbs(self._draft.tokens.to(self._device), self._draft.probs.to(self._device))
        tree = tokens.to(self._device)
        if self.rule == "block":
            law = verify_block(target_probs, tree[:, 1:], draft, uniforms[:, 1:])
        else:
            law = verify_rejection(target_probs, tree, draft, uniforms, self._siblings)
        rows = torch.arange(len(tokens), device=law.node.device)
        drawn = draw_bonus(law, noise[rows, law.node]).cpu()
        node, own = law.node.cpu(), law.own.cpu()
        # With nothing tried the law is the target's own, and so is the token: plain decoding's.
        bonus = torch.where(own, chosen.gather(1, node[:, None]).squeeze(1), drawn)
        sampled = (params.temperature > 0).cpu()
        return Outcome(torch.where(sampled, node, matched.node), torch.where(sampled, bonus, matched.bonus))
