"""``ssd bench``: sweeps, batches, peers, pictures, page and trace."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ssd import LLM, SamplingParams
from ssd.bench.measure import sweep as bench_module
from ssd.bench.measure.compare import compare
from ssd.bench.measure.interleave import Runs, Sample
from ssd.bench.measure.prompts import Prompt
from ssd.bench.measure.settings import Beside, Sweep, parse_beside, parse_sweep
from ssd.bench.measure.sweep import BenchOptions, bench
from ssd.bench.measure.trace import chrome_trace
from ssd.bench.peers.adapters import Peer, PeerUnavailable, parse_peers
from ssd.bench.peers.worker import stretched
from ssd.bench.report.bench_page import bench_page, bench_pictures, rounds_of
from ssd.cli.app import make_app
from ssd.cli.options import Makers
from ssd.config.load import load_config, resolve_model_path
from ssd.errors import ConfigError, RequestError
from ssd.models.checkpoints.loading import load_tokenizer
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.request.output import RequestOutput, SpeculationRecord
from ssd.testing.twins.llm import ScriptedLLM

PROMPTS = [
    Prompt(name=str(i), text="def f" if i % 2 else "The", category="code" if i % 2 else "prose") for i in range(6)
]


class Twice:
    """A peer with tokens of its own, twice as fast as ``none_fast``."""

    name = "twice"

    def run(self, prompts: Any, params: SamplingParams) -> Sample:
        outputs = [
            RequestOutput(
                prompt=prompt.text,
                prompt_token_ids=(1,),
                text="",
                token_ids=(7,) * params.max_tokens,
                finish_reason="length",
                speculation=SpeculationRecord(),
                decode_s=1.0,
            )
            for prompt in prompts
        ]
        return Sample(outputs=outputs, decode_s=1.0)


def test_peers_take_turns_and_promise_nothing() -> None:
    comparison = compare(ScriptedLLM(), PROMPTS, Runs(max_tokens=20, repeat=2), peers=[Twice()])  # type: ignore[arg-type]
    data = comparison.to_json()
    assert list(data["methods"]) == ["none_fast", "none", "sd", "ssd", "twice"]
    assert data["methods"]["twice"]["speedup"] == pytest.approx(2.0)
    assert data["methods"]["twice"]["round_ms"] is None
    assert data["methods"]["twice"]["identical"] is False
    assert data["identical_all"] is True


def test_batches_are_timed_by_their_rounds() -> None:
    data = compare(ScriptedLLM(), PROMPTS, Runs(max_tokens=20, batch=2), methods=("ssd",)).to_json()  # type: ignore[arg-type]
    # Three of each category: a pair and one alone. A pair's six rounds take a second each, whatever the
    # requests say; alone, ssd says 1 second.
    assert data["batch"] == 2
    assert data["methods"]["ssd"]["tokens_per_second"] == pytest.approx(6 * 20 / (2 * 6.0 + 2 * 1.0))


@pytest.mark.parametrize(
    ("given", "values"), [("speculation.lookahead=1..3", ("1", "2", "3")), ("engine.max_batch=1, 8", ("1", "8"))]
)
def test_sweeps(given: str, values: tuple[str, ...]) -> None:
    assert parse_sweep(given) == Sweep(key=given.split("=")[0], values=values)


@pytest.mark.parametrize("given", ["speculation.lookahead", "a=", "=1..2", "a=3..1", "a=1..x", "a=1,,2"])
def test_wrong_sweeps(given: str) -> None:
    with pytest.raises(RequestError, match="--sweep"):
        parse_sweep(given)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    sweeps = [parse_sweep(text) for text in ("speculation.lookahead=1..2", "speculation.forecast.budget=4,8")]
    options = BenchOptions(
        peers=("vllm",),
        sweeps=[*sweeps, parse_sweep("engine.max_batch=1,2")],
        runs=Runs(max_tokens=20, repeat=2),
    )
    return bench(ScriptedLLM, load_config("embedded"), PROMPTS, options)  # type: ignore[arg-type]


def test_every_setting_is_measured(data: dict[str, Any]) -> None:
    assert json.loads(json.dumps(data)) == data
    found = [(one["sweep"], one["lookahead"], one["budget"], one["batch"]) for one in data["settings"]]
    configured = load_config("embedded").speculation
    depth, budget = configured.lookahead, configured.forecast.budget
    assert found == [
        (None, depth, budget, 1),
        ("speculation.lookahead", 1, budget, 1),
        ("speculation.lookahead", 2, budget, 1),
        ("speculation.forecast.budget", depth, 4, 1),
        ("speculation.forecast.budget", depth, 8, 1),
        ("engine.max_batch", depth, budget, 1),
        ("engine.max_batch", depth, budget, 2),
    ]
    assert "--vllm-python" in data["skipped"]["vllm"]
    assert set(rounds_of(data)) == {"none", "sd", "ssd"}


def test_settings_beside_take_turns() -> None:
    """In every setting, with its batch, and named by what is different; their tokens are compared too."""
    started: list[tuple[bool, int]] = []

    def launch(config: Any) -> ScriptedLLM:
        started.append((config.speculation.governor, config.engine.max_batch))
        return ScriptedLLM(config)

    other = parse_beside("speculation.governor=true speculation.fallback=none")
    assert other == Beside(settings=("speculation.governor=true", "speculation.fallback=none"))
    config = load_config("embedded", ["speculation.governor=false"])
    options = BenchOptions(sweeps=[parse_sweep("engine.max_batch=2")], besides=[other], runs=Runs(max_tokens=20))
    found = bench(launch, config, PROMPTS, options)  # type: ignore[arg-type]
    assert started == [(False, 1), (True, 1), (False, 2), (True, 2)]
    for setting in found["settings"]:
        assert list(setting["methods"]) == ["none_fast", "none", "sd", "ssd", "governor=true, fallback=none"]
        assert setting["methods"]["governor=true, fallback=none"]["identical"]


@pytest.mark.parametrize("given", ["", "governor", "a=1 b"])
def test_wrong_settings_beside(given: str) -> None:
    with pytest.raises(RequestError, match="--beside"):
        parse_beside(given)


def test_a_sweep_of_words_is_drawn(data: dict[str, Any]) -> None:
    """``auto`` is no number: it gets a level of its own."""
    settings = [{**one, "value": "auto" if one["value"] == "2" else one["value"]} for one in data["settings"]]
    assert bench_pictures({**data, "settings": settings}).keys() == bench_pictures(data).keys()


def test_the_page_holds_all_pictures(data: dict[str, Any]) -> None:
    drawn = bench_pictures(data)
    assert {title.split(":")[0] for title in drawn} == {
        "Tokens per second",
        "Speed against lookahead",
        "Hit rate against budget",
        "Tokens per second against batch",
        "Timeline of rounds",
    }
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())
    page = bench_page(data)
    assert page.count("data:image/png;base64,") == len(drawn)
    assert "http" not in page.replace("http-equiv", "")
    for text in ("speculation.lookahead = 2", "Not measured: vllm", "<h3>code</h3>"):
        assert text in page


def test_a_trace_is_chromes(data: dict[str, Any]) -> None:
    events = chrome_trace(rounds_of(data))["traceEvents"]
    lanes = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert lanes == {"none", "sd", "ssd", "verifier", "draft"}
    spans = [event for event in events if event["ph"] == "X" and event["pid"] == 1]
    verified = [event for event in spans if event["tid"] == 1]
    assert [event["ts"] for event in verified] == pytest.approx([i * 1e6 for i in range(6)])
    assert [event["cat"] for event in verified] == ["plain", "hit", "miss", "hit", "miss", "hit"]
    jit = [event for event in spans if event["cat"] == "jit"]
    assert [(event["ts"], event["dur"]) for event in jit] == [pytest.approx((i * 1e6 + 7e5, 3e5)) for i in (1, 3, 5)]


def test_bench_command(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("b.json", "b.html", "b.trace")}
    command = ["bench", "--max-tokens", "12", "--json", str(files["b.json"]), "--html", str(files["b.html"])]
    command += ["--trace", str(files["b.trace"]), "--pictures", str(tmp_path / "png"), "--repeat", "1"]
    result = CliRunner().invoke(make_app(Makers(llm=ScriptedLLM)), command)  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    assert "identical: yes" in result.stdout
    assert all(file.stat().st_size > 1000 for file in files.values())
    assert (tmp_path / "png" / "timeline-of-rounds-ssd.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peers", "vlm"], "'vlm' is unknown"),
        (["--sweep", "nonsense"], "--sweep"),
        (["--sweep", "speculation.lokahead=1..2"], "lookahead"),
        (["--html", "no/such/folder/x"], "create it first"),
    ],
)
def test_wrong_commands(options: list[str], message: str) -> None:
    result = CliRunner().invoke(make_app(), ["bench", *options])
    assert result.exit_code == 2
    assert message in result.stderr


def test_sweeps_are_checked_before_anything_starts() -> None:
    def launch(_: Any) -> Any:
        raise AssertionError

    with pytest.raises(ConfigError, match="lookahead"):
        options = BenchOptions(sweeps=[parse_sweep("speculation.lookahead=4,99")])
        bench(launch, load_config("embedded"), PROMPTS, options)


# Peers.


def test_decoding_time_leaves_the_prefill_out() -> None:
    assert stretched(9.0, 10, 1) == pytest.approx(10.0)  # nine tokens after the first in nine seconds
    assert stretched(0.0, 1, 1) == 0.0
    assert parse_peers("transformers, vllm") == ("transformers", "vllm")


def test_assisted_generation_gives_the_targets_tokens(tiny_config: Callable[..., dict[str, Any]]) -> None:
    config = load_config(tiny_config())
    folder = resolve_model_path(config.target.model)
    tokenizer = load_tokenizer(folder)
    peer = Peer("transformers-assisted", config, tokenizer)
    try:
        assert peer.most == 1
        prompt = Prompt(name="a", text="the cat sat")
        sample = peer.run([prompt], SamplingParams(max_tokens=24))
        assert sample.decode_s > 0
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = torch.tensor([tokenizer(prompt.text)["input_ids"]])
        with torch.no_grad():
            for _ in range(24):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert list(sample.outputs[0].token_ids) == ids[0, -24:].tolist()
    finally:
        peer.close()


def test_a_peer_that_cannot_load_says_why(tiny_config: Callable[..., dict[str, Any]]) -> None:
    config = load_config(tiny_config())
    tokenizer = load_tokenizer(resolve_model_path(config.target.model))
    with pytest.raises(PeerUnavailable, match="vllm"):
        Peer("vllm", config, tokenizer, python=sys.executable)
    with pytest.raises(PeerUnavailable, match="does not start"):
        Peer("vllm", config, tokenizer, python="/nowhere/python")


def test_a_peer_that_dies_costs_its_own_figures(
    tiny_config: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying:
        version, most, calls = "1", 1, 0

        def __init__(self, name: str, *_: Any, **__: Any):
            self.name = name

        def run(self, prompts: Any, params: Any) -> Any:
            self.calls += 1
            if self.calls > 1:
                raise PeerUnavailable(self.name, "its process ended")

        def close(self) -> None:
            return

    monkeypatch.setattr(bench_module, "Peer", Dying)
    data = bench(
        lambda config: LLM(config, launch=InprocPipeline),
        load_config(tiny_config()),
        [Prompt(name="a", text="one two")],
        BenchOptions(methods=("none", "ssd"), peers=("transformers",), runs=Runs(max_tokens=8)),
    )
    assert data["peers"] == {} and "its process ended" in data["skipped"]["transformers"]
    assert {"none_fast", "none", "ssd"} == set(data["settings"][0]["methods"])


def test_a_peer_that_is_killed_is_left(tiny_config: Callable[..., dict[str, Any]]) -> None:
    config = load_config(tiny_config())
    tokenizer = load_tokenizer(resolve_model_path(config.target.model))
    peer = Peer("transformers", config, tokenizer)
    peer._process.kill()
    peer._process.wait(10)
    with pytest.raises(PeerUnavailable, match="transformers: its process ended"):
        peer.run([Prompt(name="a", text="one two")], SamplingParams(max_tokens=4))
    peer.close()
