"""Exports the trained pair: bfloat16 weights, tokenizer, measurements and a model card.

python scripts/export_pair.py --root build/pair --out ssd/data/embedded [--windows 160]

If ``train_pair.py --from-shipped`` trained the draft, the target is copied unchanged, and the figures of earlier stages
come from the shipped ``evaluation.json``. With ``--copying-only`` nothing is exported: only the effect of the copy bias
of configs/embedded.yaml on the shipped draft is measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from ssd.config.load import load_config

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pair.card import SAMPLE_TOKENS, alpha, card
from pair.data import KINDS
from pair.evaluate import (
    GRAM,
    LOGGED_WINDOWS,
    NEW,
    PROMPT,
    WINDOWS,
    continue_text,
    evaluate,
    heldout_text,
    live_positions,
    ticks,
)
from pair.pictures import draw_polish, draw_training
from pair.recipe import POLISHING, SEQUENCE, TEACHING, Recipe

ROLES = ("target", "draft")
MAX_BYTES = 40_000_000  # both models together
SAMPLE_PROMPTS = (
    'import os\n\n\ndef read_text(path):\n    """Return the text of the file at path."""\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
)


def shipped_before(recipe: Recipe) -> dict | None:
    """Returns the report of the pair that training started from; None if it started from random weights."""
    path = recipe.path("shipped.json")
    return json.loads(path.read_text()) if path.exists() else None


def export_role(recipe: Recipe, out: Path, role: str) -> None:
    """Writes ``out/role`` so that ``AutoModelForCausalLM`` and ``AutoTokenizer`` can load it."""
    folder = out / role
    shutil.rmtree(folder, ignore_errors=True)
    if role == "target" and shipped_before(recipe):
        shutil.copytree(recipe.path(role), folder, ignore=shutil.ignore_patterns("done"))
        return
    trained = recipe.polished("mean") if role == "draft" else recipe.path(role)
    model = LlamaForCausalLM.from_pretrained(trained, dtype=torch.bfloat16, use_safetensors=True)
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes files private, but package data must be readable
    for path in (recipe.root / "tokenizer").iterdir():
        shutil.copyfile(path, folder / path.name)
    # With the folder's config.json AutoTokenizer may choose another class.
    learnt, shipped = AutoTokenizer.from_pretrained(recipe.root / "tokenizer"), AutoTokenizer.from_pretrained(folder)
    for text in (*SAMPLE_PROMPTS, "Naïve → 12345  tabs\there\r\n"):
        ids = learnt.encode(text, add_special_tokens=False)
        if shipped.encode(text) != ids or shipped.decode(ids) != text:
            sys.exit(f"error: the tokenizer in {folder} does not give the ids it was trained with")


def last(log: list[dict], key: str) -> float:
    """Returns the newest value of ``key``; not every record has one."""
    return next((record[key] for record in reversed(log) if key in record), float("nan"))


def describe(recipe: Recipe, out: Path, role: str, model: LlamaForCausalLM, log: list[dict]) -> dict:
    """Returns sizes, training and measurements of a model, for the report."""
    stage = getattr(recipe.generation, role)
    size = model.config
    steps = log[-1]["step"]
    measures = {"target": ("heldout",), "draft": ("agree", "overlap")}[role]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(path.stat().st_size for path in (out / role).glob("*.safetensors")),
        "layers": size.num_hidden_layers,
        "hidden_size": size.hidden_size,
        "heads": size.num_attention_heads,
        "kv_heads": size.num_key_value_heads,
        "steps": stage.first_step + steps,
        "steps_planned": stage.first_step + stage.steps,
        "training_tokens": (stage.first_step + steps) * stage.rows * SEQUENCE,
        "training_loss": sum(r["loss"] for r in log[-20:]) / len(log[-20:]),
        **{f"{measure}_{kind}": last(log, f"{measure}_{kind}") for measure in measures for kind in KINDS},
    }


def polished(recipe: Recipe, log: list[dict]) -> dict:
    """Returns the figures of the draft's last stage, for the report."""
    lengths = [load_file(path)["lengths"] for path in sorted(recipe.polished("shards").glob("*.safetensors"))]
    return {
        "steps": log[-1]["step"],
        "steps_planned": POLISHING.steps,
        "kept": POLISHING.kept,
        "training_tokens": log[-1]["step"] * POLISHING.rows * SEQUENCE,
        "continuations": sum(len(rows) for rows in lengths),
        "positions": sum(int(rows.sum()) for rows in lengths),
    }


