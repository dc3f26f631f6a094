"""A certificate, for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..exactness.certify import Certificate, Divergence
from .tables import make_table, number

COUNTS = ("T", "outputs", "tokens", "equal", "near ties", "structural", "acceptance", "hits", "log-prob. difference")


def certificate_table(certificate: Certificate) -> Table:
    """Returns a table with a row for each method and temperature."""
    config = certificate.config
    title = (
        f"compared with plain decoding: numerics {config.numerics}, verify {config.speculation.verify}, "
        f"lookahead {config.speculation.lookahead}, {config.speculation.tree}, batch {config.engine.max_batch}"
    )
    table = make_table(title, ["method"], COUNTS)
    for group in certificate.groups:
        table.add_row(
            group.method,
            f"{group.temperature:g}",
            str(group.outputs),
            str(group.tokens),
            str(group.equal),
            str(group.near_ties),
            str(group.structural),
            number(group.record.acceptance_rate, 2),
            number(group.record.hit_rate, 2),
            f"{group.largest_difference:.1e}",
        )
    return table


def print_certificate(certificate: Certificate, console: Console) -> None:
    """Prints the table, the first divergence (a structural one if there is any), and the verdict."""
    console.print(certificate_table(certificate))
    if certificate.divergences:
        first = min(certificate.divergences, key=lambda one: one.kind != "structural")
        for line in _lines(first):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if certificate.passed:
        console.print("certified: yes", highlight=False)
    else:
        console.print(f"certified: no: {'; '.join(certificate.faults)}", markup=False, highlight=False, soft_wrap=True)


def _lines(one: Divergence) -> list[str]:
    what = one.kind.replace("_", " ")
    lines = [
        f"first {what}: {one.method} at temperature {one.temperature:g}, prompt {one.trial}, seed {one.seed}, "
        f"generated token {one.position}",
        f"  after     {one.context!r}",
    ]
    for place, name in enumerate(("none", one.method)):
        token = one.tokens[place]
        text = "ended" if token is None else f"token {token} {one.texts[place]!r}"
        score = "" if one.scores is None else f", score {one.scores[place]:.6g}"
        lines.append(f"  {name:<9} {text}{score}")
    if one.gap is not None and one.band is not None:
        lines.append(f"  gap {one.gap:.3g} by teacher forcing; numerical band {one.band:.3g}")
    return lines
