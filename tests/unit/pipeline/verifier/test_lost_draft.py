"""A draft that is gone costs speed only, wherever in a round that is noticed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ssd import LLM, LinkError, PipelineError, SamplingParams
from ssd.pipeline.round.frames import Frames
from ssd.pipeline.round.verdict import Verdict
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.transport.lanes import ZmqLane
from ssd.pipeline.transport.links.inproc import InprocLink
from ssd.pipeline.transport.messages import Admit
from ssd.pipeline.verifier.draft_side import DraftSide
from ssd.request.methods import Method

PROMPTS = [[5, 6, 7, 8] * 3, [9, 30, 77]]
PARAMS = SamplingParams(max_tokens=30, ignore_eos=True)
SOON_S = 1.0


@pytest.mark.parametrize("error", [PipelineError, LinkError])
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("step", ["introduce", "post", "finish", "receive_trees"])
def test_decoding_goes_on(
    step: str,
    after: int,
    error: type[PipelineError],
    tiny_config: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if step == "receive_trees" and error is PipelineError:
        pytest.skip("the link raises LinkError only")
    honest, calls = getattr(DraftSide, step), iter(range(10**6))

    def failing(*given: Any) -> Any:
        if next(calls) >= after:
            raise error("nobody is at the other end")
        return honest(*given)

    monkeypatch.setattr(DraftSide, step, failing)
    config = tiny_config(engine={"max_batch": 2, "draft_restarts": 0}, speculation={"anytime": True})
    with LLM(config, launch=InprocPipeline) as llm:
        method: Method = "sd" if step == "receive_trees" else "ssd"  # every round of ``sd`` waits
        for _ in range(2):
            found = llm.generate(PROMPTS, replace(PARAMS, method=method))
        plain = llm.generate(PROMPTS, replace(PARAMS, method="none"))
        assert llm.degraded
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]


class SilentLink(InprocLink):
    """Like gloo and NCCL, it cannot say whether a frame has arrived; so the draft has to be rung for."""

    @property
    def arrived(self) -> bool | None:
        return None


def test_nothing_waits_for_a_dead_draft(tmp_path: Path) -> None:
    """Introducing, ringing and stopping fail at once where nobody is at the other end of the lane."""
    lane, _ = ZmqLane.bind(f"ipc://{tmp_path}/lane")
    link, _ = SilentLink.pair()
    frames = Frames(batch=1, branches=1, nodes=2)
    draft = DraftSide(link, lane, frames, bell=True)
    verdict = Verdict(nodes=[0], bonus=[1], states=[0], commits=[], forward_s=0.0)
    began = time.monotonic()
    with pytest.raises(PipelineError, match="nobody is at the other end"):
        draft.introduce([Admit(slot=0, tokens=[1], params=PARAMS, forecasts=True)], {0: "ssd"})
    with pytest.raises(PipelineError, match="nobody is at the other end"):
        draft.post(verdict)
    draft.stop()
    assert time.monotonic() - began < SOON_S
    lane.close()
