"""Method ``self``: the target with sublayers skipped drafts for its own verification (``models.skipping``).

It runs over the verifier's own slots. A step at position P attends the slots below P (verified keys up to L, its own
from there on) and writes slot P in the layers it runs. Nothing it writes outlives the round: verification runs the root
and all K chain rows, and so writes the slots L to L + K of every layer before any row attends them.

No result of a step is kept for verification, not even after an early exit, where verification repeats the layers before
the exit on the same inputs. Where forwards are padded, a kept key would have to come from a forward of verification's
width, and K + 1 such steps cost more than the K narrow ones and the repeated layers. Elsewhere it would save next to
nothing (docs/self_speculation.md has the sums).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...decoding.trees.combs import best_tokens, comb_tokens
from ...decoding.trees.shape import ABSENT, TreeShape
from ...models.runner import ForwardRunner
from ..policy.governor import Governor, RoundResult
from ..round.candidates import CandidateOrigin
from ..round.verdict import Verdict
from ..sampling.scorers import LikelyScorer, Requested
from ..sampling.slots import SlotSampling
from ..sampling.walk import ChainSteps, Frontier, Walk, after, fused_forward, walked
from .judge import Judge
from .sequence import TargetSequence

Step = Callable[..., tuple[Tensor, Tensor, Tensor]]


class SelfDraft:
    """Proposes trees for the verifier's rows.

    Args:
        runner: of the target with sublayers skipped, over the verifier's slots.
        shape: the candidate tree.
        sampling: the verifier's sampling state.
        confidence: a chain ends with the first token whose probability, by the draft, is below this; that token is
            still verified (Draft & Verify, arXiv 2309.08168).
        judge: under ``rejection`` and ``block``. Candidates take the target's noise without a judge. With one they are
            the draft's best tokens, which depend on certain tokens alone: point masses.
        governed: whether to decode plainly while this draft is not profitable.
    """

    def __init__(
        self,
        runner: ForwardRunner,
        *,
        shape: TreeShape,
        sampling: SlotSampling,
        confidence: float,
        judge: Judge | None = None,
        governed: bool = False,
    ):
        self.runner, self.shape, self._sampling = runner, shape, sampling
        self._confidence, self._judge = confidence, judge
        self.governor = Governor() if governed else None
        self._chain, self._width = ChainSteps("self"), 1 + max(shape.siblings)
        self._steps: dict[int, Step] = {}
        self._zero_noise = torch.zeros(runner.batch, 1, runner.vocabulary, device=runner.device)

    def warm_up(self) -> None:
        """Compiles the step for every context tier."""
        lengths = torch.zeros(self.runner.batch, dtype=torch.int64, device=self.runner.device)
        requested = Requested(self._sampling.packed, self._zero_noise)
        for context in self.runner.contexts:
            self._step(context)(lengths[:, None], lengths, requested)

    def calibrate(self, plain_s: float, verify_s: float) -> None:
        """Sets the seconds of a plain forward and of one that verifies."""
        if self.governor is not None:
            self.governor.share = min(1.0, plain_s / verify_s)

    def fill(
        self,
        rows: Sequence[TargetSequence | None],
        trees: list[list[int]],
        origins: list[CandidateOrigin],
        lengths: Tensor,
    ) -> float:
        """Puts candidates below the roots of the rows of method ``self``.

        Args:
            rows: ``[B]``, those that decode.
            trees: ``[B][W]``, filled in place.
            origins: ``[B]``, of the candidates, filled in place.
            lengths: ``[B]``, L of every slot.

        Returns:
            the seconds it took.
        """
        wanted = [row is not None and row.method == "self" for row in rows]
        if not any(wanted) or (self.governor is not None and not self.governor.speculating):
            return 0.0
        began = time.perf_counter()
        longest = max(len(row.tokens) for row in rows if row is not None)
        roots = torch.tensor([[max(tree[0], 0)] for tree in trees]).to(lengths.device)
        proposed = self.propose(roots, lengths, wanted, longest).tolist()
        for slot in (slot for slot, drafts in enumerate(wanted) if drafts):
            trees[slot][1:], origins[slot] = proposed[slot], "self"
        return time.perf_counter() - began

    def observe(self, verdict: Verdict, seconds: float) -> None:
        """Shows the governor a round and the seconds it took."""
        commits = verdict.commits
        if self.governor is not None and commits and all(commit.method == "self" for commit in commits):
            tokens, wide = sum(len(commit.tokens) for commit in commits), any(commit.drafted for commit in commits)
            spent = {"seconds": seconds, "waited_s": verdict.self_draft_s, "forward_s": verdict.forward_s}
            self.governor.observe(RoundResult(tokens=tokens, rows=len(commits), wide=wide, **spent))

    @torch.no_grad()
    def propose(self, roots: Tensor, lengths: Tensor, wanted: Sequence[bool], longest: int) -> Tensor:
        """Drafts a chain per row, with siblings.

        Args:
            roots: ``[B, 1]`` int64, the root of every slot.
            lengths: ``[B]`` int64, L.
            wanted: ``[B]``, the rows that get candidates.
            longest: the greatest L of a row that decodes.

        Returns:
            trees ``[B, W - 1]`` on the host, ``ABSENT`` in other rows and below the end of a chain.
        """
        sampling = self._sampling
        noise = sampling.noise(lengths) if self._judge is None else None
        exact = sampling.processors.active or (noise is not None and not sampling.plain)
        going = torch.tensor(wanted, device=roots.device)

        def step(number: int, frontier: Frontier) -> tuple[Tensor, Frontier]:
            nonlocal going
            own_noise = self._zero_noise if noise is None else noise[:, number : number + 1]
            run = self._step(self.runner.context_for(longest + number + 1))
            logits, children, sure = run(frontier.fed, lengths + number, Requested(sampling.packed, own_noise))
            if exact:
                if noise is None:
                    processed = scores = sampling.processed(logits, frontier.paths)
                else:
                    processed, scores = sampling.exact(logits, noise, number, frontier.paths)
                children = best_tokens(scores, self._width)
                sure = _confidence(processed, children)
            shown = children.masked_fill(~going[:, None, None], ABSENT)
            going = going & (sure >= self._confidence)
            return shown, after(frontier, children[..., 0])

        paths = roots.new_empty(len(roots), 1, 0) if exact else None
        frontier = Frontier(roots, torch.zeros_like(roots), paths=paths)
        ranked = walked(step, frontier, self.shape.depth, lambda: not going.any())
        return comb_tokens(ranked, self.shape.siblings)[:, 0].cpu()

    def _step(self, context: int) -> Step:
        """Returns the compiled step at one context tier: from fed tokens ``[B, 1]``, lengths ``[B]`` and ``Requested``
        (noise ``[B, 1, V]``) to logits ``[B, 1, V]``, candidates ``[B, 1, n]`` and the confidence ``[B]`` in the
        first."""
        if context not in self._steps:
            runner, sampling, chain, width = self.runner, self._sampling, self._chain, self._width

            def skipped_step(fed: Tensor, lengths: Tensor, requested: Requested) -> tuple[Tensor, Tensor, Tensor]:
                scorer = LikelyScorer(sampling, width, requested)
                walk = Walk(chain.rows, fused_forward(runner, lengths, context, None), scorer)
                rows = chain.rows(0, fed)
                logits = walk.logits(rows, fed, None)
                children = scorer.children(logits, rows, None)
                return logits, children, _confidence(logits, children)

            self._steps[context] = runner.compiled(skipped_step)
        return self._steps[context]


def _confidence(logits: Tensor, children: Tensor) -> Tensor:
    """Returns the probability ``[B]`` of the chain's token ``children[:, 0, 0]``, before temperature."""
    return logits[:, 0].softmax(-1).gather(-1, children[:, 0, :1].clamp(min=0)).squeeze(-1)
