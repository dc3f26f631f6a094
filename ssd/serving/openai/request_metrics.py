"""``metrics`` of an answer: times and acceptance of its request, with vLLM's field names, and our own beside them.

The names are those of vLLM's docs/features/per_request_metrics.md and
docs/features/speculative_decoding/acceptance_metrics.md.
"""

from __future__ import annotations

from typing import Any, Literal

from ...engine.request import Request, Steps
from ...request.output import RequestOutput

Level = Literal["none", "summary", "detailed"]


def request_metrics(request: Request, output: RequestOutput, *, lookahead: int, level: Level) -> dict[str, Any] | None:
    """Returns the metrics of a finished request, or None with the level ``none``.

    Args:
        lookahead: K.
        level: ``detailed`` adds lists with one entry for each round that verified draft tokens.
    """
    if level == "none":
        return None
    record, steps = output.speculation, request.steps
    detailed = level == "detailed"
    return {
        **timing(request),
        "speculative_decoding": acceptance(steps, lookahead, detailed=detailed),
        "ssd": {
            "rounds": record.rounds,
            "lookups": record.lookups,
            "hits": record.hits,
            "hit_rate": record.hit_rate,
            "decode_s": output.decode_s,
            "seed": request.params.seed,
            **({"per_step_ms": _since_first(steps)} if detailed else {}),
        },
    }


def timing(request: Request) -> dict[str, float | None]:
    """Returns times of a request, in milliseconds. Each is None if the request did not come so far."""
    sent_s, first_s, last_s, tokens = request.sent_s, request.first_s, request.last_s, len(request.token_ids)

    def ms(begin_s: float | None, end_s: float | None) -> float | None:
        return None if begin_s is None or end_s is None else 1e3 * (end_s - begin_s)

    decode_ms, whole_ms = ms(first_s, last_s), ms(sent_s, last_s)
    return {
        "time_to_first_token_ms": ms(sent_s, first_s),
        "generation_time_ms": decode_ms,
        "queue_time_ms": ms(request.added_s, sent_s),
        "mean_itl_ms": decode_ms / (tokens - 1) if decode_ms is not None and tokens > 1 else None,
        "tokens_per_second": 1e3 * tokens / whole_ms if whole_ms else None,
    }


def acceptance(steps: Steps, lookahead: int, *, detailed: bool = False) -> dict[str, Any]:
    """Returns ``metrics.speculative_decoding``.

    Args:
        lookahead: K.
    """
    histogram = [0] * (max([lookahead, *steps.by_draft_length]) + 1)
    for counts in steps.by_draft_length.values():
        for accepted, count in enumerate(counts):
            histogram[accepted] += count
    number, accepted, drafted = len(steps.accepted), sum(steps.accepted), sum(steps.drafted)
    return {
        "mean_acceptance_length": 1 + accepted / number if number else None,
        "draft_acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_histogram": histogram,
        "acceptance_histogram_by_draft_length": {str(k): counts for k, counts in sorted(steps.by_draft_length.items())},
        "num_spec_steps": number,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": lookahead,
        **({"per_step_accepted": steps.accepted, "per_step_drafted": steps.drafted} if detailed else {}),
    }


def _since_first(steps: Steps) -> list[float]:
    """Returns when each step was committed, in milliseconds since the first."""
    return [round(1e3 * (at_s - steps.committed_s[0]), 3) for at_s in steps.committed_s]
