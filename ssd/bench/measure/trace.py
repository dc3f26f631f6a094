"""Rounds as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing: Chrome's JSON event format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...pipeline.transport.messages import RoundReport
from ..report.pictures import kind_after, spans

LANES = {"verifier": 1, "draft": 2}
NAMES = {
    "hit": "verify (hit)",
    "miss": "verify (after a miss)",
    "plain": "verify",
    "tree": "speculate",
    "jit": "draft now",
}


def chrome_trace(rounds: Mapping[str, Sequence[RoundReport]]) -> dict[str, Any]:
    """Returns a trace with a process for each method, and in it a thread each for verifier and draft.

    Times are in µs since the method's first round; waiting is a gap.
    """
    events: list[dict[str, Any]] = []
    for process, (name, reports) in enumerate(rounds.items(), start=1):
        events.append({"ph": "M", "pid": process, "tid": 0, "name": "process_name", "args": {"name": name}})
        for lane, thread in LANES.items():
            events.append({"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": {"name": lane}})
        start = reports[0].began_s if reports else 0.0
        before = "plain"
        for number, one in enumerate(reports):
            for lane, began_s, seconds, kind in spans([one], before):
                if kind == "wait":
                    continue
                events.append(
                    {
                        "ph": "X",
                        "pid": process,
                        "tid": LANES[lane],
                        "name": NAMES[kind],
                        "cat": kind,
                        "ts": (began_s - start) * 1e6,
                        "dur": seconds * 1e6,
                        "args": {"round": number, "tokens": one.tokens, "rows": one.rows, "hits": one.hits}
                        | {"lookups": one.lookups},
                    }
                )
            before = kind_after(one)
    return {"traceEvents": events, "displayTimeUnit": "ms"}
