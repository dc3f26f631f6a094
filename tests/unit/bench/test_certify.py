"""Certificates: granted to what is exact, refused to what is broken, near ties told from faults."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from torch import Tensor
from typer.testing import CliRunner

from ssd import LLM, SamplingParams
from ssd.bench.exactness.certify import (
    Certificate,
    Divergence,
    Group,
    Trial,
    certify,
    check_promise,
    speculative,
    trials,
)
from ssd.bench.exactness.teacher import Teacher
from ssd.bench.measure.prompts import Prompt
from ssd.cli.app import make_app
from ssd.cli.options import Makers
from ssd.config.load import load_config
from ssd.decoding.verify.coupled import Outcome, verify_coupled
from ssd.errors import RequestError
from ssd.models.rows import RowPlan
from ssd.models.runner import ForwardRunner
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.sampling.slots import SlotSampling
from ssd.pipeline.verifier import decider
from ssd.request.output import SpeculationRecord
from ssd.testing.models.tiny import tiny_model, tiny_tokenizer

Configure = Callable[..., dict[str, Any]]
PROMPTS = [Prompt(name=str(n), text=text) for n, text in enumerate(("hello there", "to be", "in the end"))]
ASKED = trials(PROMPTS, (0.0, 1.0), seed=3, max_tokens=12, ignore_eos=True)


def run(config: dict[str, Any], asked: list[Trial] = ASKED, **how: Any) -> Certificate:
    with LLM(config, launch=InprocPipeline) as llm:
        return certify(llm, asked, **how)


def test_granted(tiny_config: Configure) -> None:
    seen: list[tuple[int, int]] = []
    found = run(tiny_config(), progress=lambda done, of: seen.append((done, of)))
    assert found.passed and found.faults == []
    assert seen == [(4, 6), (6, 6)]
    assert [(group.method, group.temperature) for group in found.groups] == [
        ("sd", 0.0),
        ("ssd", 0.0),
        ("sd", 1.0),
        ("ssd", 1.0),
    ]
    for group in found.groups:
        assert (group.outputs, group.equal, group.near_ties, group.structural, group.tokens) == (3, 3, 0, 0, 36)
        assert group.largest_difference == 0.0
        assert group.record.drafted > 0
    assert found.noise is None and found.divergences == ()
    json.dumps(found.to_json())


def accept_a_candidate_too_many(tokens: Tensor, chosen: Tensor, *tree: Tensor) -> Outcome:
    found = verify_coupled(tokens, chosen, *tree)
    node = torch.where((found.node == 0) & (tokens[:, 1:2] >= 0).any(-1), 1, found.node)
    return Outcome(node, chosen.gather(1, node[:, None]).squeeze(1))


def noise_of_the_position_before(
    self: SlotSampling, lengths: Tensor, _noise: Any = SlotSampling.noise
) -> Tensor | None:
    made = _noise(self, lengths)
    return None if made is None else made[:, [0, *range(made.shape[1] - 1)]]


@pytest.mark.parametrize(
    ("place", "name", "mutant", "numerics"),
    [
        (decider, "verify_coupled", accept_a_candidate_too_many, "strict"),
        (SlotSampling, "noise", noise_of_the_position_before, "fast"),
    ],
)
def test_refused_to_a_broken_engine(
    place: Any, name: str, mutant: Any, numerics: str, tiny_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, mutant)
    found = run({**tiny_config(engine={"max_batch": 2}), "numerics": numerics})
    assert not found.passed
    broken = [group for group in found.groups if group.structural]
    assert {group.method for group in broken} == {"sd", "ssd"}
    assert any("structural" in fault for fault in found.faults)
    assert sum(group.equal + group.near_ties + group.structural for group in found.groups) == 12
    assert found.noise is not None and found.noise < 1e-3
    for one in found.divergences:
        if one.kind == "structural":
            assert one.gap is not None and one.band is not None and one.gap > one.band


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target in which every token has a twin: the rows of its head differ in the last bits."""
    folder = tmp_path_factory.mktemp("twins")
    model = tiny_model("llama", vocab_size=128)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        noise = torch.randn(head[1::2].shape, generator=generator)
        head[1::2] = head[::2] * (1 + 5e-8 * noise)
    model.save_pretrained(folder)
    tiny_tokenizer(128).save_pretrained(folder)
    return folder


