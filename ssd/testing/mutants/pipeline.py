"""Known bugs, seeded one at a time into the running code; ``tests/unit/test_mutants.py`` shows that
the suite's own tests catch each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...decoding.forecast import base as forecasts
from ...decoding.processors import TreePaths
from ...decoding.text import copying
from ...decoding.trees.shape import ABSENT
from ...engine.detokenize import Detokenizer
from ...models.cache import CacheView, SlotCache
from ...pipeline.draft import branches
from ...pipeline.draft import worker as draft
from ...pipeline.round import lookup
from ...pipeline.runtime import build_draft, build_verifier
from ...pipeline.runtime import draft_main as _draft_main  # noqa: F401
from ...pipeline.runtime import launch as _launch  # noqa: F401  so that nothing is imported, and bound, while seeded
from ...pipeline.runtime import verifier_main as _verifier_main  # noqa: F401
from ...pipeline.verifier import worker as verifier
from ...pipeline.verifier.sequence import TargetSequence
from ...request.sampling_params import SamplingParams
from . import rules as _rules  # noqa: F401  which registers its own
from .seeding import EQUAL, MUTANTS, POSSIBLE, RIGHT, Seeding, mutant

__all__ = ["MUTANTS"]

# Noise.


@mutant("noise position shifted", EQUAL)
def _shifted(seeding: Seeding) -> None:
    """Coupled: a row of the tree has the noise of the row before."""

    class Shifted(build_verifier.SlotSampling):
        def score(self, logits: Tensor, noise: Tensor, ahead: Any, *rest: Any) -> Tensor:
            return super().score(logits, noise, ahead.roll(1, dims=1), *rest)

    seeding.put(build_verifier, "SlotSampling", Shifted)


@mutant("noise position shifted in the draft", RIGHT)
def _shifted_draft(seeding: Seeding) -> None:
    """The draft chooses each token with the noise of the next position. Costs speed only."""

    class Shifted(build_draft.SlotSampling):
        def noise(self, lengths: Tensor) -> Tensor | None:
            return super().noise(lengths + 1)

    seeding.put(build_draft, "SlotSampling", Shifted)


@mutant("swapped rows: noise", EQUAL)
def _swapped_noise(seeding: Seeding) -> None:
    """A row of the batch gets its neighbour's noise."""

    class Swapped(build_verifier.SlotSampling):
        def noise(self, lengths: Tensor) -> Tensor | None:
            noise = super().noise(lengths)
            return None if noise is None else noise.roll(1, dims=0)

    seeding.put(build_verifier, "SlotSampling", Swapped)


@mutant("temperature ignored by the draft", RIGHT)
def _cold_draft(seeding: Seeding) -> None:
    """The draft's guesses have temperature 0. Costs speed only."""

    class Cold(build_draft.SlotSampling):
        def set(self, slot: int, params: SamplingParams) -> None:
            super().set(slot, replace(params, temperature=0.0))

    seeding.put(build_draft, "SlotSampling", Cold)


# Keys and values.


@mutant("a rejected candidate's keys stay", EQUAL)
def _not_rolled_back(seeding: Seeding) -> None:
    """The root's slot keeps what the last round's candidate left there."""
    honest = CacheView._write

    def wrong(self: CacheView, part: int, own: Tensor, layer: int) -> Any:
        main, slots = self.main[part][layer], self.main_slots
        batch = torch.arange(len(own))
        before = main[batch, :, slots[:, 0]].clone() if slots.shape[1] else None
        states = honest(self, part, own, layer)
        if before is not None and 1 < slots.shape[1] < 9:  # no prefill, no single row
            left = before.abs().sum((1, 2)) > 0
            main[batch[left], :, slots[left, 0]] = before[left]
        return states

    seeding.put(CacheView, "_write", wrong)


@mutant("an accepted sibling's keys are not kept", EQUAL)
def _not_kept(seeding: Seeding) -> None:
    """They stay in scratch; its place holds the candidate it replaced."""
    seeding.put(SlotCache, "keep", lambda *_given: None)


@mutant("stale branch keys", RIGHT)
def _stale_branch(seeding: Seeding) -> None:
    """A branch attends what its neighbour fed. Costs speed only."""
    honest = branches.BranchSteps.__init__

    def wrong(self: branches.BranchSteps, *given: Any) -> None:
        honest(self, *given)
        self._own = self._own.roll(1, dims=1)

    seeding.put(branches.BranchSteps, "__init__", wrong)


