"""From a plan to workers."""

from __future__ import annotations

import gc
import os
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...config.load import ModelConfig, resolve_model_path
from ...decoding.forecast.share import ForecastShare
from ...decoding.text.copying import CopyBias
from ...errors import ConfigError
from ...models.attention import split as tree_attention
from ...models.cpu import linear as rows_linear
from ...models.cpu import native
from ...models.cuda.graphs import Graphs
from ...models.loading import lay_out_for_cpu, load_model
from ...models.rows import RowPlan
from ...models.runner import ForwardRunner, can_compile
from ...models.sharding import shard
from ...models.skipping import SkipSet, skipping
from ..draft.branches import scratch_slots
from ..draft.ranks import LeadingDraft
from ..draft.sampler import CandidateSampler
from ..draft.worker import DraftWorker
from ..transport.rank_lanes import Ranks
from ..verifier.judge import Judge
from ..verifier.ranks import LeadingRunner
from ..verifier.self_draft import SelfDraft
from ..verifier.worker import VerifierWorker
from .plan import Plan

if TYPE_CHECKING:
    from ...models.loading import PreTrainedModel


def usable_cores(cores: list[int] | None) -> list[int] | None:
    """Those of the wanted cores this process may use.

    Raises: ConfigError if there is none of them.
    """
    if cores is None or not hasattr(os, "sched_setaffinity"):
        return None
    available = os.sched_getaffinity(0)
    # A machine with a single core still runs the shipped configurations, just not in parallel.
    usable = [core for core in cores if core in available] or (sorted(available) if len(available) == 1 else [])
    if not usable:
        raise ConfigError(f"cores {cores} are not available to this process; it may use {sorted(available)}")
    return usable


