"""The heart: whatever drafts, however it speculates, the tokens are those of plain decoding.

Every case starts one pipeline in this process (worker threads, the real link) and gives it the
same requests three times: plainly, with ``sd`` and with ``ssd``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssd import LLM, RequestOutput, SamplingParams
from ssd.pipeline.policy.governor import Governor
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.testing.models.tiny import ARCHITECTURES

Configure = Callable[..., dict[str, Any]]

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
WARM = replace(GREEDY, temperature=0.8, seed=11)
HOT = replace(GREEDY, temperature=1.2, seed=2**63 - 1)
MIXED = [
    GREEDY,
    WARM,
    HOT,
    replace(WARM, top_p=0.9, seed=1),
    replace(HOT, top_k=8, seed=2),
    replace(HOT, min_p=0.05, max_tokens=17, seed=3),
    replace(WARM, top_k=20, top_p=0.8, min_p=0.02, seed=4),
]


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    """Token ids, of lengths from one token on."""
    generator = torch.Generator().manual_seed(5)
    lengths = [1 + (longest - 1) * i // max(1, count - 1) for i in range(count)]
    return [torch.randint(4, 128, (length,), generator=generator).tolist() for length in lengths]


def run(llm: LLM, asked: list[list[int]], params: list[SamplingParams], method: str) -> list[RequestOutput]:
    return llm.generate(asked, [replace(p, method=method) for p in params])


def same_as_plain(
    config: dict[str, Any], params: list[SamplingParams], asked: list[list[int]] | None = None
) -> dict[str, list[RequestOutput]]:
    """Outputs by method, checked to be equal; that the draft took part is checked too."""
    asked = asked or prompts(len(params))
    with LLM(config, launch=InprocPipeline) as llm:
        outputs = {method: run(llm, asked, params, method) for method in ("none", "ssd", "sd")}
        assert llm.degraded is None
    for method in ("sd", "ssd"):
        for output, plain in zip(outputs[method], outputs["none"], strict=True):
            assert output.token_ids == plain.token_ids
            assert (output.text, output.finish_reason) == (plain.text, plain.finish_reason)
    assert sum(output.speculation.drafted for output in outputs["none"]) == 0
    for method in ("sd", "ssd"):
        assert sum(output.speculation.drafted for output in outputs[method]) > 0
    assert sum(output.speculation.lookups for output in outputs["sd"]) == 0
    assert sum(output.speculation.lookups for output in outputs["ssd"]) > 0
    return outputs


def total(outputs: list[RequestOutput], name: str) -> int:
    return sum(getattr(output.speculation, name) for output in outputs)


# K, siblings, budget, shape, fallback, batch, dtype: every value, and every pair that has once broken something.
COVER = [
    (1, 0, 1, "uniform", "jit", 1, "float32"),
    (2, 2, 12, "confidence", "none", 4, "float32"),
    (3, 1, 7, "geometric", "jit", 4, "bfloat16"),
    (4, 0, 12, "confidence", "none", 1, "bfloat16"),
    (5, 2, 30, "uniform", "jit", 1, "bfloat16"),
    (6, 0, 24, "confidence", "jit", 4, "float32"),
    (7, 1, 3, "confidence", "none", 4, "bfloat16"),
    (8, 2, 48, "confidence", "jit", 4, "float32"),
    (8, 0, 5, "geometric", "none", 1, "float32"),
    (5, 1, 20, "confidence", "auto", 3, "float32"),
    (1, 2, 64, "confidence", "jit", 4, "bfloat16"),
]


@pytest.mark.parametrize(
    ("lookahead", "siblings", "budget", "shape", "fallback", "batch", "dtype"), COVER, ids=lambda value: str(value)
)
def test_speculations(
    lookahead: int,
    siblings: int,
    budget: int,
    shape: str,
    fallback: str,
    batch: int,
    dtype: str,
    tiny_config: Configure,
) -> None:
    """A draft that is right now and then, all temperatures and filters, more requests than slots."""
    config = tiny_config(
        dtype=dtype,
        engine={"max_batch": batch},
        speculation={
            "lookahead": lookahead,
            "siblings": siblings,
            "fallback": fallback,
            "forecast": {"budget": budget, "shape": shape},
            "copy_bias": [0.5, 1, 2] if lookahead % 2 else [],
        },
    )
    outputs = same_as_plain(config, MIXED)
    assert {len(output.token_ids) for output in outputs["none"]} == {24, 17}
    # It had something to be wrong about: outcomes of several depths, hits and misses.
    for method in ("sd", "ssd"):
        assert 0 < total(outputs[method], "accepted") < total(outputs[method], "drafted") * (1 + siblings)
    assert 0 < total(outputs["ssd"], "hits") < total(outputs["ssd"], "lookups")
    assert total(outputs["sd"], "rounds") < total(outputs["none"], "rounds")
    assert total(outputs["ssd"], "rounds") < total(outputs["none"], "rounds")


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "llama"])
def test_architectures(architecture: str, tiny_config: Configure) -> None:
    config = tiny_config(architecture, engine={"max_batch": 2}, speculation={"siblings": 1, "forecast": {"budget": 14}})
    params = [replace(p, max_tokens=14) for p in MIXED[:4]]
    assert total(same_as_plain(config, params)["ssd"], "accepted") > 0


@pytest.mark.parametrize("siblings", [0, 2])
@pytest.mark.parametrize("draft", ["target", "random", "adversary"])
def test_drafts(draft: str, siblings: int, tiny_config: Configure) -> None:
    config = tiny_config(draft=draft, engine={"max_batch": 4}, speculation={"siblings": siblings})
    outputs = same_as_plain(config, MIXED)
    greedy = outputs["ssd"][0].speculation
    if draft == "target":
        assert greedy.acceptance_rate is not None and greedy.acceptance_rate > 0.9
        assert greedy.hit_rate is not None and greedy.hit_rate > 0.9
    elif draft == "adversary":
        assert greedy.accepted == outputs["sd"][0].speculation.accepted == 0
        assert greedy.rounds == 24
    else:
        assert greedy.accepted < greedy.drafted / 2


def test_a_target_of_another_architecture(tiny_config: Configure) -> None:
    config = tiny_config("qwen3") | {"draft": tiny_config("gpt_neox", draft="random")["draft"]}
    same_as_plain(config, MIXED)


def test_where_requests_end(tiny_config: Configure) -> None:
    """End-of-text, stop ids, ``max_tokens`` inside a block, the context's limit, stop strings."""
    config = tiny_config(
        draft="target",
        engine={"max_batch": 3, "max_model_len": 64},
        speculation={"lookahead": 5, "siblings": 1},  # draft = target: blocks are long, cuts fall inside
    )
    ends = [
        *(replace(HOT, ignore_eos=False, seed=seed, max_tokens=60) for seed in range(12)),
        *(replace(GREEDY, max_tokens=count) for count in range(1, 9)),
        *(replace(HOT, stop_token_ids=tuple(range(4, 20)), seed=seed) for seed in range(4)),
        *(replace(WARM, max_tokens=1000, seed=seed) for seed in range(3)),
        replace(GREEDY, max_tokens=1000),
    ]
    asked = prompts(len(ends), longest=50)
    outputs = same_as_plain(config, ends, asked)["ssd"]
    eos, cut, stop_ids, context = outputs[:12], outputs[12:20], outputs[20:24], outputs[24:]
    assert any(output.finish_reason == "stop" for output in eos)
    for output in eos:
        assert 0 not in output.token_ids[:-1]
        assert (output.finish_reason == "stop") == (output.token_ids[-1] == 0)
    assert [len(output.token_ids) for output in cut] == list(range(1, 9))
    assert {output.finish_reason for output in cut} == {"length"}
    assert any(output.finish_reason == "stop" for output in stop_ids)
    for output in stop_ids:
        assert not set(output.token_ids[:-1]) & set(range(4, 20))
        assert (output.finish_reason == "stop") == (output.token_ids[-1] in range(4, 20))
    for output in context:
        assert output.finish_reason == "length"
        assert len(output.prompt_token_ids) + len(output.token_ids) == 64


