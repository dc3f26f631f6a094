"""Trains the embedded pair on text from this machine; a run that was stopped continues. See ``scripts/pair/``.

python scripts/train_pair.py --root build/pair [--device cuda] [--threads 2]

With ``--from-shipped`` the shipped pair replaces all generations, and only the draft's last stage is trained, on text
that the shipped target writes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pair import data, polish, teacher, train
from pair.recipe import GENERATIONS, TEACHING, Recipe

STAGES = ("data", "target", "samples", "draft", "teach", "polish")
SHIPPED = Path(__file__).resolve().parents[1] / "ssd/data/embedded"


def start_from(shipped: Path, recipe: Recipe) -> None:
    """Copies the shipped pair to the place of the last generation; existing files are kept."""
    for role in ("target", "draft"):
        folder = recipe.path(role)
        if not (folder / "done").exists():
            shutil.copytree(shipped / role, folder, dirs_exist_ok=True)
            (folder / "done").touch()
    if not recipe.path("shipped.json").exists():
        shutil.copyfile(shipped / "evaluation.json", recipe.path("shipped.json"))
    tokenizer = recipe.root / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    for path in (shipped / "target").glob("tokenizer*"):
        shutil.copyfile(path, tokenizer / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("build/pair"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--micro-rows", type=int, default=4, help="sequences of one backward pass")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--from-shipped",
        type=Path,
        nargs="?",
        const=SHIPPED,
        metavar="FOLDER",
        help="polish the draft of this pair (default: the shipped one) instead of training from random weights",
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    last = Recipe(root=args.root)
    if args.from_shipped:
        start_from(args.from_shipped, last)
    if "data" in args.stages:
        data.prepare(args.root)
    for generation in () if args.from_shipped else GENERATIONS:
        recipe = Recipe(root=args.root, generation=generation)
        if "target" in args.stages:
            train.train_target(recipe, args.device, args.micro_rows)
        if "samples" in args.stages:
            train.write_samples(recipe, args.device)
        if "draft" in args.stages:
            train.distill_draft(recipe, args.device, args.micro_rows)
    if "teach" in args.stages:
        target = LlamaForCausalLM.from_pretrained(last.path("target"), dtype=torch.float32).eval()
        teacher.teach(args.root, last.polished("shards"), target, TEACHING)
    if "polish" in args.stages:
        polish.polish_draft(last, args.device, args.micro_rows)


if __name__ == "__main__":
    main()
