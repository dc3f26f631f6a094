"""Ship the trained pair: bfloat16 weights, tokenizer, measurements and a model card.

python scripts/export_pair.py --root build/pair --out ssd/data/embedded [--windows 160]

Where ``train_pair.py --from-shipped`` made the draft, the target is copied as it is, and what the
logs of earlier stages would say is taken from the shipped ``evaluation.json``. With ``--copying-only`` nothing is
exported: what the shipped draft does with the copy bias of configs/embedded.yaml is measured again.
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
from pair.recipe import POLISHING, SEQUENCE, TEACHING, Recipe

ROLES = ("target", "draft")
MAX_BYTES = 40_000_000  # both models together
SAMPLE_TOKENS = 96
SAMPLE_PROMPTS = (
    'import os\n\n\ndef read_text(path):\n    """Return the text of the file at path."""\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
)


def shipped_before(recipe: Recipe) -> dict | None:
    """The report of the pair that training started from; None where it started from nothing."""
    path = recipe.path("shipped.json")
    return json.loads(path.read_text()) if path.exists() else None


def export_role(recipe: Recipe, out: Path, role: str) -> None:
    """Write ``out/role``: what ``AutoModelForCausalLM`` and ``AutoTokenizer`` load."""
    folder = out / role
    shutil.rmtree(folder, ignore_errors=True)
    if role == "target" and shipped_before(recipe):
        shutil.copytree(recipe.path(role), folder, ignore=shutil.ignore_patterns("done"))
        return
    trained = recipe.polished("mean") if role == "draft" else recipe.path(role)
    model = LlamaForCausalLM.from_pretrained(trained, dtype=torch.bfloat16, use_safetensors=True)
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # written for the owner alone, but package data is everybody's
    for path in (recipe.root / "tokenizer").iterdir():
        shutil.copyfile(path, folder / path.name)
    # The folder's config.json makes AutoTokenizer look again at which class to use.
    learnt, shipped = AutoTokenizer.from_pretrained(recipe.root / "tokenizer"), AutoTokenizer.from_pretrained(folder)
    for text in (*SAMPLE_PROMPTS, "Naïve → 12345  tabs\there\r\n"):
        ids = learnt.encode(text, add_special_tokens=False)
        if shipped.encode(text) != ids or shipped.decode(ids) != text:
            sys.exit(f"error: the tokenizer in {folder} does not give the ids it was trained with")


def last(log: list[dict], key: str) -> float:
    """The newest value of ``key``, which not every record has."""
    return next((record[key] for record in reversed(log) if key in record), float("nan"))


def describe(recipe: Recipe, out: Path, role: str, model: LlamaForCausalLM, log: list[dict]) -> dict:
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
    """The draft's last stage."""
    lengths = [load_file(path)["lengths"] for path in sorted(recipe.polished("shards").glob("*.safetensors"))]
    return {
        "steps": log[-1]["step"],
        "steps_planned": POLISHING.steps,
        "kept": POLISHING.kept,
        "training_tokens": log[-1]["step"] * POLISHING.rows * SEQUENCE,
        "continuations": sum(len(rows) for rows in lengths),
        "positions": sum(int(rows.sum()) for rows in lengths),
    }


