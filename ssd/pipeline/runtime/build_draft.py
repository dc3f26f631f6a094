"""From a plan to the draft."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ...config.sections import ModelConfig
from ...decoding.forecast.share import ForecastShare
from ...decoding.text.copying import CopyBias
from ..draft.branches import scratch_slots
from ..draft.executors import DraftModel
from ..draft.sampler import CandidateSampler
from ..draft.worker import DraftOptions, DraftWorker
from ..policy.lookahead import first_lookahead
from ..sampling.slots import SlotSampling
from .plan import Plan
from .runners import describe, make_runner

if TYPE_CHECKING:
    from ...models.checkpoints.loading import PreTrainedModel


def build_draft(plan: Plan, model: PreTrainedModel | None = None, rank: int = 0) -> tuple[DraftWorker, dict[str, Any]]:
    """Returns the draft worker, warm, and its description.

    Args:
        plan: of the pairing.
        model: the draft, if it is loaded already.
        rank: among the draft's devices; the first one leads.

    Raises:
        UsageError: the configuration does not fit the model or the device.
    """
    config = plan.config
    assert config.draft is not None
    draft = draft_model(plan, config.draft, model, rank)
    options = DraftOptions(
        lookaheads=plan.lookaheads,
        lookahead=first_lookahead(plan.lookaheads),
        ngram=plan.ngram and rank == 0,  # the first rank's candidates are those of all ranks
        prefix_caching=config.engine.prefix_caching and draft.runner.shares_prefixes,
        anytime=config.speculation.anytime,
    )
    worker = DraftWorker(draft, options)
    began = time.perf_counter()
    if worker.runner.fuses:
        worker.warm_up()
    return worker, {**describe(worker.runner, config.draft), "warm_up_s": round(time.perf_counter() - began, 2)}


def draft_model(plan: Plan, wanted: ModelConfig, model: PreTrainedModel | None, rank: int) -> DraftModel:
    """Returns the draft, cold; arguments as for ``build_draft``. Raises: UsageError."""
    config, shape, ranks = plan.config, plan.shape, len(plan.config.draft_roles)
    runner = make_runner(plan, wanted, model, scratch=scratch_slots(shape, config.speculation.forecast.budget))
    batch, device, forecast = runner.batch, runner.device, plan.forecast(wanted.device)
    sampler = None
    if plan.probs is not None:
        sampler = CandidateSampler(shape, forecast, plan.probs, scale=config.speculation.saguaro_c)
    return DraftModel(
        runner=runner,
        shape=shape,
        forecast=forecast if ranks == 1 else ForecastShare(forecast, rank, ranks),
        sampling=SlotSampling(
            batch,
            runner.vocabulary,
            device,
            horizon=2 * shape.depth + 1,
            compiled=runner.compiled,
            grammars=plan.grammars(wanted),
        ),
        copying=CopyBias(
            config.speculation.copy_bias, shape, batch=batch, capacity=config.engine.max_model_len, device=device
        ),
        sampler=sampler,
    )
