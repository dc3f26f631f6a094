"""Known bugs in the rules and in how the pipeline uses them; the others stand in ``mutants``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...decoding.noise import DRAFT_STREAM
from ...decoding.trees.shape import ABSENT
from ...decoding.verify import block, rejection
from ...decoding.verify import coupled as verification
from ...decoding.verify.coupled import Outcome
from ...decoding.verify.draft_probs import DraftProbs, scaled_logits
from ...pipeline.draft import sampler
from ...pipeline.draft import worker as draft
from ...pipeline.verifier import judge
from .seeding import EQUAL, OWN_DISTRIBUTIONS, STREAMS, UNIFORMS, Seeding, joint_of, law_of, mutant


@mutant("residual of another node", law_of("rejection"))
def _residual(seeding: Seeding) -> None:
    """Rejection: the bonus token is drawn from the residual one node off."""
    honest = rejection.node_laws

    def wrong(*given: Any) -> rejection.NodeLaws:
        laws = honest(*given)
        return laws._replace(bonus=laws.bonus.roll(1, dims=1))

    seeding.everywhere(honest, wrong)


@mutant("residual of another prefix", law_of("block"))
def _block_residual(seeding: Seeding) -> None:
    """Block: the bonus token is drawn from the residual one prefix off."""
    honest = block.prefix_laws

    def wrong(*given: Any) -> block.PrefixLaws:
        laws = honest(*given)
        return laws._replace(bonus=laws.bonus.roll(1, dims=1))

    seeding.everywhere(honest, wrong)


@mutant("bonus from the target after a rejection", law_of("rejection"), joint_of("rejection"))
def _careless(seeding: Seeding) -> None:
    """Rejection: no residual, the target's own law."""
    honest = rejection.verify_rejection

    def wrong(target_probs: Tensor, *rest: Any) -> rejection.BonusLaw:
        law = honest(target_probs, *rest)
        return law._replace(probs=target_probs[torch.arange(len(law.node)), law.node])

    seeding.everywhere(honest, wrong)


@mutant("accepting at ratio 0", "decoding/test_laws.py::test_nothing_passes_at_ratio_zero")
def _ratio_zero(seeding: Seeding) -> None:
    """``uniform <= ratio`` instead of ``<``."""
    honest = rejection.verify_rejection

    def wrong(probs: Tensor, tokens: Tensor, drawn: DraftProbs, uniforms: Tensor, siblings: Any) -> Any:
        return honest(probs, tokens, drawn, uniforms.nextafter(torch.full_like(uniforms, -1)), siblings)

    seeding.everywhere(honest, wrong)


@mutant("block stops at the first refusal", law_of("block"))
def _first_refusal(seeding: Seeding) -> None:
    """Block: the first prefix that fails ends it, not the longest that passes."""
    honest = block.verify_block

    def wrong(probs: Tensor, tokens: Tensor, drawn: DraftProbs, uniforms: Tensor) -> rejection.BonusLaw:
        passed = (uniforms < block.prefix_laws(probs, tokens, drawn).accept).long().cumprod(-1)
        return honest(probs, tokens, drawn, torch.where(passed.bool(), uniforms, 1.0))

    seeding.everywhere(honest, wrong)


@mutant("siblings tried out of order", law_of("rejection", "comb 2+1"))
def _out_of_order(seeding: Seeding) -> None:
    """Rejection: a node's children are tried last drawn first."""
    honest = rejection.Siblings.__init__

    def wrong(self: rejection.Siblings, *given: Any) -> None:
        honest(self, *given)
        self.table = self.table.flip(1)

    seeding.put(rejection.Siblings, "__init__", wrong)


@mutant("draft not renormalised after a sibling", law_of("rejection", "comb 2+1"))
def _not_renormalised(seeding: Seeding) -> None:
    """Rejection: what is left of the draft's distribution does not sum to 1."""
    seeding.put(rejection, "normalized", lambda rows: rows)


@mutant("bonus from the wrong row", law_of("coupled"), EQUAL)
def _wrong_row(seeding: Seeding) -> None:
    """Coupled: the target's token after the node before the last accepted one."""
    honest = verification.verify_coupled

    def wrong(tokens: Tensor, chosen: Tensor, *shape: Tensor) -> Outcome:
        node = honest(tokens, chosen, *shape).node
        return Outcome(node, chosen.gather(1, (node[:, None] - 1).clamp(min=0)).squeeze(1))

    seeding.everywhere(honest, wrong)


@mutant("candidate compared with its own row", law_of("coupled"), EQUAL)
def _wrong_parent(seeding: Seeding) -> None:
    """Coupled: a node is matched with the target's token after itself, not after its parent."""
    honest = verification.verify_coupled

    def wrong(tokens: Tensor, chosen: Tensor, parents: Tensor, *shape: Tensor) -> Outcome:
        return honest(tokens, chosen, torch.arange(len(parents)), *shape)

    seeding.everywhere(honest, wrong)


# Their use in the pipeline.


@mutant("temperature on one side only", joint_of("rejection"))
def _one_sided(seeding: Seeding) -> None:
    """Rejection: the target is judged at temperature 1, whatever was asked for."""
    honest: Any = judge.Judge.decide

    def wrong(self: judge.Judge, *given: Any) -> Outcome:
        *others, params, draft = given
        params = replace(params, temperature=params.temperature.clamp(max=1))
        return honest(self, *others, params, draft)

    seeding.put(judge.Judge, "decide", wrong)


