"""Bad input gets one clear line and exit code 2; importing the package is cheap."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ssd
from ssd.cli.app import make_app

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """Overrides that name two model folders, so that only the input under test is wrong."""
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    return ["--set", f"target.model={tmp_path / 'target'}", "--set", f"draft.model={tmp_path / 'draft'}"]


def complaint(*arguments: str) -> str:
    result = CliRunner().invoke(make_app(), list(arguments))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("command", [["generate", "x"], ["compare"], ["info"]])
def test_unknown_key_names_the_nearest(command: list[str]) -> None:
    assert "speculation.lookahead" in complaint(*command, "--set", "speculation.lookahed=6")


@pytest.mark.parametrize("command", [["generate", "x"], ["compare"], ["info"]])
def test_missing_configuration(command: list[str]) -> None:
    assert "embedded" in complaint(*command, "--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature must be"),
        (["--temperature", "nan"], "temperature must be"),
        (["--top-p", "0"], "top_p must be"),
        (["--top-k", "-1"], "top_k must be"),
        (["--min-p", "2"], "min_p must be"),
        (["--max-tokens", "-1"], "max_tokens must be"),
        (["--seed", "-1"], "seed must be"),
        (["--stop", ""], "stop must be"),
        (["--method", "magic"], "method must be one of"),
        (["--repetition-penalty", "0"], "repetition_penalty must be"),
        (["--presence-penalty", "3"], "presence_penalty must be"),
        (["--frequency-penalty", "-2.5"], "frequency_penalty must be"),
        (["--logit-bias", "4"], "must look like ID=BIAS"),
        (["--logit-bias", "4=101"], "logit_bias must"),
        (["--bad-words", ""], "bad_words must be"),
        (["--allowed-token-ids", "1,x"], "--allowed-token-ids '1,x' must be token ids"),
        (["--stop-token-ids", ""], "--stop-token-ids '' must be token ids"),
        (["--n", "2"], "temperature above 0"),
        (["--min-tokens", "257"], "min_tokens must be"),
        (["--logprobs", "21"], "logprobs must be"),
    ],
)
def test_bad_sampling_parameters(options: list[str], message: str) -> None:
    assert message in complaint("generate", "x", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature must be"),
        (["--max-tokens", "-1"], "max_tokens must be"),
        (["--methods", "sd,magic"], "'magic' is unknown"),
        (["--prompts", "nowhere.jsonl"], "not found"),
        (["--prompts", "nowhere.jsonl", "--demo"], "not both"),
        (["--json", "nowhere/figures.json"], "does not exist"),
    ],
)
def test_bad_comparisons(options: list[str], message: str) -> None:
    assert message in complaint("compare", *options)


def test_empty_prompt(models: list[str]) -> None:
    assert "empty" in complaint("generate", "", *models)


@pytest.mark.parametrize("side", ["target", "draft"])
def test_missing_model(models: list[str], side: str) -> None:
    line = complaint("generate", "x", *models, "--set", f"{side}.model=/nowhere/model")
    assert "/nowhere/model" in line
    assert "local folder" in line


def test_info_shows_missing_models_rather_than_failing() -> None:
    result = CliRunner().invoke(make_app(), ["info", "--set", "draft.model=/nowhere/model"])
    assert result.exit_code == 0, result.output
    assert "/nowhere/model, float32 on cpu cores 1, missing on this machine" in result.stdout
    assert ssd.__version__ in result.stdout


def test_info_counts_parameters(tmp_path: Path) -> None:
    import numpy
    from safetensors.numpy import save_file

    (tmp_path / "config.json").write_text("{}")
    save_file(
        {"a": numpy.zeros((1000, 1000), numpy.float16), "b": numpy.zeros((500, 1000), numpy.float32)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    result = CliRunner().invoke(make_app(), ["info", "--set", f"target.model={tmp_path}"])
    assert "1.5 M parameters" in result.stdout


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["ssd", "ssd.cli.app", "ssd.config.load", "ssd.bench.measure.compare"])
def test_importing_is_cheap(module: str) -> None:
    heavy = "{'torch', 'transformers', 'ray', 'zmq', 'numpy'}"
    assert python(f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_every_public_name_but_the_engines_resolves() -> None:
    light = "[getattr(ssd, n) for n in ssd.__all__ if n not in ('LLM', 'AsyncEngine')]"
    code = f"import sys, ssd; {light}; print('torch' in sys.modules)"
    assert python(code) == "False"
    assert set(ssd.__all__) <= set(dir(ssd))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ssd.nothing


def test_interrupt_ends_cleanly(models: list[str]) -> None:
    """A real Ctrl-C while the engine streams: exit code 130, the engine closed, no traceback."""
    code = (
        f"MODELS = {models!r}"
        + """
import sys, time
class Slow:
    degraded = None
    def __init__(self, config): pass
    def __enter__(self): return self
    def __exit__(self, *_): print("closed", file=sys.stderr)
    def stream(self, prompt, params):
        print("started", flush=True)
        time.sleep(60)
        yield
from ssd.cli.app import make_app
from ssd.cli.options import Makers
make_app(Makers(llm=Slow))(["generate", "x", *MODELS])
"""
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines() == ["closed", "interrupted"]
