"""guidellm: a short run against completions and one against chat, every request successful."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import FOLDER, MODEL, URL, check, run

COUNT = 4


def load(request: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            str(Path(sys.executable).parent / "guidellm"),
            "run",
            "--disable-console-interactive",
            *("--backend", f"kind=openai_http,target={URL},model={MODEL},request_format={request}"),
            *("--profile", "kind=concurrent,streams=2"),
            *("--constraint", f"kind=max_requests,count={COUNT}"),
            *("--tokenizer", f"kind=huggingface_auto,model={FOLDER}"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
            *("--output", f"kind=json,path={report}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, (done.stderr or done.stdout)[-1500:]
        [benchmark] = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (COUNT, 0), totals


@check
def completions() -> None:
    load("/v1/completions")


@check
def chat() -> None:
    load("/v1/chat/completions")


run()
