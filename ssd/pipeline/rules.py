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

from ..decoding.block import verify_block
from ..decoding.forecast import Forecast
from ..decoding.noise import ACCEPT_STREAM, DRAFT_STREAM, derive, gumbel_at, uniform
from ..decoding.rejection import Siblings, draw_bonus, inner_nodes, verify_rejection
from ..decoding.saguaro import downscale
from ..decoding.sampling import SamplingTensors
from ..decoding.support import DraftProbs, scaled_logits
from ..decoding.tree import ABSENT, TreeShape
from ..decoding.verify import Outcome
from .frames import ProbsLayout


class CandidateSampler:
    """The draft's half: candidates drawn from a distribution that goes along with them.

    Args:
        shape: a comb. forecast: whose fan-out says how many tokens are scaled. probs: how many
            tokens a distribution keeps, and how it travels. scale: C of Saguaro sampling.
    """

    def __init__(self, shape: TreeShape, forecast: Forecast, probs: ProbsLayout, *, scale: float = 1.0):
        self.probs, self._scale = probs, scale
        self._width = 1 + max(shape.siblings)
        self._fan_out = [forecast.fan_out[node] for node in shape.chain]

    def nothing(self, *shape: int) -> DraftProbs:
        """For ``shape`` trees: they were not drawn."""
        return DraftProbs.nothing(*shape, self.probs.inner, self.probs.size)

    def children(self, logits: Tensor, params: SamplingTensors, roots: Tensor, depth: int) -> tuple[Tensor, DraftProbs]:
        """Candidates below chain nodes of one depth.

        Args:
            logits: ``[B, R, V]`` of the draft after them. roots: ``[B, R]`` int64, position of each
                tree's root. depth: of the nodes the candidates continue.

        Returns:
            tokens ``[B, R, n]``, the chain's first, as many as the widest depth has, and what they were drawn from
            ``[B, R, m]``. In rows of temperature 0: the best tokens, drawn from nothing.
        """
        best = logits.topk(self._width, dim=-1)
        named = best.indices.masked_fill(best.values == -torch.inf, ABSENT)
        scaled = downscale(scaled_logits(logits, params), self._fan_out[depth], self._scale)
        draft = DraftProbs.of_logits(scaled, self.probs.size)
        seeds = derive(params.seed[:, None], DRAFT_STREAM, roots)
        noise = gumbel_at(seeds, torch.full_like(roots, depth), draft.tokens)
        sampled = (params.temperature > 0)[:, None, None]
        tokens = torch.where(sampled, draft.draw(noise, self._width), named)
        return tokens, DraftProbs(draft.tokens, draft.probs * sampled)


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


def probs_layout(rule: str, shape: TreeShape, support: int, vocabulary: int) -> ProbsLayout | None:
    """How distributions travel under a rule; None if it needs none."""
    if rule == "coupled":
        return None
    return ProbsLayout(inner=len(inner_nodes(shape)), size=min(support, vocabulary), vocabulary=vocabulary)


def stacked(steps: list[DraftProbs], depth: int) -> DraftProbs:
    """The distributions of each depth drafted ``[B, R, m]`` as those of combs of ``depth``
    ``[B, R, I, m]``, on the host, ready to be sent. Nothing was drawn below."""
    last = steps[-1]
    steps = [*steps, *[DraftProbs(torch.zeros_like(last.tokens), torch.zeros_like(last.probs))] * (depth - len(steps))]
    return DraftProbs(
        torch.stack([step.tokens for step in steps], dim=2).cpu(),
        torch.stack([step.probs for step in steps], dim=2).cpu(),
    )
