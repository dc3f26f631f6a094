"""Pictures of the embedded pair's training, for its model card. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw_training(logs: dict[str, list[dict]], path: Path) -> None:
    """Draws the target's loss, and the draft's divergence and agreement, over training steps."""
    figure, left, right = _two_axes(height=4.6)

    def line(axis, role: str, key: str, label: str, **style) -> None:
        points = [(r["step"], r[key]) for r in logs[role] if key in r]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)

    def losses(axis, role: str, label: str) -> None:
        line(axis, role, "loss", label, color="0.75", linewidth=0.8)
        values = [r["loss"] for r in logs[role]]
        axis.set_ylim(0, 1.05 * sorted(values)[int(0.98 * (len(values) - 1))])  # the first steps are off the chart
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


def draw_polish(log: list[dict], path: Path) -> None:
    """Draws the loss of the draft's last stage, and its acceptance rate on held-out text, over training steps."""
    figure, left, right = _two_axes(height=3.8)
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


def _two_axes(height: float) -> tuple[Any, Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    return figure, *figure.subplots(1, 2)
