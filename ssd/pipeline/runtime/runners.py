"""Forward runners from a plan."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...config.load import resolve_model_path
from ...config.sections import ModelConfig
from ...errors import ConfigError, first_line
from ...models.attention import tree_attention
from ...models.checkpoints.loading import lay_out_for_cpu, load_model
from ...models.cpu import operators, rows_linear
from ...models.cuda.graphs import Graphs, refusals
from ...models.parallel.sharding import shard
from ...models.runner import Attention, ForwardRunner, RunnerOptions, can_compile
from ..transport.rank_lanes import Ranks
from ..verifier.ranks import LeadingRunner
from .plan import Plan

if TYPE_CHECKING:
    from ...models.checkpoints.loading import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerSizes:
    """Sizes of a runner that depend on the model."""

    capacity: int
    """Tokens of a sequence."""
    scratch_slots: int
    """X, the scratch slots of a sequence."""
    vocabulary: int
    """Token ids of the model are below it."""


def target_runner(plan: Plan, model: PreTrainedModel | None = None, ranks: Ranks | None = None) -> ForwardRunner:
    """Returns the target's runner, not warmed up. Arguments and errors are those of :func:`make_runner`."""
    sizes = RunnerSizes(
        capacity=plan.config.engine.max_model_len,
        scratch_slots=plan.shape.nodes - plan.shape.depth - 1,
        vocabulary=plan.vocabulary,
    )
    return make_runner(plan, plan.config.target, model, sizes, ranks=ranks)


def make_runner(
    plan: Plan, wanted: ModelConfig, model: PreTrainedModel | None, sizes: RunnerSizes, *, ranks: Ranks | None = None
) -> ForwardRunner:
    """Returns a runner, not warmed up.

    Args:
        plan: of the pairing.
        wanted: the model's section of the configuration.
        model: the model, if it is loaded already.
        sizes: of the runner.
        ranks: the ranks that share the model, if several do.

    Raises:
        ModelError: the model cannot be loaded or divided.
        ConfigError: the configuration asks for something the device does not have.
    """
    engine = plan.config.engine
    if model is None:
        model = loaded(wanted, sizes.capacity, sharded=ranks is not None)
    sharding = None
    if ranks is not None:
        sharding = shard(model, ranks.group)
        model.to(wanted.device)  # pyright: ignore[reportArgumentType]
    options = RunnerOptions(
        batch=engine.max_batch,
        capacity=sizes.capacity,
        scratch_slots=sizes.scratch_slots,
        prefill_chunk=engine.prefill_chunk,
        chain=plan.shape.depth + 1,
        vocabulary=sizes.vocabulary,
        compile=_compiles(wanted, model),
        attention=_attention(wanted, model),
    )
    if ranks is not None and ranks.group.rank == 0:
        # Ranks would have to capture in step, which has not been tried on hardware: no graphs.
        runner = LeadingRunner(model, options, sharding=sharding, lanes=ranks.lanes)
    else:
        runner = ForwardRunner(
            model, options, graphs=_graphs(wanted, model) if ranks is None else None, sharding=sharding
        )
    if torch.device(wanted.device).type == "cpu" and wanted.dtype == "float32":
        if operators.available():
            rows_linear.pack_linears(model, runner.linears)
        else:
            lay_out_for_cpu(model)
    return runner


def loaded(wanted: ModelConfig, positions: int, *, sharded: bool = False) -> PreTrainedModel:
    """Returns a model.

    Args:
        wanted: its section of the configuration.
        positions: how many it will be asked for.
        sharded: it will be divided among ranks. A rank's device need not hold the whole model.

    Raises:
        ModelError: the model cannot be loaded.
    """
    return load_model(
        resolve_model_path(wanted.model),
        dtype=wanted.dtype,
        device="cpu" if sharded else wanted.device,
        max_positions=positions,
        weights="dequantised" if sharded else wanted.weights,
        adapter=wanted.adapter,
    )


def _compiles(wanted: ModelConfig, model: PreTrainedModel) -> bool:
    """On GPUs compilation takes minutes at every first start, and graphs already save the launches."""
    return can_compile() and model.device.type == "cpu" if wanted.compile == "auto" else wanted.compile


def _attention(wanted: ModelConfig, model: PreTrainedModel) -> Attention:
    if wanted.attention != "auto":
        return wanted.attention
    if model.device.type != "cuda":
        return "tree" if operators.available() and wanted.dtype != "float16" else "rows"
    if not tree_attention.available():
        return "rows"
    try:
        tree_attention.try_kernels(model.config, model.dtype, model.device)
    except refusals() as error:
        why = f"its kernels do not run on {model.device} ({first_line(error)})"
        log.warning("%s: attention is rows, not tree: %s", wanted.model, why)
        return "rows"
    return "tree"


def _graphs(wanted: ModelConfig, model: PreTrainedModel) -> Graphs | None:
    on_gpu = model.device.type == "cuda"
    if wanted.graphs is True and not on_gpu:
        raise ConfigError(f"graphs: true needs a CUDA device, not {wanted.device}; leave graphs at auto")
    return Graphs(model.device) if on_gpu and wanted.graphs else None


def describe(runner: ForwardRunner, wanted: ModelConfig) -> dict[str, Any]:
    """Returns the facts about a runner that reports show; ``cache_bytes`` counts the KV cache."""
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