@mutant("a slot's last keys taken for the next request's", RIGHT)
def _stale_slot(seeding: Seeding) -> None:
    """The draft compares lengths, not tokens. Costs speed only."""
    seeding.put(draft, "common_prefix", lambda one, other: min(len(one), len(other)))


@mutant("the copy bias forgets what was fed", "decoding/test_copying.py::test_tree_branches_and_chain[chain]")
def _forgotten(seeding: Seeding) -> None:
    """A branch's endings stay those of its node. Costs speed only."""
    seeding.put(copying.CopySource, "fed", lambda _self, endings, _tokens: endings)


# Forecast, lookup, admission.


@mutant("forecast includes the drafted token", POSSIBLE)
def _impossible_guesses(seeding: Seeding) -> None:
    """A branch for "u was the deepest accepted node, and its child came next". Costs hits only."""
    seeding.everywhere(forecasts.exclude_children, lambda scores, _tokens, _parents: scores)


@mutant("lookup by the bonus token alone", "pipeline/round/test_frames.py::test_lookup_is_by_node_and_token")
def _lookup_by_token(seeding: Seeding) -> None:
    """A branch of another node hits if its guess is the bonus token. Costs speed only."""

    honest = lookup.lookup

    def wrong(nodes: Any, bonus: Any, speculation: Any) -> Any:
        anywhere = np.broadcast_to(np.array(nodes)[:, None], speculation.nodes.shape)
        return honest(nodes, bonus, replace(speculation, nodes=anywhere))

    seeding.everywhere(honest, wrong)


@mutant("trees of another branch", RIGHT)
def _other_branch(seeding: Seeding) -> None:
    """The tree looked up is the one beside it. Costs speed only."""
    honest = draft.DraftWorker.speculate

    def wrong(self: draft.DraftWorker, *given: Any, **named: Any) -> Any:
        found = honest(self, *given, **named)
        return replace(found, trees=np.roll(found.trees, 1, axis=1))

    seeding.put(draft.DraftWorker, "speculate", wrong)


@mutant("admitted a token early", RIGHT)
def _early(seeding: Seeding) -> None:
    """The draft's copy of a request lacks its last token. Costs speed only."""
    honest = draft.DraftWorker.admit

    def wrong(self: draft.DraftWorker, message: Any) -> None:
        honest(self, replace(message, tokens=message.tokens[:-1]) if len(message.tokens) > 1 else message)

    seeding.put(draft.DraftWorker, "admit", wrong)


# Parameters and cuts.


@mutant(
    "penalties ignore drafted tokens",
    "decoding/test_processors.py::test_every_row_of_a_tree_by_the_formulas[presence]",
    "equality/test_processed_equality.py::test_every_parameter[4-2-3-jit]",
)
def _forgetful(seeding: Seeding) -> None:
    """Processors see what is certain, not the candidates above a row."""
    honest = TreePaths.of
    seeding.put(TreePaths, "of", lambda self, tokens: torch.full_like(honest(self, tokens), ABSENT))


@mutant("tokens after the end of text", "equality/test_equality.py::test_where_requests_end")
def _runs_on(seeding: Seeding) -> None:
    """The rest of the block that an end-of-text id stands in is given out too."""
    honest = TargetSequence.commit

    def wrong(self: TargetSequence, path: list[int], bonus: int) -> Any:
        emitted, finished = honest(self, path, bonus)
        return (emitted if finished != "stop" else [*path, bonus]), finished

    seeding.put(TargetSequence, "commit", wrong)


@mutant("stop string cut off by one", "engine/test_detokenize.py::test_a_stop_string_over_a_token_border")
def _cut_late(seeding: Seeding) -> None:
    """The text ends one character late."""
    honest = Detokenizer._take

    def wrong(self: Detokenizer, fresh: str, following: str) -> None:
        whole = self._waiting + fresh + following
        honest(self, fresh, following)
        if self.stopped:
            self._waiting = whole[: len(self._waiting) + 1]

    seeding.put(Detokenizer, "_take", wrong)


@mutant("log-probabilities of the row before", "engine/test_logprobs.py::test_as_rescored_by_transformers[0]")
def _logprobs_before(seeding: Seeding) -> None:
    """A token is reported with the logits that chose the one before it."""
    honest = verifier.token_logprobs
    seeding.put(verifier, "token_logprobs", lambda logits, *given: honest(logits.roll(1, dims=0), *given))