def samples(target: LlamaForCausalLM, tokenizer) -> list[dict[str, str]]:
    """Returns greedy continuations of the sample prompts, cut at the end of text."""
    out = []
    for prompt in SAMPLE_PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        written = continue_text(target, ids, 0.0, tokens=SAMPLE_TOKENS)
        kept = written[0][live_positions(written, target.config.eos_token_id)[0]]
        out.append({"prompt": prompt, "continuation": tokenizer.decode(kept, skip_special_tokens=True)})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("build/pair"))
    parser.add_argument("--out", type=Path, default=Path("ssd/data/embedded"))
    parser.add_argument("--picture", type=Path, default=Path("docs/embedded_loss.png"))
    parser.add_argument("--polish-picture", type=Path, default=Path("docs/embedded_polish.png"))
    parser.add_argument("--windows", type=int, default=WINDOWS, help="held-out windows per kind of text")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype in which α is computed"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--unfinished", action="store_true", help="export although training has not ended")
    parser.add_argument("--copying-only", action="store_true", help="measure the copy bias again, and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe, gains = Recipe(root=args.root), load_config("embedded").speculation.copy_bias
    if args.copying_only:
        report = json.loads((args.out / "evaluation.json").read_text())
        target, draft = (LlamaForCausalLM.from_pretrained(args.out / role, dtype=torch.float32) for role in ROLES)
        text = heldout_text(args.root, target.eval(), windows=report["windows"])
        report["copying"] = {"gains": gains, "acceptance": evaluate(args.root, draft.eval(), text, gains)}
        write(report, args)
        return
    before = shipped_before(recipe)
    finished = all((path / "done").exists() for path in (*map(recipe.path, ROLES), recipe.polished("draft")))
    if not finished and not args.unfinished:
        sys.exit(f"error: training in {args.root} has not ended; wait, or add --unfinished")
    for role in ROLES:
        export_role(recipe, args.out, role)
    shipped = sum(path.stat().st_size for path in args.out.rglob("*.safetensors"))
    if shipped > MAX_BYTES:
        sys.exit(f"error: the weights take {shipped / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f} MB")
    # The rounded weights are shipped, so they are measured.
    models = {
        role: LlamaForCausalLM.from_pretrained(args.out / role, dtype=getattr(torch, args.dtype)).eval()
        for role in ROLES
    }
    polish_log = json.loads((recipe.polished("draft") / "log.json").read_text())
    draw_polish(polish_log, args.polish_picture)
    if before:
        described = {role: before[role] for role in ROLES}
    else:
        logs = {role: json.loads((recipe.path(role) / "log.json").read_text()) for role in ROLES}
        draw_training(logs, args.picture)
        described = {role: describe(recipe, args.out, role, models[role], logs[role]) for role in ROLES}
    polish = polished(recipe, polish_log)
    for key in ("steps", "training_tokens"):
        described["draft"][key] += polish[key]
    described["draft"]["polish"] = polish
    unpolished = LlamaForCausalLM.from_pretrained(recipe.path("draft"), dtype=getattr(torch, args.dtype)).eval()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("held-out text", total=ticks(args.windows))
        text = heldout_text(args.root, models["target"], windows=args.windows, tick=lambda: progress.advance(bar))
    acceptance, acceptance_before = (evaluate(args.root, draft, text) for draft in (models["draft"], unpolished))
    report = {
        "finished": finished,
        **described,
        "corpus": json.loads((args.root / "corpus.json").read_text()),
        "windows": args.windows,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "gram": GRAM,
        "computed_in": args.dtype,
        "acceptance": acceptance,
        "acceptance_before": acceptance_before,
        "copying": {"gains": gains, "acceptance": evaluate(args.root, models["draft"], text, gains)},
        "teaching": asdict(TEACHING),
        "logged_windows": LOGGED_WINDOWS,
        "samples": samples(models["target"], AutoTokenizer.from_pretrained(args.out / "target")),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    write(report, args)
    print(f"wrote {args.out} ({shipped / 1e6:.1f} MB of weights) and {args.polish_picture}")


def write(report: dict, args: argparse.Namespace) -> None:
    """Writes ``evaluation.json`` and the card; prints α."""
    (args.out / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    pictures = [Path(os.path.relpath(path, args.out)).as_posix() for path in (args.picture, args.polish_picture)]
    (args.out / "README.md").write_text(card(report, *pictures))
    for kind, results in report["copying"]["acceptance"].items():
        for row in results:
            share, fresh = (alpha(row[key], row[f"{key}_error"]) for key in ("alpha", "alpha_fresh"))
            print(
                f"{kind:6} T={row['temperature']:g}  α {share}  repeated {row['repeated_share']:.1%}  α outside {fresh}"
            )


if __name__ == "__main__":
    main()
