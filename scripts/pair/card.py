"""The model card of the embedded pair, in Markdown."""

from __future__ import annotations

from .recipe import SEQUENCE

SAMPLE_TOKENS = 96
"""Tokens of the sample texts in the card."""


def alpha(value: float | None, error: float | None) -> str:
    """Formats an acceptance rate and its standard error."""
    return "–" if value is None else f"{value:.3f} ± {error:.3f}"


def card(report: dict, picture: str, polish_picture: str) -> str:
    """Returns the card of the pair.

    Args:
        report: as in ``evaluation.json``.
        picture: path of the picture of training, relative to the card.
        polish_picture: path of the picture of the draft's last stage, relative to the card.
    """
    target, draft, corpus = report["target"], report["draft"], report["corpus"]

    def shape(role: dict) -> str:
        return (
            f"{role['parameters']:,} | {role['layers']} × {role['hidden_size']} | {role['heads']} / "
            f"{role['kv_heads']} | {role['bytes'] / 1e6:.1f} MB | {role['steps']:,} | {role['training_tokens']:,}"
        )

    copying = [
        f"| {kind} | {row['temperature']:g} | {alpha(row['alpha'], row['alpha_error'])} | "
        f"{alpha(row['alpha_fresh'], row['alpha_fresh_error'])} | {alone['alpha_fresh']:.3f} |"
        for kind, results in report["copying"]["acceptance"].items()
        for row, alone in zip(results, report["acceptance"][kind], strict=True)
    ]
    rows = [
        f"| {kind} | {row['temperature']:g} | {alpha(row['alpha'], row['alpha_error'])} | "
        f"{row['repeated_share']:.1%} | {alpha(row['alpha_fresh'], row['alpha_fresh_error'])} | "
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

The pipeline's draft also has a copy bias (`speculation.copy_bias`, `ssd/decoding/text/copying.py`): what followed the
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
