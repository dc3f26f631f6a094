"""Train the embedded pair from the text on this machine. Resumable; see ``scripts/pair/``.

python scripts/train_pair.py --root build/pair [--device cuda] [--threads 2]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pair import data, train
from pair.recipe import GENERATIONS, Recipe

STAGES = ("data", "target", "samples", "draft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("build/pair"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--micro-rows", type=int, default=4, help="sequences of one backward pass")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if "data" in args.stages:
        data.prepare(args.root)
    for generation in GENERATIONS:
        recipe = Recipe(root=args.root, generation=generation)
        if "target" in args.stages:
            train.train_target(recipe, args.device, args.micro_rows)
        if "samples" in args.stages:
            train.write_samples(recipe, args.device)
        if "draft" in args.stages:
            train.distill_draft(recipe, args.device, args.micro_rows)


if __name__ == "__main__":
    main()
