"""From a plan to the draft."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ...config.sections import ModelConfig
from ...decoding.forecast.share import ForecastShare
from ...decoding.text.copying import CopyBias
from ..draft.branches import scratch_slots
from ..draft.sampler import CandidateSampler
from ..draft.worker import DraftWorker
from .plan import Plan
from .runners import describe, make_runner

if TYPE_CHECKING:
    from ...models.loading import PreTrainedModel


def build_draft(plan: Plan, model: PreTrainedModel | None = None, rank: int = 0) -> tuple[DraftWorker, dict[str, Any]]:
    """The draft worker, warm, and what to tell about it. ``model``: already loaded. ``rank``: among the draft's
    devices, if there are several; the first one leads. Raises: UsageError."""
    config, ranks = plan.config, len(plan.config.draft_roles)
    assert config.draft is not None
    runner = make_runner(
        plan, config.draft, model, scratch=scratch_slots(plan.shape, config.speculation.forecast.budget)
    )
    forecast = plan.forecast(config.draft.device)
    worker = DraftWorker(
        runner,
        shape=plan.shape,
        forecast=forecast if ranks == 1 else ForecastShare(forecast, rank, ranks),
        ngram=plan.ngram and rank == 0,  # the first one's candidates are everybody's
        prefix_caching=config.engine.prefix_caching,
        lookaheads=plan.lookaheads,
        anytime=config.speculation.anytime,
        copying=CopyBias(
            config.speculation.copy_bias,
            plan.shape,
            batch=runner.batch,
            capacity=config.engine.max_model_len,
            device=runner.device,
        ),
    )
    worker.chooser.grammars = plan.grammars(config.draft)
    if plan.probs is not None:
        worker.drafting.sampler = CandidateSampler(plan.shape, forecast, plan.probs, scale=config.speculation.saguaro_c)
    return worker, _warm(worker, config.draft)


def _warm(worker: DraftWorker, wanted: ModelConfig) -> dict[str, Any]:
    began = time.perf_counter()
    if worker.runner.fuses:
        worker.warm_up()
    return {**describe(worker.runner, wanted), "warm_up_s": round(time.perf_counter() - began, 2)}