def draw_polish(log: list[dict], path: Path) -> None:
    """Loss of the draft's last stage and its acceptance rate on held-out text, over training steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    steps = [r["step"] for r in log]
    losses = [r["loss"] for r in log]
    left.plot(steps, losses, color="0.75", linewidth=0.8)
    mean = [sum(losses[max(0, i - 24) : i + 1]) / len(losses[max(0, i - 24) : i + 1]) for i in range(len(losses))]
    left.plot(steps, mean, color="tab:blue", label="mean of 25 steps")
    left.set(title="Draft, last stage", xlabel="step", ylabel="loss on the training batch")
    for kind, color in (("code", "tab:blue"), ("prose", "tab:orange")):
        for temperature, style in (("0", "-"), ("1", "--")):
            points = [(r["step"], r[key]) for r in log if (key := f"alpha_{kind}_{temperature}") in r]
            right.plot(*zip(*points, strict=True), style, color=color, marker=".", label=f"{kind}, T = {temperature}")
    right.set(title="Held-out text outside repetitions", xlabel="step", ylabel="α")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)


def draw(logs: dict[str, list[dict]], path: Path) -> None:
    """Loss of the target, and divergence and agreement of the draft, over training steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")

    def line(axis, role: str, key: str, label: str, **style) -> None:
        points = [(r["step"], r[key]) for r in logs[role] if key in r]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)

    def losses(axis, role: str, label: str) -> None:
        line(axis, role, "loss", label, color="0.75", linewidth=0.8)
        values = [r["loss"] for r in logs[role]]
        axis.set_ylim(0, 1.05 * sorted(values)[int(0.98 * (len(values) - 1))])  # the start is off the chart
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)

    losses(left, "target", "training batch")
    line(left, "target", "heldout_code", "held-out code", color="tab:blue", marker=".")
    line(left, "target", "heldout_prose", "held-out prose", color="tab:orange", marker=".")
    left.set(title="Target", ylabel="next-token loss (nats)")
    below = dict(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=1, fontsize="small")
    left.legend(**below)
    losses(right, "draft", "KL on the training batch")
    right.set(title="Draft", ylabel="KL(target ‖ draft) (nats)")
    shares = right.twinx()
    line(shares, "draft", "agree_code", "same argmax, held-out code", color="tab:blue", marker=".")
    line(shares, "draft", "agree_prose", "same argmax, held-out prose", color="tab:orange", marker=".")
    shares.set(ylim=(0, 1), ylabel="share of positions")
    shares.spines["top"].set_visible(False)
    handles = [*right.lines, *shares.lines]
    right.legend(handles, [h.get_label() for h in handles], **below)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def samples(target: LlamaForCausalLM, tokenizer) -> list[dict[str, str]]:
    """Greedy continuations, cut at the end of text."""
    out = []
    for prompt in SAMPLE_PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        written = continue_text(target, ids, 0.0, tokens=SAMPLE_TOKENS)
        kept = written[0][live_positions(written, target.config.eos_token_id)[0]]
        out.append({"prompt": prompt, "continuation": tokenizer.decode(kept, skip_special_tokens=True)})
    return out


def _alpha(value: float | None, error: float | None) -> str:
    return "–" if value is None else f"{value:.3f} ± {error:.3f}"


