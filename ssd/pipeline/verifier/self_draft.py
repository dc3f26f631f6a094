"""Method ``self``: the target with sublayers skipped drafts for its own verification (``models.skipping``).

It runs over the verifier's own slots. A step at position P attends the slots below P (verified keys up to L,
its own from there on) and writes slot P in the layers it runs. Nothing it writes outlives the round: verification
runs the root and all K chain rows, and so writes the slots L .. L+K of every layer before any row attends them.

Nothing of a step is kept for verification, not even after an early exit, where the layers before the exit see
what they will see again. Where forwards are padded, a kept key would have to come from one of the verification's own
rows; K + 1 such steps cost more than the K narrow ones and the layers once more, and elsewhere next to nothing
is saved (docs/self_speculation.md has the sums).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...decoding.sampling import scores
from ...decoding.trees.combs import best_tokens, comb_tokens
from ...decoding.trees.shape import ABSENT, TreeShape
from ...models.rows import RowPlan
from ...models.runner import ForwardRunner
from ..policy.governor import Governor, RoundResult
from ..round.candidates import CandidateOrigin
from ..round.verdict import Verdict
from ..sampling.slots import Chooser
from .judge import Judge
from .sequence import TargetSequence


class SelfDraft:
    """Proposes trees for the verifier's rows.

    Args:
        runner: of the target with sublayers skipped, over the verifier's slots.
        chooser: the verifier's. confidence: a chain ends with the first token whose probability, by the draft,
            is below it; that token is still verified (Draft & Verify, arXiv 2309.08168).
        judge: under ``rejection`` and ``block``. Candidates take the target's noise without one; with one they
            are the draft's best tokens, named by a rule that looks at certain tokens alone: point masses.
        governed: decode plainly while this does not pay.
    """

    def __init__(
        self,
        runner: ForwardRunner,
        *,
        shape: TreeShape,
        chooser: Chooser,
        confidence: float,
        judge: Judge | None = None,
        governed: bool = False,
    ):
        self.runner, self.shape, self._chooser = runner, shape, chooser
        self._confidence, self._judge = confidence, judge
        self.governor = Governor() if governed else None
        self._plan = RowPlan.sequential("self", 1)
        self._width = 1 + max(shape.siblings)
        self._steps: dict[int, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {}
        self._silence = torch.zeros(runner.batch, 1, runner.vocabulary, device=runner.device)

    def warm_up(self) -> None:
        """Compile the step at every context."""
        nothing = torch.zeros(self.runner.batch, dtype=torch.int64, device=self.runner.device)
        for context in self.runner.contexts:
            self._step(context, nothing[:, None], nothing, None)

    def calibrate(self, plain_s: float, verify_s: float) -> None:
        """Set what a plain forward costs, and one that verifies."""
        if self.governor is not None:
            self.governor.share = min(1.0, plain_s / verify_s)

    def fill(
        self,
        rows: Sequence[TargetSequence | None],
        trees: list[list[int]],
        origins: list[CandidateOrigin],
        lengths: Tensor,
    ) -> float:
        """Put candidates below the roots of ``trees [B][W]`` (in place) in the rows of method ``self``.

        Args: lengths: ``[B]``, L of every slot. Returns: the seconds it took.
        """
        wanted = [row is not None and row.method == "self" for row in rows]
        if not any(wanted) or (self.governor is not None and not self.governor.speculating):
            return 0.0
        began = time.perf_counter()
        longest = max(len(row.tokens) for row in rows if row is not None)
        roots = torch.tensor([[max(tree[0], 0)] for tree in trees]).to(lengths.device)
        found = self.propose(roots, lengths, wanted, longest).tolist()
        for slot in (slot for slot, own in enumerate(wanted) if own):
            trees[slot][1:], origins[slot] = found[slot], "self"
        return time.perf_counter() - began

    def observe(self, verdict: Verdict, seconds: float) -> None:
        """Show the governor how a round went that took so long."""
        commits = verdict.commits
        if self.governor is not None and commits and all(commit.method == "self" for commit in commits):
            tokens, wide = sum(len(commit.tokens) for commit in commits), any(commit.drafted for commit in commits)
            spent = {"seconds": seconds, "waited_s": verdict.self_draft_s, "forward_s": verdict.forward_s}
            self.governor.observe(RoundResult(tokens=tokens, rows=len(commits), wide=wide, **spent))

    @torch.no_grad()
    def propose(self, roots: Tensor, lengths: Tensor, wanted: Sequence[bool], longest: int) -> Tensor:
        """Candidates for the rows that want them.

        Args:
            roots: ``[B, 1]`` int64, the root of every slot. lengths: ``[B]`` int64, L. longest: the greatest L of
                a row that decodes.

        Returns:
            trees ``[B, W - 1]`` on the host, ``ABSENT`` in other rows and after the end of a chain.
        """
        chooser, ranked = self._chooser, []
        noise = chooser.noise(lengths) if self._judge is None else None
        anew = chooser.processors.active or (noise is not None and not chooser.plain)
        fed, going = roots, torch.tensor(wanted, device=roots.device)
        paths = fed.new_empty(len(fed), 1, 0)
        for step in range(self.shape.depth):
            ahead = None if noise is None else noise[:, step : step + 1]
            logits, found, sure = self._step(self.runner.context_for(longest + step + 1), fed, lengths + step, ahead)
            if anew:
                logits = chooser.processed(logits, paths)
                scored = logits if noise is None else scores(logits, chooser.params, ahead)
                found = best_tokens(scored, self._width)
                sure = _confidence(logits, found)
                paths = torch.cat([paths, found[..., 0][..., None]], dim=-1)
            ranked.append(found.masked_fill(~going[:, None, None], ABSENT))
            fed, going = found[..., 0].clamp(min=0), going & (sure >= self._confidence)
            if not going.any():
                break
        return comb_tokens(ranked, self.shape.siblings)[:, 0].cpu()

    def _step(self, context: int, fed: Tensor, lengths: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[B, 1, V]``, the best tokens ``[B, 1, 1 + s]`` and the confidence in the first ``[B]``."""
        step = self._steps.get(context)
        if step is None:
            runner, plan, width, chooser = self.runner, self._plan, self._width, self._chooser

            def skipped_step(
                fed: Tensor, lengths: Tensor, packed: Tensor, noise: Tensor
            ) -> tuple[Tensor, Tensor, Tensor]:
                logits = runner.logits(plan, fed, lengths, context)
                found = best_tokens(chooser.score(logits, noise, torch.zeros_like(fed), packed), width)
                return logits, found, _confidence(logits, found)

            step = self._steps[context] = runner.compiled(skipped_step)
        quiet = self._silence if noise is None else noise
        return step(fed, lengths, self._chooser.packed, quiet)


def _confidence(logits: Tensor, found: Tensor) -> Tensor:
    """Probability ``[B]`` of the chain's token ``found[:, 0, 0]``, before temperature."""
    return logits[:, 0].softmax(-1).gather(-1, found[:, 0, :1].clamp(min=0)).squeeze(-1)
