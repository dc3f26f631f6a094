"""From a plan to forward runners."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...config.load import ModelConfig, resolve_model_path
from ...errors import ConfigError
from ...models.attention import tree_attention
from ...models.cpu import operators, rows_linear
from ...models.cuda.graphs import Graphs
from ...models.loading import lay_out_for_cpu, load_model
from ...models.runner import ForwardRunner, can_compile
from ...models.sharding import shard
from ..transport.rank_lanes import Ranks
from ..verifier.ranks import LeadingRunner
from .plan import Plan

if TYPE_CHECKING:
    from ...models.loading import PreTrainedModel


def target_runner(plan: Plan, model: PreTrainedModel | None = None, ranks: Ranks | None = None) -> ForwardRunner:
    """The target's, cold. Raises: UsageError."""
    return make_runner(plan, plan.config.target, model, scratch=plan.shape.nodes - plan.shape.depth - 1, ranks=ranks)


def make_runner(
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
    kernels = tree_attention.available() if on_gpu else operators.available() and wanted.dtype != "float16"
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
        if operators.available():
            rows_linear.pack_linears(model)
        else:
            lay_out_for_cpu(model)
    return runner


def _graphs(wanted: ModelConfig, model: PreTrainedModel) -> Graphs | None:
    on_gpu = model.device.type == "cuda"
    if wanted.graphs is True and not on_gpu:
        raise ConfigError(f"graphs: true needs a CUDA device, not {wanted.device}; leave graphs at auto")
    return Graphs(model.device) if on_gpu and wanted.graphs else None


def describe(runner: ForwardRunner, wanted: ModelConfig) -> dict[str, Any]:
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