def set_threads(cores: list[int] | None, workers: int) -> None:
    """One compute thread per core. Without cores given, a worker's share of the machine's: they
    run at the same time, and threads that outnumber cores spin against each other."""
    torch.set_num_threads(len(cores) if cores else max(1, (os.cpu_count() or 2) // max(2, workers)))


def settle(cores: list[int] | None) -> None:
    """Keep this process on its cores. Once it is warm: compilers may use the whole machine."""
    if threading.current_thread() is threading.main_thread():  # a process of the worker's own
        # The libraries' and the compiler's million objects stay: no collection in mid-round looks through them.
        gc.collect()
        gc.freeze()
    if cores:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)


def build_verifier(
    plan: Plan, model: PreTrainedModel | None = None, ranks: Ranks | None = None
) -> tuple[VerifierWorker, dict[str, Any]]:
    """The verifier, warm, and what to tell about it. ``model``: already loaded. ``ranks``: those that
    share the model, if several do; they must ``follow`` by now. Raises: UsageError."""
    config = plan.config
    runner = target_runner(plan, model, ranks)
    worker = VerifierWorker(
        runner,
        shape=plan.shape,
        method=config.speculation.method,
        jit=plan.jit,
        ngram=plan.ngram,
        strict=config.numerics == "strict",
        governed=config.speculation.governor,
        lookaheads=plan.lookaheads,
        ends=frozenset(plan.ends),
        max_model_len=config.engine.max_model_len,
        prefix_caching=config.engine.prefix_caching,
    )
    worker.chooser.grammars = plan.grammars(config.target)
    if plan.probs is not None:
        worker.decider.judge = Judge(
            config.speculation.verify, plan.shape, plan.probs, batch=runner.batch, device=runner.device
        )
    if (wanted := config.speculation.self_draft) is not None:
        skips = SkipSet.of(wanted.skip_attention, wanted.skip_mlp, runner.cache.layers)
        worker.self_draft = SelfDraft(
            runner.over(skipping(runner.model, skips)),
            shape=plan.shape,
            chooser=worker.chooser,
            judge=worker.decider.judge,
            confidence=wanted.confidence,
            governed=config.speculation.governor,
        )
    return worker, _warm(worker, config.target)


def build_rank(plan: Plan, ranks: Ranks) -> tuple[ForwardRunner, list[RowPlan], dict[str, Any]]:
    """What another rank of the verifier needs to ``follow``, and what to tell about it. Raises: UsageError."""
    runner = target_runner(plan, None, ranks)
    return runner, [*plan.verify_plans, RowPlan.sequential("one", 1)], _info(runner, plan.config.target)


def target_runner(plan: Plan, model: PreTrainedModel | None = None, ranks: Ranks | None = None) -> ForwardRunner:
    """The target's, cold. Raises: UsageError."""
    return _runner(plan, plan.config.target, model, scratch=plan.shape.nodes - plan.shape.depth - 1, ranks=ranks)


def build_draft(plan: Plan, model: PreTrainedModel | None = None, rank: int = 0) -> tuple[DraftWorker, dict[str, Any]]:
    """The draft worker, warm, and what to tell about it. ``model``: already loaded. ``rank``: among the draft's
    devices, if there are several; the first one leads. Raises: UsageError."""
    config, ranks = plan.config, len(plan.config.draft_roles)
    assert config.draft is not None
    runner = _runner(plan, config.draft, model, scratch=scratch_slots(plan.shape, config.speculation.forecast.budget))
    forecast = plan.forecast(config.draft.device)
    make = DraftWorker if ranks == 1 or rank else LeadingDraft
    worker = make(
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


def _runner(
    plan: Plan, wanted: ModelConfig, model: PreTrainedModel | None, *, scratch: int, ranks: Ranks | None = None
) -> ForwardRunner:
    engine = plan.config.engine
    if model is None:
        folder = resolve_model_path(wanted.model)
        device = wanted.device if ranks is None else "cpu"  # a rank's device need not hold the whole model
        model = load_model(folder, dtype=wanted.dtype, device=device, max_positions=engine.max_model_len)
    sharding, make = None, ForwardRunner
    if ranks is not None:
        sharding = shard(model, ranks.group)
        model.to(wanted.device)  # pyright: ignore[reportArgumentType]
        if ranks.group.rank == 0:
            make = partial(LeadingRunner, lanes=ranks.lanes)
    on_gpu = model.device.type == "cuda"
    compile_ = can_compile() if wanted.compile == "auto" else wanted.compile
    kernels = tree_attention.available() if on_gpu else native.available() and wanted.dtype != "float16"
    attention = ("tree" if kernels else "rows") if wanted.attention == "auto" else wanted.attention
    runner = make(
        model,
        batch=engine.max_batch,
        capacity=engine.max_model_len,
        scratch_slots=scratch,
        prefill_chunk=engine.prefill_chunk,
        vocabulary=plan.vocabulary,
        compile=compile_,
        # Ranks would have to capture in step; not until that has been seen on hardware.
        graphs=_graphs(wanted, model) if ranks is None else None,
        attention=attention,
        sharding=sharding,
    )
    if torch.device(wanted.device).type == "cpu" and wanted.dtype == "float32":
        if native.available():
            rows_linear.pack_linears(model)
        else:
            lay_out_for_cpu(model)
    return runner


def _graphs(wanted: ModelConfig, model: PreTrainedModel) -> Graphs | None:
    on_gpu = model.device.type == "cuda"
    if wanted.graphs is True and not on_gpu:
        raise ConfigError(f"graphs: true needs a CUDA device, not {wanted.device}; leave graphs at auto")
    return Graphs(model.device) if on_gpu and wanted.graphs else None


def _warm(worker: VerifierWorker | DraftWorker, wanted: ModelConfig) -> dict[str, Any]:
    began = time.perf_counter()
    runner = worker.runner
    if runner.fuses or isinstance(worker, VerifierWorker):
        worker.warm_up()
    info = {**_info(runner, wanted), "warm_up_s": round(time.perf_counter() - began, 2)}
    return {**info, "padded": worker.padded} if isinstance(worker, VerifierWorker) else info


def _info(runner: ForwardRunner, wanted: ModelConfig) -> dict[str, Any]:
    return {
        "model": wanted.model,
        "parameters": runner.parameters,
        "dtype": wanted.dtype,
        "device": str(runner.device),
        "compiled": runner.compile,
        "graphs": runner.graphs is not None,
        "attention": runner.attention,
        "contexts": runner.contexts,
        "cache_bytes": runner.cache.nbytes,
    }
