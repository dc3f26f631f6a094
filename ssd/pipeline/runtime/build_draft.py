"""From a plan to the draft."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ...config.load import resolve_model_path
from ...config.sections import DraftConfig
from ...decoding.forecast.share import ForecastShare
from ...decoding.text.copying import CopyBias
from ...models.checkpoints.loading import load_tokenizer, read_config
from ...models.checkpoints.pairs import kept_tokens, mask_token, paired_with
from ...models.drafts.mapped import MappedModel, trim_head
from ...models.drafts.proposer import Proposer, find
from ...models.runner import ForwardRunner
from ..draft.branches import scratch_slots
from ..draft.executors import DraftModel
from ..draft.proposing import Draft, ProposingDraft
from ..draft.sampler import CandidateSampler
from ..draft.worker import DraftOptions, DraftWorker
from ..policy.lookahead import first_lookahead
from ..sampling.slots import SlotSampling
from .plan import Plan
from .runners import RunnerSizes, describe, loaded, make_runner

if TYPE_CHECKING:
    from ...models.checkpoints.loading import PreTrainedModel


def any_draft(plan: Plan, model: PreTrainedModel | None = None, rank: int = 0) -> tuple[Draft, dict[str, Any]]:
    """Returns what the configuration asks for: a function's draft or a model's (``build_draft``)."""
    assert plan.config.draft is not None
    if (name := plan.config.draft.propose) is not None:
        return proposing_draft(plan, plan.config.draft, name)
    return build_draft(plan, model, rank)


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


def proposing_draft(plan: Plan, wanted: DraftConfig, name: str) -> tuple[ProposingDraft, dict[str, Any]]:
    """Returns a draft without a model, and its description. Raises: ConfigError: the function ``name`` is missing."""
    proposer = Proposer(find(name), vocabulary=plan.vocabulary, limit_s=wanted.propose_timeout_s)
    draft = ProposingDraft(
        proposer, plan.shape, batch=plan.config.engine.max_batch, budget=plan.branches, probs=plan.probs
    )
    facts = {"model": name, "parameters": 0, "dtype": "none", "device": "cpu", "compiled": False, "graphs": False}
    return draft, {**facts, "attention": "none", "contexts": [], "cache_bytes": 0, "warm_up_s": 0.0}


def draft_runner(plan: Plan, wanted: DraftConfig, model: PreTrainedModel | None) -> tuple[ForwardRunner, int | None]:
    """Returns the draft's runner, whose token ids are the target's, and the id to feed for the mask token of a parallel
    draft. Arguments and errors as for ``build_draft``."""
    mask = mask_token(read_config(resolve_model_path(wanted.model)), wanted.parallel)
    context = plan.draft_context or plan.config.engine.max_model_len
    scratch = scratch_slots(plan.shape, plan.config.speculation.forecast.budget)
    if not plan.mapped:
        sizes = RunnerSizes(capacity=context, scratch_slots=scratch, vocabulary=plan.vocabulary)
        return make_runner(plan, wanted, model, sizes), mask
    target, folder = (resolve_model_path(one.model) for one in (plan.config.target, wanted))
    rows = read_config(target).get_text_config().vocab_size
    ids = paired_with(folder, load_tokenizer(target), rows, shared=wanted.vocabulary == "shared").map
    assert ids is not None  # the front has found it
    model = model or loaded(wanted, context)
    if (kept := kept_tokens(folder)) is not None:
        trim_head(model, kept)
    sizes = RunnerSizes(capacity=context, scratch_slots=scratch, vocabulary=len(ids.to_target))
    runner = make_runner(plan, wanted, model, sizes)
    mapped = MappedModel(runner.model, ids, () if mask is None else [mask])
    return runner.over(mapped, plan.vocabulary), None if mask is None else plan.vocabulary


def draft_model(plan: Plan, wanted: DraftConfig, model: PreTrainedModel | None, rank: int) -> DraftModel:
    """Returns the draft, cold; arguments as for ``build_draft``. Raises: UsageError."""
    config, shape, ranks = plan.config, plan.shape, len(plan.config.draft_roles)
    runner, mask = draft_runner(plan, wanted, model)
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
            config.speculation.copy_bias, shape, batch=batch, capacity=runner.cache.capacity, device=device
        ),
        sampler=sampler,
        mask=mask,
    )
