"""From a plan to the verifier."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ...config.sections import ModelConfig
from ...models.rows import RowPlan
from ...models.runner import ForwardRunner
from ...models.skipping import SkipSet, skipping
from ..sampling.slots import SlotSampling
from ..transport.rank_lanes import Ranks
from ..verifier.decider import Decider
from ..verifier.judge import Judge
from ..verifier.options import VerifierOptions
from ..verifier.self_draft import SelfDraft
from ..verifier.worker import VerifierWorker
from .plan import Plan
from .runners import describe, target_runner

if TYPE_CHECKING:
    from ...models.checkpoints.loading import PreTrainedModel


def build_verifier(
    plan: Plan, model: PreTrainedModel | None = None, ranks: Ranks | None = None
) -> tuple[VerifierWorker, dict[str, Any]]:
    """The verifier, warm, and what to say about it.

    Args:
        model: already loaded; None loads it.
        ranks: those that share the model, if several do. They must ``follow`` by now.

    Raises:
        UsageError: the model or the configuration cannot be used.
    """
    config, speculation = plan.config, plan.config.speculation
    runner, shape = target_runner(plan, model, ranks), plan.shape
    options = VerifierOptions(
        shape=shape,
        method=speculation.method,
        jit=plan.jit,
        ngram=plan.ngram,
        strict=config.numerics == "strict",
        governed=speculation.governor,
        lookaheads=plan.lookaheads,
        ends=frozenset(plan.ends),
        max_model_len=config.engine.max_model_len,
        draft_limit=plan.draft_limit,
        prefix_caching=config.engine.prefix_caching and runner.shares_prefixes,
    )
    sampling = SlotSampling(
        runner.batch,
        runner.vocabulary,
        runner.device,
        horizon=shape.depth + 1,
        compiled=runner.compiled,
        grammars=plan.grammars(config.target),
    )
    judge = None if plan.probs is None else Judge(speculation.verify, shape, plan.probs, runner.device)
    decider = Decider(runner, shape, sampling, judge)
    self_draft = None
    if (wanted := speculation.self_draft) is not None:
        skips = SkipSet.of(wanted.skip_attention, wanted.skip_mlp, runner.cache.layers)
        self_draft = SelfDraft(
            runner.over(skipping(runner.model, skips)),
            shape=shape,
            sampling=sampling,
            judge=judge,
            confidence=wanted.confidence,
            governed=speculation.governor,
        )
    worker = VerifierWorker(runner, options, sampling=sampling, decider=decider, self_draft=self_draft)
    return worker, _warm(worker, config.target)


def _warm(worker: VerifierWorker, wanted: ModelConfig) -> dict[str, Any]:
    began = time.perf_counter()
    worker.warm_up()
    return {
        **describe(worker.runner, wanted),
        "warm_up_s": round(time.perf_counter() - began, 2),
        "padded": worker.padded,
    }


def build_rank(plan: Plan, ranks: Ranks) -> tuple[ForwardRunner, list[RowPlan], dict[str, Any]]:
    """What another rank of the verifier needs to ``follow``, and what to tell about it. Raises: UsageError."""
    runner = target_runner(plan, None, ranks)
    return runner, [*plan.verify_plans, RowPlan.sequential("one", 1)], describe(runner, plan.config.target)
