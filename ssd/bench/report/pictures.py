"""Pictures of measurements, as PNG bytes. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UsageError
from ...pipeline.transport.messages import RoundReport

COLOURS = {"none": "#8a8f98", "none_fast": "#555b66", "sd": "#d08a2e", "ssd": "#2f7d4f"}
HIT, MISS, PLAIN, BUBBLE = "#2f7d4f", "#c0504d", "#8a8f98", "#e9e4da"


def lines(curves: Mapping[str, Mapping[Any, float]], across: str, up: str) -> bytes:
    """Draws a curve for each name, from x to y. A word in place of x (``auto``) becomes a horizontal line."""
    figure, axes = _figure()
    for name, points in curves.items():
        at = sorted(x for x in points if not isinstance(x, str))
        (line,) = axes.plot(at, [points[x] for x in at], marker="o", label=name, color=COLOURS.get(name))
        for word in (x for x in points if isinstance(x, str)):
            axes.axhline(points[word], linestyle="--", color=line.get_color(), label=f"{name}, {word}")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_ylim(bottom=0)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return _png(figure)


def bars(names: Sequence[str], values: Mapping[str, Sequence[float]], along: str) -> bytes:
    """Draws groups of horizontal bars, a group for each name."""
    figure, axes = _figure(height=max(2.5, 0.3 * len(names) + 1))
    width = 0.8 / len(values)
    for index, (label, numbers) in enumerate(values.items()):
        axes.barh([i + index * width for i in range(len(names))], numbers, width, label=label)
    axes.set_yticks([i + 0.4 - width / 2 for i in range(len(names))], names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(along)
    if len(values) > 1:
        axes.legend(frameon=False)
    return _png(figure)


def timeline(rounds: Sequence[RoundReport], title: str) -> bytes:
    """Draws what verifier and draft do over time; colours tell hits from misses, waiting is pale."""
    figure, axes = _figure(width=11, height=2.6)
    start = rounds[0].began_s if rounds else 0.0
    for lane, began_s, seconds, kind in spans(rounds):
        colour = {"hit": HIT, "miss": MISS, "plain": PLAIN, "wait": BUBBLE, "tree": HIT, "jit": MISS}[kind]
        y = 1 if lane == "verifier" else 0
        axes.broken_barh(
            [((began_s - start) * 1e3, seconds * 1e3)],
            (y + 0.1, 0.8),
            facecolors=colour,
            edgecolor="white",
            linewidth=0.5,
        )
    axes.set_yticks([0.5, 1.5], ["draft", "verifier"])
    axes.set_xlabel("ms")
    axes.set_title(title, loc="left", fontsize=10)
    handles = [(HIT, "tree was prepared (hit)"), (MISS, "drafted after a miss"), (PLAIN, "plain"), (BUBBLE, "waiting")]
    from matplotlib.patches import Patch

    axes.legend(
        handles=[Patch(color=colour, label=label) for colour, label in handles],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.28),
        ncol=4,
        frameon=False,
        fontsize=8,
    )
    return _png(figure)


def kind_after(one: RoundReport) -> str:
    """Returns where the next round's tree comes from: ``hit``, ``miss`` or ``plain``."""
    return "plain" if one.draft_s is None else "miss" if one.jit_s else "hit" if one.hits else "plain"


def spans(rounds: Sequence[RoundReport], first: str = "plain") -> list[tuple[str, float, float, str]]:
    """Returns (lane, began_s, seconds, kind) for everything in the rounds, on the verifier's clock.

    Kinds on the verifier's lane: ``hit``, ``miss`` or ``plain`` (where its tree came from) and ``wait``; on the
    draft's: ``tree``, ``jit`` and ``wait``. Draft and verifier begin a round together, so the draft's tree begins
    where the verification began.

    Args:
        first: where the first round's tree came from.
    """
    found: list[tuple[str, float, float, str]] = []
    kind = first
    for one in rounds:
        found.append(("verifier", one.began_s, one.forward_s, kind))
        end = one.began_s + one.round_s
        if one.draft_s is not None:
            if one.forward_s < one.draft_s:
                found.append(("verifier", one.began_s + one.forward_s, one.draft_s - one.forward_s, "wait"))
            found.append(("draft", one.began_s, one.draft_s, "tree"))
            if one.draft_s < one.forward_s:
                found.append(("draft", one.began_s + one.draft_s, one.forward_s - one.draft_s, "wait"))
        if one.jit_s:
            found.append(("verifier", end - one.jit_s, one.jit_s, "wait"))
            found.append(("draft", end - one.jit_s, one.jit_s, "jit"))
        kind = kind_after(one)
    return found


def _figure(width: float = 6.4, height: float = 3.6) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("pictures need matplotlib; pip install 'ssd-engine[report]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