def test_stop_strings(tiny_config: Configure) -> None:
    """Cut before the string, wherever in the generated text it lies, the same for every method."""
    config = tiny_config(draft="target", engine={"max_batch": 2}, speculation={"lookahead": 4})
    asked = prompts(6)
    with LLM(config, launch=InprocPipeline) as llm:
        whole = run(llm, asked, [GREEDY] * 6, "none")
        for start, length in itertools.product((3, 9), (1, 4)):
            params = [replace(GREEDY, stop=(output.text[start : start + length], "never there")) for output in whole]
            plain, *others = (run(llm, asked, params, method) for method in ("none", "sd", "ssd"))
            for output, free, p in zip(plain, whole, params, strict=True):
                assert output.finish_reason == "stop"
                assert output.text == free.text[: free.text.index(p.stop[0])]
                assert free.token_ids[: len(output.token_ids)] == output.token_ids
            for outputs in others:
                assert [(o.text, o.token_ids) for o in outputs] == [(o.text, o.token_ids) for o in plain]
        # The pipeline is whole after so many cancelled requests.
        assert [o.token_ids for o in run(llm, asked, [GREEDY] * 6, "ssd")] == [o.token_ids for o in whole]


def test_alone_or_among_others(tiny_config: Configure) -> None:
    """Batch mates, their methods and their coming and going change nothing."""
    config = tiny_config(engine={"max_batch": 4}, speculation={"siblings": 1})
    asked = prompts(9)
    params = [replace(p, max_tokens=count) for p, count in zip(itertools.cycle(MIXED), range(5, 41, 4))]
    with LLM(config, launch=InprocPipeline) as llm:
        alone = [run(llm, [ids], [p], "none")[0].token_ids for ids, p in zip(asked, params, strict=True)]
        for methods in (("ssd",), ("sd", "ssd"), ("none", "ssd", "sd"), ("none_fast", "ssd")):
            mixed = [replace(p, method=m) for p, m in zip(params, itertools.cycle(methods))]
            outputs = llm.generate(asked, mixed)
            assert [output.token_ids for output in outputs] == alone
        assert run(llm, asked[3:4], params[3:4], "ssd")[0].token_ids == alone[3]


