"""Comparing methods, against a scripted engine: counts, ratios, verdicts, JSON names."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from ssd.bench.measure.compare import Comparison, Mismatch, compare, first_difference, parse_methods
from ssd.bench.measure.interleave import Runs, count_ngrams
from ssd.bench.measure.prompts import DEMO_PROMPTS, Prompt, load_prompts
from ssd.bench.report.comparison_report import print_comparison
from ssd.cli.app import make_app
from ssd.cli.options import Makers
from ssd.config.load import load_config
from ssd.config.sections import Config
from ssd.errors import LinkError, RequestError
from ssd.request.output import TokenLogprob
from ssd.testing.models.tiny import tiny_tokenizer
from ssd.testing.twins.llm import ScriptedLLM

PROMPTS = [Prompt(name="f", text="def f", category="code"), Prompt(name="p", text="The", category="prose")]
METHOD_KEYS = {
    "tokens_per_second",
    "speedup",
    "identical",
    "acceptance_rate",
    "acceptance_length",
    "hit_rate",
    "rounds",
    "round_ms",
    "hit_round_ms",
    "forward_ms",
    "draft_ms",
    "repeated_8gram_share",
    "categories",
    "accepted_histogram",
}
TOP_KEYS = {
    "identical_all",
    "identity_promised",
    "verify",
    "prompts",
    "tokens",
    "seed",
    "temperature",
    "lookahead",
    "batch",
    "versions",
    "methods",
}


def run(llm: ScriptedLLM, **options: Any) -> Any:
    options = {"max_tokens": 20, "methods": ("sd", "ssd"), **options}
    runs = Runs(**{name: options.pop(name) for name in [*options] if name in Runs.__slots__})
    return compare(llm, PROMPTS, runs, **options)  # type: ignore[arg-type]


def test_json_has_the_promised_names() -> None:
    data = run(ScriptedLLM()).to_json()
    assert set(data) == TOP_KEYS
    assert list(data["methods"]) == ["none_fast", "none", "sd", "ssd"]
    for method in data["methods"].values():
        assert set(method) == METHOD_KEYS
        assert list(method["categories"]) == ["code", "prose"]
    assert json.loads(json.dumps(data)) == data


def test_figures() -> None:
    data = run(ScriptedLLM(), seed=3, temperature=0.8).to_json()
    assert (data["prompts"], data["tokens"], data["seed"], data["temperature"]) == (2, 40, 3, 0.8)
    assert data["lookahead"] == load_config("embedded").speculation.lookahead
    fast, none, sd, ssd_row = data["methods"].values()
    assert fast["speedup"] == 1.0
    assert fast["tokens_per_second"] == pytest.approx(40 / 4.0)
    assert none["speedup"] == pytest.approx(0.8)
    assert none["acceptance_rate"] is None
    assert none["acceptance_length"] == 1.0
    assert sd["speedup"] == pytest.approx(1.25)
    assert sd["acceptance_rate"] == pytest.approx(0.5)
    assert sd["acceptance_length"] == pytest.approx(3.0)
    assert sd["hit_rate"] is None
    assert sd["rounds"] == 20
    assert ssd_row["speedup"] == pytest.approx(2.0)
    assert ssd_row["hit_rate"] == pytest.approx(2 / 3)
    assert ssd_row["categories"]["code"]["acceptance_rate"] == pytest.approx(0.75)
    assert ssd_row["categories"]["prose"]["acceptance_rate"] == pytest.approx(0.25)
    assert ssd_row["repeated_8gram_share"] == 0.0
    assert ssd_row["forward_ms"] == 1.0
    assert ssd_row["hit_round_ms"] is None


def test_methods_interleave_and_rotate() -> None:
    llm = ScriptedLLM()
    run(llm, methods=("ssd",), repeat=2, warmup_tokens=5)
    assert llm.calls[:3] == [("def f", method, 5) for method in ("none_fast", "none", "ssd")]
    ran = [(prompt, method) for prompt, method, _ in llm.calls[3:]]
    first, second = ["none_fast", "none", "ssd"], ["none", "ssd", "none_fast"]
    assert ran == [(prompt, method) for order in (first, second) for prompt in ("def f", "The") for method in order]


def test_speedup_is_the_median_of_ratios_within_a_repeat() -> None:
    # Every request takes 1.3 times as long as the one before. Ratios taken within a repeat differ
    # by the order the methods ran in, not by how slow the machine had become.
    data = run(ScriptedLLM(drift=1.3), methods=(), repeat=3, warmup_tokens=0).to_json()
    assert data["methods"]["none_fast"]["speedup"] == 1.0
    later, earlier = 0.8 / 1.3, 0.8 * 1.3
    assert data["methods"]["none"]["speedup"] == pytest.approx(sorted([later, earlier, later])[1])


def test_tokens_that_differ_are_found() -> None:
    comparison = run(ScriptedLLM(wrong=("sd",)), repeat=2)
    assert not comparison.identical_all
    assert not comparison.identical("sd")
    assert comparison.identical("ssd")
    first = comparison.mismatches[0]
    assert (first.method, first.prompt, first.repeat, first.position) == ("sd", "f", 0, 3)


def test_fast_plain_decoding_may_differ() -> None:
    comparison = run(ScriptedLLM(wrong=("none_fast",)))
    assert comparison.identical_all
    assert comparison.to_json()["methods"]["none_fast"]["identical"] is False


def test_progress_reaches_the_total() -> None:
    seen: list[tuple[int, int]] = []
    run(ScriptedLLM(), repeat=2, progress=lambda done, total, label: seen.append((done, total)))
    assert seen[0] == (0, 16)
    assert seen[-1] == (16, 16)


def test_tables_say_what_was_found() -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_comparison(run(ScriptedLLM(wrong=("sd",))), console)
    text = console.export_text()
    for part in ("none_fast", "2.00×", "0.67", "identical: no", "sd differs from plain decoding at token 3", "prose"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [({"methods": ("sds",)}, "'sds' is unknown"), ({"repeat": 0}, "repeat must be")],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run(ScriptedLLM(), **options)


def test_helpers() -> None:
    assert first_difference((1, 2), (1, 2)) is None
    assert first_difference((1, 2), (1, 3)) == 1
    assert first_difference((1,), (1, 3)) == 1
    assert count_ngrams(range(7)) == (0, 0)
    assert count_ngrams([1] * 10) == (3, 2)
    assert count_ngrams([1, 2, 1, 2, 1], size=2) == (4, 2)
    assert parse_methods("none, sd,") == ("none", "sd")


# The command line on top of it.


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> ScriptedLLM:
    monkeypatch.setattr("ssd.config.load.resolve_model_path", lambda name: Path(name))
    return ScriptedLLM()


def ssd(llm: ScriptedLLM, *arguments: str) -> Result:
    """Runs the command with this LLM."""

    def start(config: Config) -> ScriptedLLM:
        llm.config = config
        return llm

    return CliRunner().invoke(make_app(Makers(llm=start)), list(arguments))  # type: ignore[arg-type]


def test_compare_command(scripted: ScriptedLLM, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = ["compare", "--demo", "--max-tokens", "20", "--json", str(file), "--set", "speculation.lookahead=6"]
    result = ssd(scripted, *command)
    assert result.exit_code == 0, result.output
    assert "identical: yes" in result.stdout
    data = json.loads(file.read_text())
    assert data["identical_all"] is True
    assert data["lookahead"] == 6
    assert data["prompts"] == len(DEMO_PROMPTS)
    assert scripted.closed


def test_compare_command_fails_when_tokens_differ(scripted: ScriptedLLM) -> None:
    scripted.wrong = ("ssd",)
    result = ssd(scripted, "compare", "--max-tokens", "20")
    assert result.exit_code == 1
    assert "identical: no" in result.stdout


def test_generate_command_streams_and_counts(scripted: ScriptedLLM) -> None:
    result = ssd(scripted, "generate", "def f", "--max-tokens", "20")
    assert result.exit_code == 0, result.output
    assert result.stdout == "one two\n"
    (line,) = result.stderr.strip().splitlines()
    for part in ("20 tokens", "20.0 tok/s", "acceptance rate 0.75", "length 4.00", "hit rate 0.67", "10 rounds"):
        assert part in line


def test_generate_lists_log_probabilities_of_any_pipeline(scripted: ScriptedLLM, tmp_path: Path) -> None:
    """A pipeline in a cluster has no tokenizer here: the command decodes tokens with the configured one."""
    tiny_tokenizer(128).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    found = TokenLogprob(token_id=7, logprob=-0.5, rank=1, top=((7, -0.5), (9, -1.5)))
    scripted.logprobs = (found,) * 3
    command = ("generate", "def f", "--max-tokens", "3", "--set", f"target.model={tmp_path}")
    assert len(ssd(scripted, *command).stderr.strip().splitlines()) == 1
    result = ssd(scripted, *command, "--logprobs", "2")
    assert result.exit_code == 0, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 4
    assert lines[0].split()[:2] == ["-0.500", "1"] and lines[0].endswith("-1.500")


def test_a_lost_draft_is_reported(scripted: ScriptedLLM) -> None:
    scripted.degraded = "the draft worker died"
    for command in (["generate", "x", "--max-tokens", "5"], ["compare", "--max-tokens", "5"]):
        result = ssd(scripted, *command)
        assert result.exit_code == 0, result.output
        assert "warning: without a draft: the draft worker died" in result.stderr


@pytest.mark.parametrize(("error", "code"), [(LinkError("lost\nthe draft"), 3), (KeyboardInterrupt(), 130)])
def test_failures_are_one_line(
    scripted: ScriptedLLM, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(scripted, "stream", fail)
    result = ssd(scripted, "generate", "x")
    assert result.exit_code == code
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert scripted.closed


# Prompt files.


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a", "category": "code", "name": "first"}\n\n'
        '{"prompt": "b"}\n'
        '{"question_id": 81, "category": "writing", "turns": ["c", "d"]}\n'
    )
    assert load_prompts(file) == [
        Prompt(name="first", text="a", category="code"),
        Prompt(name="3", text="b", category="other"),
        Prompt(name="81", text="c", category="writing"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("3", "JSON object"),
        ("{}", "neither prompt nor turns"),
        ('{"prompt": 3}', "prompt must be a text"),
        ('{"turns": []}', "turns must be a list"),
        ('{"prompt": ""}', "empty"),
        ('{"prompt": "x", "name": "1"}', "taken"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(RequestError, match=message) as caught:
        load_prompts(file)
    assert ":2: " in str(caught.value)


def test_empty_prompt_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n")
    with pytest.raises(RequestError, match="holds no prompts"):
        load_prompts(file)


def test_demo_prompts_are_code_and_prose() -> None:
    assert [prompt.category for prompt in DEMO_PROMPTS] == ["code"] * 4 + ["prose"] * 2
    assert len({prompt.name for prompt in DEMO_PROMPTS}) == len(DEMO_PROMPTS)


@pytest.mark.parametrize(
    ("verify", "temperature", "promised"),
    [("coupled", 1.0, True), ("rejection", 0.0, True), ("rejection", 0.7, False), ("block", 1.0, False)],
)
def test_identity_is_counted_where_it_is_promised(verify: str, temperature: float, promised: bool) -> None:
    found = Comparison(
        prompts=(),
        methods=(),
        runs=Runs(temperature=temperature),
        lookahead=3,
        references={},
        tallies={},
        timings_ms={},
        mismatches=(Mismatch(method="ssd", prompt="p", repeat=0, position=1),),
        verify=verify,
    )
    console = Console(file=io.StringIO(), width=200)
    print_comparison(found, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert found.identity_promised == found.to_json()["identity_promised"] == promised
    assert ("not promised" in said) == (not promised)
    assert ("ssd differs" in said) == promised