@mutant("argmax-match above temperature 0", joint_of("rejection"))
def _argmax_match(seeding: Seeding) -> None:
    """Rejection: a candidate is accepted iff it is the target's most probable token."""

    def wrong(self: judge.Judge, _matched: Outcome, chosen: Tensor, tokens: Tensor, logits: Tensor, *_: Any) -> Outcome:
        best, table = logits.argmax(-1).cpu(), self._siblings
        parents = (table.depths - 1).clamp(min=0)  # of chains
        node = verification.verify_coupled(tokens, best, parents, table.depths, table.ancestors).node
        return Outcome(node, chosen.gather(1, node[:, None]).squeeze(1))

    seeding.put(judge.Judge, "decide", wrong)


@mutant("swapped rows: distributions", OWN_DISTRIBUTIONS)
def _swapped_distributions(seeding: Seeding) -> None:
    """Rejection: a row is judged by what its neighbour's candidates were drawn from."""
    honest = judge.Judge.stacked

    def wrong(self: judge.Judge, drawn_from: Any) -> DraftProbs:
        draft = honest(self, drawn_from)
        return draft[torch.arange(len(draft.tokens)).roll(1)]

    seeding.put(judge.Judge, "stacked", wrong)


@mutant("Saguaro's set recomputed", joint_of("block, scaled"))
def _unscaled(seeding: Seeding) -> None:
    """The scaled row is drawn from, and the unscaled one is told."""
    honest = sampler.CandidateSampler.children

    def wrong(self: sampler.CandidateSampler, logits: Tensor, params: Any, *given: Any) -> tuple[Tensor, DraftProbs]:
        tokens, drawn = honest(self, logits, params, *given)
        plain = scaled_logits(logits, params).softmax(-1).gather(-1, drawn.tokens)
        return tokens, DraftProbs(drawn.tokens, rejection.normalized(plain))

    seeding.put(sampler.CandidateSampler, "children", wrong)


@mutant("one uniform for a whole chain", UNIFORMS)
def _one_uniform(seeding: Seeding) -> None:
    """Rejection and block: all candidates are accepted by the same number."""
    honest = judge.uniform
    seeding.put(judge, "uniform", lambda *given: honest(*given)[:, :1].repeat(1, given[2]))


@mutant("uniforms used again by the next round", UNIFORMS)
def _uniforms_again(seeding: Seeding) -> None:
    """Rejection and block: uniforms of the request, not of the round."""
    honest = judge.uniform
    seeding.put(judge, "uniform", lambda seeds, lengths, count: honest(seeds, lengths * 0, count))


def _candidate_noise(seeding: Seeding, stream: Callable[[Tensor], Tensor]) -> None:
    """Candidates drawn with noise keyed by ``stream(seeds)`` and their own position."""
    derive, gumbel_at = sampler.derive, sampler.gumbel_at
    roots: list[Tensor] = []

    def wrong(seeds: Tensor, *words: Any) -> Tensor:
        if words[0] != DRAFT_STREAM:
            return derive(seeds, *words)
        roots[:] = [words[1]]
        return stream(seeds).expand(words[1].shape)

    seeding.put(sampler, "derive", wrong)
    seeding.put(sampler, "gumbel_at", lambda seeds, depth, tokens: gumbel_at(seeds, roots[0] + 1 + depth, tokens))


@mutant("candidates drawn with the bonus token's noise", STREAMS)
def _shared_noise(seeding: Seeding) -> None:
    """Rejection and block: no stream of the draft's own."""
    _candidate_noise(seeding, lambda seeds: seeds)


@mutant("candidates' noise used again by the next round", STREAMS)
def _noise_again(seeding: Seeding) -> None:
    """Block: keyed by a candidate's position, not by its root's."""
    derive = sampler.derive
    _candidate_noise(seeding, lambda seeds: derive(seeds, DRAFT_STREAM))


@mutant("early stop without verifying", joint_of("rejection"))
def _discarded(seeding: Seeding) -> None:
    """A candidate is thrown away because the draft had little confidence in it."""
    speculate, draft_now = draft.DraftWorker.speculate, draft.DraftWorker.draft_now

    def kept(trees: Tensor, drawn: DraftProbs) -> Tensor:  # of chains
        chance = torch.where(drawn.tokens == trees[..., None], drawn.probs, 0).sum(-1)
        return trees.masked_fill((chance < 0.3) & (drawn.probs.sum(-1) > 0), ABSENT)

    def wrong(self: draft.DraftWorker, *given: Any, **named: Any) -> Any:
        found = speculate(self, *given, **named)
        assert found.draft is not None
        return replace(found, trees=kept(torch.from_numpy(found.trees), found.draft).numpy())

    def wrong_now(self: draft.DraftWorker, missed: list[bool]) -> draft.DraftedTrees:
        drafted = draft_now(self, missed)
        assert drafted.draft is not None
        trees = kept(torch.tensor(drafted.trees), drafted.draft).tolist()
        for slot in (slot for slot, waits in enumerate(missed) if waits):
            self.trees[slot][1:] = trees[slot]
        return replace(drafted, trees=trees)

    seeding.put(draft.DraftWorker, "speculate", wrong)
    seeding.put(draft.DraftWorker, "draft_now", wrong_now)
