"""A draft over several devices: the same tokens, more outcomes prepared, and ranks that are lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssd import LLM, ConfigError, RequestOutput, SamplingParams
from ssd.config.load import load_config
from ssd.decoding.forecast.base import ConfidenceForecast, FanOutForecast, Forecast, fan_out
from ssd.decoding.forecast.share import ForecastShare
from ssd.decoding.trees.shape import ABSENT, TreeShape
from ssd.pipeline.draft.worker import DraftWorker
from ssd.pipeline.round.frames import SpeculationSet
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.runtime.plan import Plan
from tests.unit.equality.test_equality import GREEDY, HOT, MIXED, WARM, prompts, run, same_as_plain, total

Configure = Callable[..., dict[str, Any]]


def over(ranks: int, config: dict[str, Any]) -> dict[str, Any]:
    return config | {"draft": config["draft"] | {"data_parallel": ranks}}


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 30
    while left := {thread for thread in threading.enumerate() if thread.name.startswith("ssd-")} - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", ["confidence", "geometric"])
def test_shares_are_the_whole_forecast(ranks: int, kind: str) -> None:
    shape, budget = TreeShape.comb(3, siblings=1), 5 * ranks
    whole: Forecast = ConfidenceForecast(shape, budget, 1.4)
    if kind == "geometric":
        whole = FanOutForecast(shape, fan_out(shape, budget))
    generator = torch.Generator().manual_seed(ranks)
    scores = 3 * torch.randn(2, shape.nodes, 40, generator=generator)
    tokens = torch.randint(0, 40, (2, shape.nodes), generator=generator)
    tokens[1, 3:] = ABSENT
    shares = [ForecastShare(whole, rank, ranks) for rank in range(ranks)]
    assert [share.budget for share in shares] == [5] * ranks
    parts = [share.outcomes(scores, tokens) for share in shares]
    joined = [torch.stack(part, dim=2).flatten(1) for part in zip(*parts, strict=True)]
    for found, wanted in zip(joined, whole.outcomes(scores, tokens), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("ranks", "speculation"),
    [
        (2, {"siblings": 1, "forecast": {"budget": 4}, "fallback": "jit"}),
        (3, {"siblings": 0, "forecast": {"budget": 2}, "fallback": "none"}),
        (2, {"siblings": 0, "forecast": {"budget": 3, "shape": "geometric"}, "fallback": "ngram"}),
        (2, {"lookahead": "auto", "lookahead_max": 3, "siblings": 1, "forecast": {"budget": 4}, "fallback": "auto"}),
    ],
)
def test_tokens_are_plain_decodings(tiny_config: Configure, ranks: int, speculation: dict[str, Any]) -> None:
    """More requests than slots, prompts of several chunks, methods one after the other."""
    config = over(ranks, tiny_config(engine={"max_batch": 3}, speculation=speculation))
    same_as_plain(config, MIXED)


@pytest.mark.parametrize("verify", ["rejection", "block"])
def test_rules_that_send_probabilities(tiny_config: Configure, verify: str) -> None:
    """What branches were drawn from is joined too: at temperature 0 and with it the draft is of use, and greedy
    tokens are plain decoding's."""
    config = over(2, tiny_config(speculation={"verify": verify, "forecast": {"budget": 6}}, engine={"max_batch": 2}))
    with LLM(config, launch=InprocPipeline) as llm:
        plain, drafted = (run(llm, prompts(2), [GREEDY] * 2, method) for method in ("none", "ssd"))
        warm = run(llm, prompts(2), [WARM] * 2, "ssd")
        assert llm.degraded is None
    assert [o.token_ids for o in drafted] == [o.token_ids for o in plain]
    assert total(warm, "hits") > 0 and total(warm, "accepted") > 0


def hits(config: dict[str, Any], params: list[SamplingParams]) -> tuple[int, int, list[RequestOutput]]:
    with LLM(config, launch=InprocPipeline) as llm:
        outputs = run(llm, prompts(len(params)), params, "ssd")
        assert llm.degraded is None
    return total(outputs, "hits"), total(outputs, "lookups"), outputs


def test_ranks_hit_where_one_draft_of_all_budgets_does(tiny_config: Configure) -> None:
    """And so more often than one draft with the budget of a single rank."""
    params = [replace(p, max_tokens=60) for p in (GREEDY, WARM, HOT)]

    def of(ranks: int, budget: int) -> dict[str, Any]:
        speculation = {"siblings": 1, "forecast": {"budget": budget}, "fallback": "none"}
        return over(ranks, tiny_config(speculation=speculation, engine={"max_batch": 3}))

    alone, whole = hits(of(1, 4), params), hits(of(1, 12), params)
    for ranks, budget in ((3, 4), (2, 6)):
        together = hits(of(ranks, budget), params)
        assert together[:2] == whole[:2]
        assert [o.token_ids for o in together[2]] == [o.token_ids for o in whole[2]]
    assert whole[0] / whole[1] > alone[0] / alone[1] + 0.05