def card(report: dict, picture: str, polish_picture: str) -> str:
    """The model card, markdown."""
    target, draft, corpus = report["target"], report["draft"], report["corpus"]

    def shape(role: dict) -> str:
        return (
            f"{role['parameters']:,} | {role['layers']} × {role['hidden_size']} | {role['heads']} / "
            f"{role['kv_heads']} | {role['bytes'] / 1e6:.1f} MB | {role['steps']:,} | {role['training_tokens']:,}"
        )

    copying = [
        f"| {kind} | {row['temperature']:g} | {_alpha(row['alpha'], row['alpha_error'])} | "
        f"{_alpha(row['alpha_fresh'], row['alpha_fresh_error'])} | {alone['alpha_fresh']:.3f} |"
        for kind, results in report["copying"]["acceptance"].items()
        for row, alone in zip(results, report["acceptance"][kind], strict=True)
    ]
    rows = [
        f"| {kind} | {row['temperature']:g} | {_alpha(row['alpha'], row['alpha_error'])} | "
        f"{row['repeated_share']:.1%} | {_alpha(row['alpha_fresh'], row['alpha_fresh_error'])} | "
        f"{before['alpha_fresh']:.3f} | {row['positions']:,} / {row['fresh_positions']:,} |"
        for kind, results in report["acceptance"].items()
        for row, before in zip(results, report["acceptance_before"][kind], strict=True)
    ]
    polish = draft["polish"]
    data = [
        f"| {kind} | {split} | {part['documents']:,} | {part['characters']:,} | {part['tokens']:,} |"
        for kind, split, part in ((*name.split("-"), part) for name, part in corpus.items())
    ]
    written = "\n\n".join(
        f"Prompt:\n\n```python\n{s['prompt'].rstrip()}\n```\n\nContinuation:\n\n```python\n{s['continuation']}\n```"
        for s in report["samples"]
    )
    unfinished = (
        ""
        if report["finished"]
        else (
            "\n> **Unfinished:** exported before its training ended "
            f"(target {target['steps']}/{target['steps_planned']} steps, "
            f"last stage of the draft {draft['polish']['steps']}/{draft['polish']['steps_planned']}).\n"
        )
    )
    return f"""# The embedded pair
{unfinished}
Two small Llama-architecture language models with one tokenizer: `target/` writes Python source and
documentation prose; `draft/`, shallow and wide, guesses what the target will say. They make every command
of this project run, with real acceptance rates, on a machine without a GPU or a model hub. Written by
`scripts/train_pair.py` and `scripts/export_pair.py`; do not edit by hand.

| | parameters | layers × hidden | heads / kv heads | bfloat16 | steps | tokens trained on |
|---|---|---|---|---|---|---|
| target | {shape(target)} |
| draft | {shape(draft)} |

## Data

Source files of Python's standard library (code); docstrings of the standard library and of the packages this
project depends on, `pydoc` topics and package descriptions (prose). Held out **by file**: a file, with all
its docstrings, is held out when the hash of its path says so, about 3 % of them. The tokenizer is byte-level
BPE, 4,096 entries, trained on the training split.

| kind | split | documents | characters | tokens |
|---|---|---|---|---|
{chr(10).join(data)}

## Training

The target learns the next token. The draft is distilled: forward KL to the target's distribution at every
position, on training text and on text the target wrote itself. Held-out loss of the target:
{target["heldout_code"]:.3f} nats a token on code, {target["heldout_prose"]:.3f} on prose. The training KL of
this distillation ended at {draft["training_loss"]:.3f} nats.

![loss curves]({picture})

Its last stage (`scripts/pair/polish.py`) is about acceptance alone. The target continued
{polish["continuations"]:,} windows of training text, greedily or at temperature 1, each until it began to loop;
its {report["teaching"]["support"]} likeliest tokens were kept at {polish["positions"]:,} positions, prompts included.
The draft learnt for {polish["steps"]:,} steps from these: forward KL, with the cross-entropy to the target's argmax
where text is greedy and the total variation elsewhere. It came to know these continuations better than other
text, so what is shipped is the mean of the weights before ({polish["kept"]:.0%}) and after
({1 - polish["kept"]:.0%}). The curves are of the latter alone, α on {report["logged_windows"]} held-out windows a kind.

![last stage]({polish_picture})

## Acceptance rate

Share of positions at which the draft's token equals the target's, where the target itself wrote the text:
{report["windows"]} held-out windows of {report["prompt_tokens"]} tokens a kind, {report["new_tokens"]} tokens
continued after each (less where the text ended). Temperature 0: argmax; temperature 1: `argmax(log probs +
gumbel)` with the same noise on both sides (coupled verification), whole vocabulary. Text that loops is easy to
draft, so the share of {report["gram"]}-grams that occurred before in their continuation stands beside α, and so
does α where the text does not repeat, and that of the draft before its last stage. ± is one standard error over
windows. bfloat16 weights, computed in {report["computed_in"]}.

| held-out | temperature | α | repeated {report["gram"]}-grams | α outside them | before | positions (all / outside) |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

The pipeline's draft also has a copy bias (`speculation.copy_bias`, `ssd/decoding/copying.py`): what followed the
longest ending of the text that stood in it before gains up to {max(report["copying"]["gains"]):g} nats, here
{", ".join(f"{gain:g}" for gain in report["copying"]["gains"])} for endings of 1, 2, .. tokens, chosen on windows of
training text. So the pair is served; the same windows:

| held-out | temperature | α | α outside repeated {report["gram"]}-grams | the model alone |
|---|---|---|---|---|
{chr(10).join(copying)}

## What it writes

Greedy, up to {SAMPLE_TOKENS} tokens.

{written}

## Limits

A demonstration and measuring instrument, not an assistant: the text looks like Python and its documentation
but is seldom right, names come and go, and greedy text may loop. Context: 2,048 positions, of which training
saw {SEQUENCE}. It can reproduce passages of its training text.

## Licence

The weights are distributed under this project's licence (Apache-2.0). They were trained on the source of
Python's standard library (PSF License Agreement, © Python Software Foundation) and on the documentation of the
open-source packages named in `scripts/pair/corpus.py` and installed beside them, each under its own licence.

Measured with torch {report["versions"]["torch"]}, transformers {report["versions"]["transformers"]}, Python
{report["versions"]["python"]}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("build/pair"))
    parser.add_argument("--out", type=Path, default=Path("ssd/data/embedded"))
    parser.add_argument("--picture", type=Path, default=Path("docs/embedded_loss.png"))
    parser.add_argument("--polish-picture", type=Path, default=Path("docs/embedded_polish.png"))
    parser.add_argument("--windows", type=int, default=WINDOWS, help="held-out windows per kind of text")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute α in")
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
    # What is measured is what is shipped: the rounded weights.
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
        draw(logs, args.picture)
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
    """``evaluation.json`` and the card; α in the terminal."""
    (args.out / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    pictures = [Path(os.path.relpath(path, args.out)).as_posix() for path in (args.picture, args.polish_picture)]
    (args.out / "README.md").write_text(card(report, *pictures))
    for kind, results in report["copying"]["acceptance"].items():
        for row in results:
            alpha, fresh = (_alpha(row[key], row[f"{key}_error"]) for key in ("alpha", "alpha_fresh"))
            print(
                f"{kind:6} T={row['temperature']:g}  α {alpha}  repeated {row['repeated_share']:.1%}  α outside {fresh}"
            )


if __name__ == "__main__":
    main()