def another_kernel(
    self: ForwardRunner, plan: RowPlan, *rest: Any, _logits: Any = ForwardRunner.logits, **others: Any
) -> Tensor:
    """What some machines do by themselves: with more rows every other logit is one bit larger."""
    logits = _logits(self, plan, *rest, **others)
    larger = torch.nextafter(logits, torch.full_like(logits, torch.inf))
    return logits if plan.rows == 1 else torch.where(torch.arange(logits.shape[-1]) % 2 == 1, larger, logits)


def test_near_ties_of_fast_numerics(twins: Path, tiny_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another width, other last bits, another twin: no fault of the methods, and so it is told."""
    monkeypatch.setattr(ForwardRunner, "logits", another_kernel)
    config = tiny_config()
    config["target"]["model"] = str(twins)
    asked = [replace(one, params=replace(one.params, temperature=0.0, max_tokens=16)) for one in ASKED[:2]]
    found = run({**config, "numerics": "fast"}, asked)
    (sd, ssd_) = found.groups
    assert sd.near_ties and ssd_.near_ties and not sd.structural and not ssd_.structural
    assert found.passed
    assert all(one.kind == "near_tie" and one.gap <= one.band < 1e-3 for one in found.divergences)  # type: ignore[operator]
    # The same pair in strict numerics has nothing to tell apart: the trial at start sees the bit, and pads.
    assert run(config, asked).groups[0].equal == len(asked)


def certificate(numerics: str, **counts: int) -> Certificate:
    config = load_config("embedded", [f"numerics={numerics}"])
    group = Group(method="ssd", temperature=0.0, record=SpeculationRecord(drafted=4))
    for name, count in counts.items():
        setattr(group, name, count)
    return Certificate(config=config, groups=(group,), divergences=(), noise=None, degraded=None)


def test_what_fails() -> None:
    assert certificate("fast", near_ties=2).passed
    assert "2 near ties, which numerics: strict rules out" in certificate("strict", near_ties=2).faults
    assert not certificate("fast", structural=1).passed
    lost = replace(certificate("strict"), degraded="it\ndied")
    assert lost.faults == ["the draft was lost (it died)"]
    idle = certificate("strict")
    idle.groups[0].record.drafted = 0
    assert idle.faults == ["ssd at temperature 0 verified no draft token"]


class Cut:
    """An engine whose methods end outputs a token too early."""

    def __init__(self, llm: LLM):
        self._llm, self.config, self.degraded = llm, llm.config, None

    def generate(self, prompts: Any, params: list[SamplingParams]) -> Any:
        shorter = [p if p.method == "none" else replace(p, max_tokens=p.max_tokens - 1) for p in params]
        return self._llm.generate(prompts, shorter)


def test_another_end_is_structural(tiny_config: Configure) -> None:
    with LLM(tiny_config(), launch=InprocPipeline) as llm:
        found = certify(Cut(llm), ASKED[:1], ("ssd",))  # type: ignore[arg-type]
    (one,) = found.divergences
    assert one.kind == "structural" and one.scores is None and one.position == 11
    assert one.tokens[0] is not None and one.tokens[1] is None


@pytest.fixture(scope="module")
def teacher(tiny_config: Configure) -> Teacher:
    return Teacher(load_config(tiny_config()))


def test_teacher_agrees_with_the_engine(teacher: Teacher, tiny_config: Configure) -> None:
    with LLM(tiny_config(), launch=InprocPipeline) as llm:
        asked = SamplingParams(max_tokens=12, logprobs=4, method="none", ignore_eos=True)
        (output,) = llm.generate(["to be"], asked)
        assert 0 < teacher.noise_of(output) < 1e-3
        assert output.logprobs is not None
        wrong = replace(output.logprobs[5], logprob=output.logprobs[5].logprob + 1)
        logprobs = (*output.logprobs[:5], wrong, *output.logprobs[6:])
        assert teacher.noise_of(replace(output, logprobs=logprobs)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=4),
        SamplingParams(temperature=1.0, seed=4, repetition_penalty=1.3, presence_penalty=0.5),
    ],
)
def test_the_band_is_the_gap_that_is_allowed(params: SamplingParams, teacher: Teacher) -> None:
    prompt, output = [20, 30, 40], [50]
    row = teacher._scores(teacher.logits([*prompt, *output], 1)[None], prompt, output, params)[0, 0]
    best, second, third = row.topk(3).indices.tolist()
    gap = float(row[best] - row[second])
    scale = params.repetition_penalty
    assert not teacher.force(prompt, output, params, (best, second), 0.9 * gap / scale).within
    forced = teacher.force(prompt, output, params, (second, best), 1.1 * gap * scale)
    assert forced.within and forced.gap == pytest.approx(gap)
    # A pair of tokens neither of which would be chosen.
    assert not teacher.force(prompt, output, params, (second, third), 0.1 * gap).within


def test_the_edge_of_a_filter(teacher: Teacher) -> None:
    """The token that is out is as good as in if the band can bring it in."""
    prompt, params = [20, 30, 40], SamplingParams(temperature=1.0, top_k=1)
    row = teacher.logits(prompt, 1)[0]
    best, second = row.topk(2).indices.tolist()
    gap = float(row[best] - row[second])
    # Chosen once it is the likeliest, whatever its noise.
    assert not teacher.force(prompt, [], params, (best, second), 0.9 * gap).within
    forced = teacher.force(prompt, [], params, (best, second), 1.1 * gap)
    assert forced.within and forced.scores[1] == float("-inf")


def test_refusals(tiny_config: Configure) -> None:
    law = load_config("embedded", ["speculation.verify=rejection"])
    check_promise(law, [0.0])
    with pytest.raises(RequestError, match=r"distribution, not its tokens, at temperature 0\.7"):
        check_promise(law, [0.0, 0.7])
    for methods, message in ((["sdd"], "'sdd' cannot be certified"), (["none"], "nothing to certify")):
        with pytest.raises(RequestError, match=message):
            speculative(methods)
    assert speculative(["ssd", "none"]) == ("ssd",)


@pytest.fixture
def command(tiny_config: Configure, tmp_path: Path) -> list[str]:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config()))
    (tmp_path / "p.jsonl").write_text('{"prompt": "to be or"}\n{"prompt": "hello"}\n')
    files = ["--config", str(tmp_path / "c.yaml"), "--prompts", str(tmp_path / "p.jsonl")]
    return ["certify", *files, "--max-tokens", "12", "--json", str(tmp_path / "out.json")]


def run_command(*arguments: str) -> Result:
    makers = Makers(llm=functools.partial(LLM, launch=InprocPipeline))
    return CliRunner().invoke(make_app(makers), list(arguments))


def test_command(command: list[str], tmp_path: Path) -> None:
    result = run_command(*command, "--temperature", "0", "--temperature", "0.7", "--methods", "ssd")
    assert result.exit_code == 0, result.output
    assert "certified: yes" in result.stdout
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["passed"] and [(g["method"], g["temperature"]) for g in data["groups"]] == [("ssd", 0.0), ("ssd", 0.7)]


def test_command_refuses(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_command(*command, "--set", "speculation.verify=block", "--temperature", "1")
    assert result.exit_code == 2 and "distribution, not its tokens" in result.stderr
    monkeypatch.setattr(decider, "verify_coupled", accept_a_candidate_too_many)
    result = run_command(*command)
    assert result.exit_code == 1, result.output
    for part in ("first structural: ", "numerical band", "certified: no: ", "structural divergence"):
        assert part in result.stdout
    data = json.loads((tmp_path / "out.json").read_text())
    assert not data["passed"]
    assert Divergence(**data["divergences"][0]).kind in ("structural", "near_tie")
