"""Simon Willison's llm, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, QUESTION, V1, check, run

HOME = Path(tempfile.mkdtemp(prefix="llm-"))
(HOME / "extra-openai-models.yaml").write_text(
    f"""
- model_id: chat
  model_name: {MODEL}
  api_base: {V1}
  supports_tools: true
  supports_schema: true
- model_id: base
  model_name: {MODEL}
  api_base: {V1}
  completion: true
"""
)


def llm(*arguments: str) -> str:
    environment = {**os.environ, "LLM_USER_PATH": str(HOME), "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [sys.executable, "-m", "llm", *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.strip()[-500:]
    return done.stdout


LIMITS = ("-o", "temperature", "0", "-o", "max_tokens", "64")


@check
def prompt() -> None:
    assert "Paris" in llm("prompt", QUESTION, "-m", "chat", *LIMITS)


@check
def no_stream_and_system() -> None:
    assert llm("prompt", QUESTION, "-m", "chat", "--no-stream", "-s", "Be brief.", *LIMITS).strip()


@check
def conversation() -> None:
    assert llm("prompt", "Thank you.", "-c", "-m", "chat", *LIMITS).strip()


@check
def completion_model() -> None:
    assert "Paris" in llm("prompt", "The capital of France is", "-m", "base", *LIMITS[:2], "0", "-o", "max_tokens", "4")


@check
def schema() -> None:
    wanted = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    assert json.loads(llm("prompt", QUESTION, "-m", "chat", "--schema", json.dumps(wanted), *LIMITS))["city"]


@check
def tools() -> None:
    code = 'def get_weather(city: str) -> str:\n    "Tells the weather."\n    return "Sunny"\n'
    assert llm("prompt", QUESTION, "-m", "chat", "--functions", code, "--chain-limit", "3", *LIMITS) is not None


@check
def json_object() -> None:
    llm("prompt", QUESTION + " Answer in JSON.", "-m", "chat", "-o", "json_object", "1", *LIMITS)


run()
