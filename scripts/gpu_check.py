"""Checks and measures everything on a GPU, in stages of less than ten minutes, without network.

python scripts/gpu_check.py --stage 1 --out $OUT                  correctness on CUDA
python scripts/gpu_check.py --stage forwards-8b --out $OUT        a stage by its name
python scripts/gpu_check.py --stage 6 --out $OUT --have results   the parts that failed or are missing in results
python scripts/gpu_check.py --stage all --tiny --out build/tiny   tests this script itself, on a CPU, in two minutes

Each stage writes ``stage-NAME.json`` after every part, then plots, and prints a short table last. The exit code is 1
if a part failed. Targets and drafts are the embedded pair, widened on the device.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.gpu import checks, engines, forwards, report
from scripts.gpu.bench import Bench, embedded_pair, failed

BUDGET_S = 480.0
STAGES: dict[str, Callable[[Bench], None]] = {
    "correctness": checks.run,
    "kernels": forwards.kernels,
    "forwards-1b": lambda bench: forwards.run(bench, "1b"),
    "forwards-8b": lambda bench: forwards.run(bench, "8b"),
    "engines-1b": lambda bench: engines.run(bench, "1b"),
    "engines-8b": lambda bench: engines.run(bench, "8b"),
    "batches-8b": lambda bench: engines.batches(bench, "8b"),
    "forwards-30b": lambda bench: forwards.run(bench, "30b"),
    "engines-30b": lambda bench: engines.run(bench, "30b"),
    "batches-1b": lambda bench: engines.batches(bench, "1b"),
}


def main(arguments: list[str] | None = None) -> int:
    stages = ", ".join(f"{n} {name}" for n, name in enumerate(STAGES, start=1))
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"stages: {stages}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", required=True, help="a number, a name, or all")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--have", type=Path, help="folder of earlier results; by default --out")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny models on the CPU: tests the script, its times mean nothing"
    )
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds after which no part begins")
    args = parser.parse_args(arguments)
    names = list(STAGES)
    if args.stage.isdigit() and 1 <= int(args.stage) <= len(names):
        chosen = [names[int(args.stage) - 1]]
    elif args.stage in ("all", *names):
        chosen = names if args.stage == "all" else [args.stage]
    else:
        parser.error(f"no stage {args.stage!r}; there are {stages}")
    device = torch.device("cpu" if args.tiny else args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this needs a CUDA device (or --tiny)")
    with tempfile.TemporaryDirectory(prefix="ssd-gpu-") as folder:
        pair = _tiny_pair(Path(folder)) if args.tiny else embedded_pair()
        bench = Bench(device=device, out=args.out, tiny=args.tiny, budget_s=args.budget_s, pair=pair)
        return max(_stage(bench, name, args.have or args.out) for name in chosen)


def _stage(bench: Bench, name: str, have: Path) -> int:
    bench.open(name, have)
    STAGES[name](bench)
    bench.write()
    record = json.loads((bench.out / f"stage-{name}.json").read_text())
    report.plot(record, bench.out)
    report.print_table(record, bench.skipped)
    return int(any(map(failed, record["parts"].values())))


def _tiny_pair(folder: Path) -> tuple[Path, Path]:
    """Saves two Llamas of 2 layers over one vocabulary; returns their folders."""
    from ssd.testing.models.tiny import save_tiny

    return save_tiny(folder / "target", "llama", seed=0), save_tiny(folder / "draft", "llama", seed=1)


if __name__ == "__main__":
    sys.exit(main())