def test_streams_and_cancelled_streams(tiny_config: Configure) -> None:
    config = tiny_config(draft="target", engine={"max_batch": 2})
    ids = prompts(3)[2]
    with LLM(config, launch=InprocPipeline) as llm:
        (plain,) = run(llm, [ids], [WARM], "none")
        for _ in range(3):
            events = llm.stream(ids, replace(WARM, max_tokens=100))
            first = next(events)
            assert first.token_ids == plain.token_ids[: len(first.token_ids)]
            events.close()  # its slot is free again
        events = list(llm.stream(ids, WARM))
        assert tuple(token for event in events for token in event.token_ids) == plain.token_ids
        assert "".join(event.text for event in events) == plain.text
        assert [event.output for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].output is not None and events[-1].output.token_ids == plain.token_ids
        assert sum(event.accepted for event in events) > 0
        assert llm.degraded is None


def test_plain_without_a_draft_is_the_same(tiny_config: Configure) -> None:
    """``none`` beside a draft and ``none`` without one: the same width, hence the same bits."""
    tokens = []
    for draft in ("random", None):
        config = tiny_config(draft=draft, speculation={} if draft else {"method": "none"})
        with LLM(config, launch=InprocPipeline) as llm:
            tokens.append([output.token_ids for output in run(llm, prompts(7), MIXED, "none")])
    assert tokens[0] == tokens[1]


def test_seeds_matter(tiny_config: Configure) -> None:
    with LLM(tiny_config(engine={"max_batch": 4}), launch=InprocPipeline) as llm:
        hot = [replace(HOT, seed=seed) for seed in (1, 2, 1)]
        one, two, again = (output.token_ids for output in run(llm, [prompts(3)[1]] * 3, hot, "ssd"))
        assert one == again
        assert one != two


def test_records_add_up(tiny_config: Configure) -> None:
    config = tiny_config(engine={"max_batch": 2}, speculation={"lookahead": 4})
    for output in same_as_plain(config, MIXED)["ssd"]:
        record = output.speculation
        assert sum(record.accepted_histogram) == record.rounds
        assert sum(k * count for k, count in enumerate(record.accepted_histogram)) == record.accepted
        assert record.tokens == record.accepted + record.rounds
        assert record.tokens - 4 <= len(output.token_ids) <= record.tokens
        assert record.hits <= record.lookups <= record.rounds
        assert record.drafted <= 4 * record.rounds


@pytest.mark.parametrize("draft", ["noisy", "adversary"])
@pytest.mark.parametrize("numerics", ["strict", "fast"])
def test_governor_in_and_out(
    draft: str, numerics: str, tiny_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A governor that changes its mind all the time: sequences leave the draft and come back."""
    for name, value in {"MEMORY": 3, "TRIAL": 2, "REST": 2, "LONGEST_REST": 2}.items():
        monkeypatch.setattr(f"ssd.pipeline.policy.governor.{name}", value)
    monkeypatch.setattr(
        Governor, "rates", lambda self: {"none": 2.0, "ngram": 1.0, self.arm: 2.0 * (self.arm == "none")}
    )
    config = tiny_config(draft=draft, engine={"max_batch": 2}, speculation={"governor": True})
    params = [replace(p, max_tokens=40) for p in (GREEDY, WARM, HOT)]
    asked = prompts(3)
    with LLM({**config, "numerics": numerics}, launch=InprocPipeline) as llm:
        outputs = {method: run(llm, asked, params, method) for method in ("none", "ssd", "sd")}
        assert llm.degraded is None
    for method in ("ssd", "sd"):
        if numerics == "strict":
            assert [o.token_ids for o in outputs[method]] == [o.token_ids for o in outputs["none"]]
        assert all(len(output.token_ids) == 40 for output in outputs[method])
        for output in outputs[method]:
            assert 3 * 2 <= output.speculation.drafted < 3 * output.speculation.rounds * 0.9
    assert 0 < total(outputs["ssd"], "lookups") < total(outputs["ssd"], "rounds") * 0.9
