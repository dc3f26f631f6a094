"""A verifier over several ranks: with the same ranks, every method gives plain decoding's tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ssd import LLM, ConfigError, ModelError, SamplingParams, UsageError
from ssd.config.load import load_config
from ssd.models.parallel.sharding import shard
from ssd.models.parallel.tensor_group import TensorGroup
from ssd.models.runner import ForwardRunner
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.runtime.plan import Plan
from ssd.pipeline.verifier.ranks import LeadingRunner
from ssd.testing.models.tiny import ARCHITECTURES, save_tiny, tiny_model
from tests.unit.equality.test_equality import prompts, run, same_as_plain

Configure = Callable[..., dict[str, Any]]
SMALL = {"max_batch": 2}
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
WARM = replace(GREEDY, temperature=0.8, seed=11)
CUT = replace(WARM, top_p=0.9, seed=1)


def over(ranks: int, config: dict[str, Any]) -> dict[str, Any]:
    return config | {"target": config["target"] | {"tensor_parallel": ranks}}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox", "olmo2"])
def test_methods_agree(tiny_config: Configure, architecture: str) -> None:
    """Heads divided, softcaps and tied embeddings, fused projections, and heads that stay whole."""
    config = over(2, tiny_config(architecture, engine=SMALL, speculation={"siblings": 1}))
    same_as_plain(config, [GREEDY, WARM, CUT])


def test_three_ranks(tiny_config: Configure, tmp_path_factory: pytest.TempPathFactory) -> None:
    """More than two: the order of a sum matters."""
    heads: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
    target = save_tiny(tmp_path_factory.mktemp("three") / "target", "llama", **heads)
    config = tiny_config(engine=SMALL)
    config["target"] |= {"model": str(target), "tensor_parallel": 3}
    same_as_plain(config, [GREEDY, WARM])


def test_tokens_of_one_rank(tiny_config: Configure) -> None:
    """Sums of two parts are other floating-point sums than one rank's; these models' tokens are far
    enough apart to show no difference."""
    whole = tiny_config(draft=None, speculation={"method": "none"}, engine=SMALL)
    with LLM(whole, launch=InprocPipeline) as one, LLM(over(2, whole), launch=InprocPipeline) as two:
        outputs = [run(llm, prompts(3), [GREEDY] * 3, "none") for llm in (one, two)]
        assert two.info()["verifier-1"]["cache_bytes"] == one.info()["verifier"]["cache_bytes"] // 2
    assert [o.token_ids for o in outputs[0]] == [o.token_ids for o in outputs[1]]


def in_ranks(size: int, body: Callable[[TensorGroup], Any], *, ordered: bool = True) -> list[Any]:
    """``body`` in every rank, as threads; their results by rank."""
    store, results = dist.HashStore(), [None] * size

    def one(rank: int) -> None:
        group = TensorGroup(
            store, rank, size, device=torch.device("cpu"), timeout_s=30, ordered=ordered, host="127.0.0.1"
        )
        try:
            results[rank] = body(group)
        finally:
            group.close()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_of_a_divided_model(architecture: str) -> None:
    """The stock model, divided by its plan, computes what it computed whole."""
    ids = torch.tensor([[5, 9, 40, 77, 12]])
    with torch.no_grad():
        expected = tiny_model(architecture, vocab_size=127)(ids).logits

        def body(group: TensorGroup) -> Tensor:
            model = tiny_model(architecture, vocab_size=127)  # which does not divide by two
            shard(model, group)
            with torch.no_grad():
                return model(ids).logits

        for logits in in_ranks(2, body):
            assert torch.allclose(logits, expected, atol=2e-4 * float(expected.abs().max()))


def test_a_sum_is_the_same_wherever_its_number_stands() -> None:
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(3, 64, generator=generator) * torch.tensor([1e4, 1.0, 1e-3])[:, None]

    def body(group: TensorGroup) -> tuple[Tensor, Tensor]:
        own = numbers[group.rank]
        return group.sum(own.repeat(7)), group.sum(own)

    sums = in_ranks(3, body)
    for many, once in sums:
        assert torch.equal(many, once.repeat(7))
        assert torch.equal(once, sums[0][1])


def test_a_fast_sum_is_a_sum() -> None:
    def body(group: TensorGroup) -> Tensor:
        return group.sum(torch.full((5,), float(group.rank + 1)))

    assert all(torch.equal(total, torch.full((5,), 6.0)) for total in in_ranks(3, body, ordered=False))


@pytest.mark.parametrize("ranks", [3, 4])
def test_heads_that_do_not_divide(tiny_config: Configure, ranks: int) -> None:
    config = over(ranks, tiny_config(draft=None, speculation={"method": "none"}))
    message = f"4 attention and 2 key-value heads do not divide by target.tensor_parallel={ranks}"
    with pytest.raises(UsageError, match=message):
        LLM(config, launch=InprocPipeline)


def test_a_model_without_a_plan() -> None:
    model = tiny_model("llama")
    model._tp_plan = {}
    with pytest.raises(ModelError, match="no tensor-parallel plan"):
        shard(model, None)  # pyright: ignore[reportArgumentType]


def test_ranks_share_cores_and_count_gpus_up(tiny_config: Configure) -> None:
    config = tiny_config()
    config["target"] |= {"tensor_parallel": 2, "cores": [4, 5, 6, 7], "device": "cuda:2"}
    plan = Plan(config=load_config(config), vocabulary=128, ends=())
    assert plan.roles == ("verifier", "verifier-1", "draft")
    targets = [plan.for_role(role).config.target for role in plan.roles[:2]]
    assert [(t.cores, t.device) for t in targets] == [([4, 6], "cuda:2"), ([5, 7], "cuda:3")]
    assert plan.for_role("draft").config.draft == plan.config.draft


def test_only_the_target_is_divided(tiny_config: Configure) -> None:
    config = tiny_config()
    config["draft"]["tensor_parallel"] = 2
    with pytest.raises(ConfigError, match=r"draft\.tensor_parallel"):
        load_config(config)


def test_whatever_changes_the_cache_is_told_to_the_other_ranks() -> None:
    """A method of the runner that is not would leave them with other keys, and give other tokens."""
    told = {name for name in vars(LeadingRunner) if not name.startswith("_")}
    assert told >= {"announce", "prefill", "keep", "copy"}
    public = {name for name, value in vars(ForwardRunner).items() if callable(value) and not name.startswith("_")}
    harmless = {"context_for", "logits", "compiled", "warm_up"}
    # ``forward`` is the draft's and the followers' own; ``over`` is self-speculation's, which several ranks refuse.
    assert public - told - harmless == {"forward", "over"}