class Rounds:
    """Lets one rank's draft misbehave in a round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.at: dict[str, int] = {}
        self.how: Callable[[], object] = lambda: None
        self.victims: set[str] = set()
        speculate = DraftWorker.speculate

        def counted(worker: DraftWorker, *given: Any) -> SpeculationSet:
            role = threading.current_thread().name.removeprefix("ssd-")
            self.at[role] = self.at.get(role, 0) + 1
            if role in self.victims:
                self.victims.remove(role)
                self.how()
            return speculate(worker, *given)

        monkeypatch.setattr(DraftWorker, "speculate", counted)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Rounds:
    return Rounds(monkeypatch)


def losing(tiny_config: Configure, ranks: int, **engine: Any) -> dict[str, Any]:
    engine = {"max_batch": 2, "draft_restart_delay_s": 0.05, "link_timeout_s": 4.0, **engine}
    return over(ranks, tiny_config(engine=engine, speculation={"forecast": {"budget": 3}}))


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_is_lost_and_the_others_go_on(
    tiny_config: Configure, rounds: Rounds, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    rounds.how = (lambda: 1 / 0) if how == "dies" else (lambda: released.wait(30))
    params = [replace(p, max_tokens=60) for p in (GREEDY, WARM)]
    with LLM(losing(tiny_config, 3), launch=InprocPipeline) as llm:
        plain = run(llm, prompts(2), params, "none")
        before = run(llm, prompts(2), params, "ssd")
        rounds.victims = {"draft-1"}
        during = run(llm, prompts(2), params, "ssd")
        lost_at = rounds.at["draft-1"]
        after = run(llm, prompts(2), params, "ssd")
        released.set()
        assert llm.degraded is None  # two of three still speculate
        assert rounds.at["draft-1"] == lost_at
        assert rounds.at["draft-2"] > lost_at + 10
    for outputs in (before, during, after):
        assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert total(after, "hits") > 0
    lines = [record.getMessage() for record in caplog.records if "draft-1 is lost" in record.getMessage()]
    assert len(lines) == 1


def test_several_silent_ranks_do_not_cost_the_draft(tiny_config: Configure, rounds: Rounds) -> None:
    """They share one deadline, half of the verifier's: the first rank still answers in time."""
    released = threading.Event()
    rounds.how = lambda: released.wait(30)
    params = [replace(GREEDY, max_tokens=60)]
    with LLM(losing(tiny_config, 4), launch=InprocPipeline) as llm:
        plain = run(llm, prompts(1), params, "none")
        run(llm, prompts(1), params, "ssd")
        rounds.victims = {"draft-1", "draft-2", "draft-3"}
        during = run(llm, prompts(1), params, "ssd")
        assert not rounds.victims
        after = run(llm, prompts(1), params, "ssd")
        released.set()
        assert llm.degraded is None  # the first rank speculates alone
    assert [o.token_ids for o in (*during, *after)] == [plain[0].token_ids] * 2
    assert total(after, "hits") > 0


def test_the_first_rank_is_lost_and_all_come_back(tiny_config: Configure, rounds: Rounds) -> None:
    rounds.how = lambda: 1 / 0
    params = [replace(GREEDY, max_tokens=60)]
    with LLM(losing(tiny_config, 2), launch=InprocPipeline) as llm:
        plain = run(llm, prompts(1), params, "none")
        rounds.victims = {"draft"}
        outputs = run(llm, prompts(1), params, "ssd")
        deadline = time.monotonic() + 60
        while llm.degraded:
            assert time.monotonic() < deadline, llm.degraded
            run(llm, prompts(1), [replace(GREEDY, max_tokens=4)], "ssd")
        before = dict(rounds.at)
        again = run(llm, prompts(1), params, "ssd")
        assert all(rounds.at[role] > before[role] for role in ("draft", "draft-1"))
    assert [o.token_ids for o in (*outputs, *again)] == [plain[0].token_ids] * 2
    assert total(again, "hits") > 0


def test_roles_cores_and_gpus(tiny_config: Configure) -> None:
    config = over(2, tiny_config())
    config["draft"] |= {"cores": [4, 5, 6, 7], "device": "cuda:2"}
    plan = Plan(config=load_config(config), vocabulary=128, ends=())
    assert plan.roles == ("verifier", "draft", "draft-1")
    drafts = [plan.for_role(role).config.draft for role in plan.roles[1:]]
    assert [(d.cores, d.device) for d in drafts if d] == [([4, 6], "cuda:2"), ([5, 7], "cuda:3")]
    assert plan.for_role("verifier").config == plan.config
    assert plan.frames().branches == 2 * plan.frames(share=True).branches


def test_what_cannot_be_shared_is_refused(tiny_config: Configure) -> None:
    config = over(2, tiny_config(speculation={"forecast": {"shape": "measured"}}))
    with pytest.raises(ConfigError, match=r"draft\.data_parallel=2 needs a forecast that all ranks make alike"):
        load_config(config)
    with pytest.raises(ConfigError, match=r"target\.data_parallel"):
        load_config(tiny_config(), ["target.data_parallel=2"])
