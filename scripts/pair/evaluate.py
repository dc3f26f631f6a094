"""Acceptance rate of the draft, measured with plain ``transformers``.

The target continues held-out text; at each position the draft's own token is compared with the target's. The share of
equal tokens is the acceptance rate α of coupled verification: at temperature 0 both take their argmax, at temperature 1
``argmax(log probs + gumbel)`` with the same noise. The noise comes from torch instead of the pipeline's counter-based
generator; the distribution is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from ssd.decoding.text.copying import CopyBias
from ssd.decoding.trees.shape import TreeShape

from .data import KINDS, heldout_windows
from .recipe import SEED

WINDOWS = 160  # held-out windows a kind: the standard error of α on code is then about .011
LOGGED_WINDOWS = 80  # while training
PROMPT = 64  # tokens of held-out text before each continuation
NEW = 128  # tokens the target then writes
GRAM = 8
TEMPERATURES = (0.0, 1.0)
BATCH = 64  # windows decoded together


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """α over the continuations of one kind of text at one temperature.

    ``alpha_error`` and ``alpha_fresh_error`` are standard errors over windows; ``fresh`` is
    what lies outside every repeated 8-gram. An α without positions is None.
    """

    temperature: float
    windows: int
    positions: int
    alpha: float
    alpha_error: float
    repeated_share: float  # 8-grams that occurred before in their continuation / all 8-grams
    fresh_positions: int
    alpha_fresh: float | None
    alpha_fresh_error: float | None


def gumbel(step: int, batch: int, rows: int, vocabulary: int) -> torch.Tensor:
    """Returns the noise ``[rows, V]`` of the ``step``-th new token of a batch; the same in every call."""
    generator = torch.Generator().manual_seed(SEED + step + 100_000 * batch)
    return -torch.empty(rows, vocabulary).exponential_(generator=generator).log()


def choose(logits: torch.Tensor, temperature: float, step: int, batch: int = 0) -> torch.Tensor:
    """Chooses tokens ``[rows]`` from logits ``[rows, V]``."""
    scores = logits.float()
    if temperature > 0:
        scores = (scores / temperature).log_softmax(-1) + gumbel(step, batch, *scores.shape)
    return scores.argmax(-1)


@torch.no_grad()
def continue_text(
    target: LlamaForCausalLM,
    prompts: torch.Tensor,
    temperature: float,
    *,
    tokens: int,
    batch: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Returns the continuation of ``prompts [rows, length]``: ids ``[rows, tokens]``."""
    out: list[torch.Tensor] = []
    step_input, cache = prompts, None
    for step in range(tokens):
        result = target(step_input, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = result.past_key_values
        out.append(choose(result.logits[:, -1], temperature, step, batch))
        step_input = out[-1].unsqueeze(1)
        tick()
    return torch.stack(out, dim=1)


@torch.no_grad()
def draft_tokens(
    draft: LlamaForCausalLM,
    prompts: torch.Tensor,
    written: torch.Tensor,
    temperature: float,
    *,
    batch: int = 0,
    gains: Sequence[float] = (),
) -> torch.Tensor:
    """Returns the draft's choice at every position of ``written [rows, tokens]``, given all tokens before it.

    Args:
        gains: of the copy bias, in nats.
    """
    ids = torch.cat([prompts, written], dim=1)[:, :-1]
    tokens = written.shape[1]
    logits = with_gains(draft(ids, use_cache=False, logits_to_keep=tokens).logits, ids, gains)
    return torch.stack([choose(logits[:, step], temperature, step, batch) for step in range(tokens)], dim=1)


def with_gains(logits: torch.Tensor, ids: torch.Tensor, gains: Sequence[float]) -> torch.Tensor:
    """Returns logits ``[rows, tokens, V]`` of the last positions of ``ids [rows, length]``, as in the pipeline."""
    (rows, length), tokens = ids.shape, logits.shape[1]
    bias = CopyBias(gains, TreeShape.comb(1), batch=rows, capacity=length)
    for slot, row in enumerate(ids.tolist()):
        bias.write(slot, 0, row)
    steps = []
    for step in range(tokens):
        root = length - tokens + step
        source, row = bias.source(torch.full((rows,), root)), logits[:, step : step + 1]
        steps.append(row if source is None else source.biased(row, source.endings(ids[:, root : root + 1])))
    return torch.cat(steps, dim=1)


def live_positions(written: torch.Tensor, end: int) -> torch.Tensor:
    """Returns ``[rows, tokens]``: True up to and including the first ``end`` token."""
    ends = (written == end).long()
    return ends.cumsum(-1) - ends == 0


def repeated_grams(row: list[int]) -> tuple[int, int, list[bool]]:
    """Returns the number of 8-grams that occurred before in ``row``, the number of all, and which positions are in a
    repeated one."""
    seen: set[tuple[int, ...]] = set()
    repeated, inside = 0, [False] * len(row)
    total = max(0, len(row) - GRAM + 1)
    for start in range(total):
        gram = tuple(row[start : start + GRAM])
        if gram in seen:
            repeated += 1
            inside[start : start + GRAM] = [True] * GRAM
        seen.add(gram)
    return repeated, total, inside


def rate(hits: torch.Tensor, counted: torch.Tensor) -> tuple[float | None, float | None]:
    """Returns Σhits / Σcounted over ``[rows, tokens]``, and its standard error with independent windows."""
    count = counted.sum(-1).double()
    hit = (hits & counted).sum(-1).double()
    if count.sum() == 0:
        return None, None
    alpha = (hit.sum() / count.sum()).item()
    return alpha, (hit - alpha * count).square().sum().sqrt().item() / count.sum().item()


def agreement(
    draft: LlamaForCausalLM,
    prompts: torch.Tensor,
    ids: torch.Tensor,
    temperature: float,
    gains: Sequence[float] = (),
) -> Agreement:
    """Measures the target's continuations ``ids [rows, tokens]`` of ``prompts [rows, length]``."""
    drafted = [
        draft_tokens(draft, part, written, temperature, batch=batch, gains=gains)
        for batch, (part, written) in enumerate(zip(prompts.split(BATCH), ids.split(BATCH), strict=True))
    ]
    live = live_positions(ids, draft.config.eos_token_id)
    fresh, repeated, grams = live.clone(), 0, 0
    for index, row in enumerate(ids):
        alive = int(live[index].sum())
        again, total, inside = repeated_grams(row[:alive].tolist())
        repeated, grams = repeated + again, grams + total
        fresh[index, :alive] &= ~torch.tensor(inside, dtype=torch.bool)
    hits = torch.cat(drafted) == ids
    alpha, error = rate(hits, live)
    alpha_fresh, fresh_error = rate(hits, fresh)
    assert alpha is not None and error is not None
    return Agreement(
        temperature=temperature,
        windows=len(prompts),
        positions=int(live.sum()),
        alpha=alpha,
        alpha_error=error,
        repeated_share=repeated / grams if grams else math.nan,
        fresh_positions=int(fresh.sum()),
        alpha_fresh=alpha_fresh,
        alpha_fresh_error=fresh_error,
    )


def heldout_text(
    root: Path, target: LlamaForCausalLM, *, windows: int, tick: Callable[[], None] = lambda: None
) -> dict[str, torch.Tensor]:
    """Returns the target's continuations of the held-out windows: ids ``[windows, NEW]`` by kind and temperature.

    They depend on the target alone, so they are kept in ``root``, each as soon as it is complete. ``tick`` is called
    after every decoding step.
    """
    path = root / f"heldout-{windows}.safetensors"
    out = load_file(path) if path.exists() else {}
    for kind in KINDS:
        prompts = heldout_windows(root, kind, count=windows, length=PROMPT)
        for temperature in TEMPERATURES:
            if (name := text_name(kind, temperature)) not in out:
                written = [
                    continue_text(target, part, temperature, tokens=NEW, batch=batch, tick=tick)
                    for batch, part in enumerate(prompts.split(BATCH))
                ]
                out[name] = torch.cat(written)
                save_file(out, path)
    return out


def text_name(kind: str, temperature: float) -> str:
    return f"{kind}-{temperature:g}"


def evaluate(
    root: Path, draft: LlamaForCausalLM, text: dict[str, torch.Tensor], gains: Sequence[float] = ()
) -> dict[str, list[dict]]:
    """Returns ``{"code": [...], "prose": [...]}`` with an :class:`Agreement`, as a dict, for each temperature."""
    out: dict[str, list[dict]] = {}
    for kind in KINDS:
        out[kind] = []
        for temperature in TEMPERATURES:
            ids = text[text_name(kind, temperature)]
            prompts = heldout_windows(root, kind, count=len(ids), length=PROMPT)
            out[kind].append(asdict(agreement(draft, prompts, ids, temperature, gains)))
    return out


def ticks(windows: int) -> int:
    """Returns how often :func:`heldout_text` calls ``tick`` if no continuations are kept."""
    return len(KINDS) * len(TEMPERATURES) * math.ceil(windows / BATCH) * NEW
