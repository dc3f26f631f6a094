"""On a GPU nothing that a round computes may make the host wait: one operator that reads a number back costs as much
as a small forward. Run on the CPU, with every operator that CUDA's implementation waits for recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssd.decoding import sampling
from ssd.decoding.forecast.base import ConfidenceForecast, FanOutForecast, fan_out
from ssd.decoding.forecast.measured import MeasuredForecast
from ssd.decoding.noise import gumbel
from ssd.decoding.processors import Processors, ProcessorSettings, TreePaths, processed_alike
from ssd.decoding.sampling import SamplingTensors
from ssd.decoding.trees.combs import best_tokens
from ssd.decoding.trees.shape import TreeShape
from ssd.decoding.verify.block import verify_block
from ssd.decoding.verify.coupled import verify_coupled
from ssd.decoding.verify.draft_probs import DraftProbs
from ssd.decoding.verify.rejection import Siblings, draw_bonus, verify_rejection

BATCH, VOCABULARY = 3, 50
SHAPE, CHAIN = TreeShape.comb(3, siblings=2), TreeShape.comb(3)


class Waits(TorchDispatchMode):
    """Records operators that make the host wait for a CUDA device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [index for index in args[1] if index is not None] if name.startswith("index") and "put" in name else []
        if name == "index":
            masks = [index for index in args[1] if index is not None]
        reads = name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
        # A value on the device is read back to the host.
        fills = name in ("masked_fill", "masked_fill_") and isinstance(args[2], Tensor)
        if reads or fills or any(mask.dtype is torch.bool for mask in masks):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The torch code, not the CPU's operators."""
    for module in ("sampling", "processors"):
        monkeypatch.setattr(f"ssd.decoding.{module}.has_operators", lambda device: False)
    yield


def logits(rows: int = SHAPE.nodes) -> Tensor:
    return torch.randn(BATCH, rows, VOCABULARY, generator=torch.Generator().manual_seed(0))


def tokens(shape: TreeShape = SHAPE) -> Tensor:
    found = torch.randint(0, VOCABULARY, (BATCH, shape.nodes), generator=torch.Generator().manual_seed(1))
    found[0, -1] = -1
    return found


def params() -> SamplingTensors:
    made = SamplingTensors.empty(BATCH, "cpu")
    for row in range(BATCH):
        made = made.with_row(row, temperature=0.5 * row, top_k=5, top_p=0.9, min_p=0.01, seed=row)
    return made


def processors() -> Processors:
    made = Processors(BATCH, VOCABULARY, "cpu")
    asked = ProcessorSettings(
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias=((7, 2.0),),
        bad_words=((3,), (4, 5)),
        min_tokens=9,
        end_ids=(0, 1),
    )
    for slot in (0, 2):
        made.set(slot, asked, prompt=[1, 2, 3], output=[4])
    return made


def processed() -> Callable[[], Any]:
    made, paths = processors(), TreePaths(SHAPE)
    return lambda: made.apply(logits(), paths.of(tokens()))


def fixed() -> Callable[[], Any]:
    made, out = processors(), torch.zeros(BATCH, 3, VOCABULARY)

    def run() -> Tensor:
        made.fixed(out)
        return processed_alike(logits(), out)

    return run


def committed() -> Callable[[], Any]:
    made = processors()
    return lambda: made.commit(0, [4, 4, 9])


def scored() -> Callable[[], Any]:
    given, positions = params(), torch.arange(SHAPE.nodes).expand(BATCH, -1)
    return lambda: sampling.choose(logits(), given, gumbel(given.seed[:, None], positions, VOCABULARY))


def nearly_filtered() -> Callable[[], Any]:
    packed = params().packed()
    return lambda: best_tokens(sampling.likely(logits(), packed), 3)


def coupled() -> Callable[[], Any]:
    tables = SHAPE.parent_index(), SHAPE.depth_index(), SHAPE.ancestors()
    return lambda: verify_coupled(tokens(), logits().argmax(-1), *tables)


def rejection() -> Callable[[], Any]:
    siblings = Siblings(SHAPE)
    draft = DraftProbs.of_logits(logits(len(siblings.inner)), 8)

    def run() -> Tensor:
        law = verify_rejection(logits().softmax(-1), tokens(), draft, torch.full(tokens().shape, 0.5), siblings)
        return draw_bonus(law, torch.zeros(BATCH, VOCABULARY))

    return run


def block() -> Callable[[], Any]:
    draft, uniforms = DraftProbs.of_logits(logits(CHAIN.depth), 8), torch.full((BATCH, CHAIN.depth), 0.5)
    return lambda: verify_block(logits(CHAIN.nodes).softmax(-1), tokens(CHAIN)[:, 1:], draft, uniforms)


def forecast(make: Callable[[], Any]) -> Callable[[], Callable[[], Any]]:
    def prepared() -> Callable[[], Any]:
        made = make()
        return lambda: made.outcomes(logits(), tokens(), logits())

    return prepared


WORK = {
    "processors": processed,
    "processors of a draft": fixed,
    "processors take tokens in": committed,
    "scores": scored,
    "filters of a draft": nearly_filtered,
    "coupled": coupled,
    "rejection": rejection,
    "block": block,
    "fan-out forecast": forecast(lambda: FanOutForecast(SHAPE, fan_out(SHAPE, 12))),
    "confidence forecast": forecast(lambda: ConfidenceForecast(SHAPE, 12, 1.0)),
    "measured forecast": forecast(lambda: MeasuredForecast(SHAPE, 12, BATCH)),
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_nothing_waits_for_the_device(work: Callable[[], Callable[[], Any]]) -> None:
    run = work()
    with Waits() as waits:
        run()
    assert not waits.seen


def test_waits_are_seen() -> None:
    value, mask = torch.tensor(2.0), torch.tensor([True, False])
    for wait in (lambda: value.item(), lambda: torch.zeros(2).masked_fill_(mask, value), lambda: torch.zeros(2)[mask]):
        with Waits() as waits:
            wait()
        assert waits.seen
