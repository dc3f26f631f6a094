"""Forwards cover the slots in use: their selection, and tokens that do not depend on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssd import LLM, RequestOutput, SamplingParams
from ssd.models.cpu import operators
from ssd.models.runner import ForwardRunner, can_compile
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.sampling.selection import Selector
from ssd.testing.attention import Case

Configure = Callable[..., dict[str, Any]]
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
WARM = replace(GREEDY, temperature=0.8, seed=11)
ASKED = [[9, 30, 77], [5, 6, 5, 6], [*range(20, 60)], [4], [60, 61, 62], [7, 8], [90, 91, 92, 93]]
PARAMS = [
    GREEDY,
    replace(WARM, max_tokens=31),
    replace(GREEDY, logprobs=2, max_tokens=9),
    replace(WARM, seed=3, top_k=9),
    replace(WARM, temperature=1.2, seed=4, top_p=0.9, max_tokens=27),
    replace(GREEDY, repetition_penalty=1.3, max_tokens=8),
    replace(WARM, seed=5, logprobs=1, max_tokens=40),
]


def test_the_smallest_selection_that_contains_the_slots_in_use() -> None:
    selector = Selector(9, (1, 4, 9), torch.device("cpu"))
    assert selector.of([6]).slots == (6,)
    four = selector.of([6, 2])
    assert len(four.slots) == 4 and {2, 6} <= set(four.slots) and four.slots == tuple(sorted(four.slots))
    assert four.index is not None and four.index.tolist() == [*four.slots]
    assert selector.of([2, 6]) is four and selector.of(four.slots) is four
    assert selector.of(range(5)) is selector.all and selector.all.index is None
    assert selector.of([]).count == 1


def test_a_selection_stays_while_it_fits() -> None:
    """Noise that was prepared is that of these slots."""
    selector = Selector(9, (1, 4, 9), torch.device("cpu"))
    four = selector.of([1, 3, 5, 7])
    assert selector.of([3, 7]) is four
    assert selector.of([3, 8]) is not four


@pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cpus_operator_takes_sequences_where_they_lie(dtype: str) -> None:
    assert operators.available()
    inputs = Case(batch=5, rows=3, slots=70, scratch=6, dtype=dtype).inputs()
    whole, sequences = torch.ops.ssd.rows_attention(**inputs, sequences=None), torch.tensor([3, 0])
    own = ("query", "own_keys", "own_values", "limits", "mask")
    some = {name: value[sequences] if name in own else value for name, value in inputs.items()}
    assert torch.equal(torch.ops.ssd.rows_attention(**some, sequences=sequences), whole[sequences])


def answers(config: dict[str, Any], method: str) -> list[RequestOutput]:
    with LLM(config, launch=InprocPipeline) as llm:
        found = llm.generate(ASKED, [replace(params, method=method) for params in PARAMS])
        assert llm.degraded is None
        return found


@pytest.mark.parametrize("siblings", [0, [2, 0, 1]])
@pytest.mark.parametrize("method", ["none", "sd", "ssd"])
def test_tokens_do_not_depend_on_other_slots(method: str, siblings: int | list[int], tiny_config: Configure) -> None:
    """Seven requests that come and go, of all kinds, in one, five or seven slots; log-probabilities to the last bit."""
    speculation = {"lookahead": 3, "siblings": siblings, "fallback": "auto", "forecast": {"budget": 6}}
    found = [answers(tiny_config(engine={"max_batch": batch}, speculation=speculation), method) for batch in (1, 5, 7)]
    for outputs in found[1:]:
        for output, alone in zip(outputs, found[0], strict=True):
            assert output.token_ids == alone.token_ids
            assert output.logprobs == alone.logprobs


@pytest.mark.parametrize(
    "options", [{"governor": True, "lookahead": "auto"}, {"anytime": True}, {"verify": "rejection"}], ids=str
)
def test_with_other_options(options: dict[str, Any], tiny_config: Configure) -> None:
    speculation = {"lookahead": 3, "fallback": "auto", "forecast": {"budget": 6}, **options}
    config = tiny_config(engine={"max_batch": 6}, speculation=speculation)
    found, alone = answers(config, "ssd"), answers(config, "none")
    greedy = [number for number, params in enumerate(PARAMS) if params.temperature == 0 or "verify" not in options]
    assert [found[number].token_ids for number in greedy] == [alone[number].token_ids for number in greedy]


def test_a_single_request_costs_its_own_slot_only(tiny_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    logits = ForwardRunner._logits

    def noted(self: ForwardRunner, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.add(len(tokens))
        return logits(self, tokens, *rest)

    with LLM(tiny_config(engine={"max_batch": 8}, speculation={"lookahead": 3}), launch=InprocPipeline) as llm:
        llm.generate(ASKED[:1], GREEDY)
        monkeypatch.setattr(ForwardRunner, "_logits", noted)
        llm.generate([ASKED[1]], WARM)
        assert seen == {1}
        llm.generate(ASKED[:3], GREEDY)
    assert seen == {1, 4}
