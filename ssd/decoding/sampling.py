"""Sampling: from logits to scores whose argmax is the token.

A sample is ``argmax(filtered logits / temperature + gumbel)`` (see ``noise.py``), so choosing means
ranking scores, and temperature 0 is the same without noise. Parameters are tensors with one entry
per sequence, since a batch mixes requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Temperatures below this count as 0: dividing logits by them could overflow float32, and they would
# choose the most probable token anyway.
GREEDY_BELOW = 1e-5

# Top-p sums probabilities as integers in units of 2**-40, see ``_beyond_top_p``.
_MASS_BITS = 40

LIKELY = 128
"""Most probable tokens of a row, among which ``likely`` looks for the edge of the filters."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SamplingTensors:
    """Sampling parameters of a batch, one entry per sequence, on the device of the logits.

    The flags are Python values, so that sorting and noise cost nothing in a batch that does not need
    them (a compiled graph specializes on them).
    """

    temperature: Tensor
    """float32 [B]; 0 is greedy, and such a row ignores everything below."""
    top_k: Tensor
    """int64 [B]; 0 keeps all tokens."""
    top_p: Tensor
    """float32 [B]; 1 keeps all tokens."""
    min_p: Tensor
    """float32 [B]; 0 keeps all tokens."""
    seed: Tensor
    """int64 [B]."""
    filtered: bool
    """Some row with temperature > 0 uses top_k, top_p or min_p."""
    random: bool
    """Some row has temperature > 0."""

    @classmethod
    def empty(cls, batch: int, device: torch.device | str) -> SamplingTensors:
        """Returns parameters of B greedy rows: temperature 0, no filters, seed 0."""
        return cls(
            temperature=torch.zeros(batch, dtype=torch.float32, device=device),
            top_k=torch.zeros(batch, dtype=torch.int64, device=device),
            top_p=torch.ones(batch, dtype=torch.float32, device=device),
            min_p=torch.zeros(batch, dtype=torch.float32, device=device),
            seed=torch.zeros(batch, dtype=torch.int64, device=device),
            filtered=False,
            random=False,
        )

    def with_row(
        self, row: int, *, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
    ) -> SamplingTensors:
        """Returns a copy with one row replaced. Reads the batch back to the host to set the flags (on CUDA
        this waits for the device), so it is for admission, not for a round.

        Args:
            row: index in the batch, 0 <= row < B.
            temperature: >= 0; below 1e-5 it is stored as 0.
            top_k: >= 0, 0 keeps all.
            top_p: in (0, 1].
            min_p: in [0, 1].
            seed: in [0, 2**63).

        Raises:
            ValueError: a value is out of range; the message names it.
        """
        checks = (
            (0 <= row < len(self.seed), f"row must be in [0, {len(self.seed)})"),
            (math.isfinite(temperature) and temperature >= 0, "temperature must be a finite number >= 0"),
            (top_k >= 0, "top_k must be >= 0 (0 keeps all tokens)"),
            (0 < top_p <= 1, "top_p must be in (0, 1]"),
            (0 <= min_p <= 1, "min_p must be in [0, 1]"),
            (0 <= seed < 2**63, "seed must be in [0, 2**63)"),
        )
        for passed, message in checks:
            if not passed:
                raise ValueError(message)
        values = {
            "temperature": 0.0 if temperature < GREEDY_BELOW else temperature,
            "top_k": min(top_k, 2**62),
            "top_p": top_p,
            "min_p": min_p,
            "seed": seed,
        }
        tensors = {name: getattr(self, name).clone() for name in values}
        for name, value in values.items():
            tensors[name][row] = value
        rows = zip(*(tensors[name].tolist() for name in ("temperature", "top_k", "top_p", "min_p")), strict=True)
        random_rows = [(k, p, m) for t, k, p, m in rows if t > 0]
        return SamplingTensors(
            **tensors,
            filtered=any(k > 0 or p < 1 or m > 0 for k, p, m in random_rows),
            random=bool(random_rows),
        )

    def packed(self) -> Tensor:
        """Returns float32 ``[B, 4]``: temperature, top_k (exact below 2**24, above any vocabulary), top_p, min_p."""
        return torch.stack((self.temperature, self.top_k.float(), self.top_p, self.min_p), dim=-1)

    def of(self, slots: Tensor) -> SamplingTensors:
        """Returns the parameters of the sequences ``slots`` ``[n]`` int64. The flags remain those of all B."""
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        return replace(self, **{name: getattr(self, name)[slots] for name in names})


def _per_row(values: Tensor) -> Tensor:
    """Reshapes [B] to [B, 1, 1], to broadcast over [B, W, V]."""
    return values[:, None, None]


def _check_shape(logits: Tensor, params: SamplingTensors) -> None:
    if logits.dim() != 3 or logits.shape[0] != params.seed.shape[0]:
        raise ValueError(
            f"logits must be [B, W, V] with B = {params.seed.shape[0]} as in the sampling parameters, "
            f"not {tuple(logits.shape)}"
        )


def _scale(logits: Tensor, params: SamplingTensors) -> Tensor:
    """Divides logits by temperature; rows of temperature 0 are unchanged (x / 1 is exact)."""
    temperature = _per_row(params.temperature)
    return logits.to(torch.float32) / torch.where(temperature > 0, temperature, 1.0)


def _beyond_top_p(ordered: Tensor, top_p: Tensor) -> Tensor:
    """Returns which entries of ascending logits [B, W, V] top-p drops (bool, same shape).

    As in transformers and vLLM, starting at the small end: an entry is dropped while the mass up to and
    including it is at most 1 - p. The mass is summed in integers: a float32 cumsum may depend
    on the number of rows and, on CUDA, on the run, and so would a token at the boundary.
    """
    mass = (ordered.softmax(-1) * 2.0**_MASS_BITS).to(torch.int64).cumsum(-1)
    spare = ((1 - top_p) * 2.0**_MASS_BITS).to(torch.int64)
    beyond = (mass <= _per_row(spare)) & (_per_row(top_p) < 1)
    beyond[..., -1] = False  # the most probable token always stays
    return beyond


def filter_logits(logits: Tensor, params: SamplingTensors) -> Tensor:
    """Applies temperature, then top-k, top-p and min-p, in the order of transformers and vLLM.

    Args:
        logits: float [B, W, V]; each row has a finite maximum.
        params: parameters of the B sequences.

    Returns:
        float32 [B, W, V]: logits / temperature, dropped tokens ``-inf``. Rows with temperature 0
        are unchanged. At least the most probable token of a row is kept.

        - top-k drops tokens smaller than the k-th largest (all ties with the k-th are kept);
        - top-p keeps the smallest set of the most probable remaining tokens whose probability,
          renormalized after top-k, reaches p (of tokens tied at its edge, those with the higher id);
        - min-p drops tokens less probable than ``min_p`` times the most probable one.

    Raises:
        ValueError: ``logits`` is not [B, W, V] for the B of ``params``.

    Source: ``transformers.generation.logits_process``; min-p: Nguyen et al. 2024, arXiv 2407.01082.
    """
    _check_shape(logits, params)
    if has_operators(logits.device):
        return torch.ops.ssd.filter_logits(logits.to(torch.float32), params.packed())
    return sorted_filter(logits, params)


def has_operators(device: torch.device) -> bool:
    """Returns whether the device's filters and penalties are C++ operators (loaded by ``models/cpu/operators.py``).

    They choose the same tokens as the torch code here, except within rounding of the edge of top-p."""
    return device.type == "cpu" and hasattr(torch.ops.ssd, "scores")


def sorted_filter(logits: Tensor, params: SamplingTensors) -> Tensor:
    """Does what :func:`filter_logits` does in torch, on any device, by sorting every row."""
    scaled = _scale(logits, params)
    vocabulary = scaled.shape[-1]
    # One sort serves top-k and top-p. It is stable, so that ties are resolved alike on every device.
    ordered, tokens = torch.sort(scaled, dim=-1, stable=True)

    kept = torch.where(params.top_k > 0, params.top_k, vocabulary).clamp(max=vocabulary)
    smallest = ordered.gather(-1, _per_row(vocabulary - kept).expand(-1, scaled.shape[1], 1))
    ordered = ordered.masked_fill(ordered < smallest, -torch.inf)  # still ascending

    beyond = _beyond_top_p(ordered, params.top_p)
    dropped = torch.zeros_like(beyond).scatter(-1, tokens, beyond)
    dropped |= scaled < smallest
    # probability < min_p * largest probability, in logarithms (log 0 = -inf drops nothing).
    dropped |= scaled < scaled.amax(-1, keepdim=True) + _per_row(params.min_p.log())
    dropped &= _per_row(params.temperature > 0)
    return scaled.masked_fill(dropped, -torch.inf)


def likely(logits: Tensor, packed: Tensor) -> Tensor:
    """Approximates :func:`filter_logits` without sorting: for a draft, whose guesses may be wrong.

    The edge is searched among the ``LIKELY`` most probable tokens of a row. A top-k above that number, and a top-p
    that these tokens do not reach, drop nothing. All tokens tied at the edge of top-p are kept.

    Args:
        logits: float32 ``[B, R, V]``.
        packed: float32 ``[B, 4]``, from ``SamplingTensors.packed``.

    Returns:
        ``[B, R, V]``, the logits (not divided by the temperature), dropped tokens ``-inf``.
    """
    temperature, top_k, top_p, min_p = packed[:, None, :, None].unbind(2)  # [B, 1, 1]
    divisor = torch.where(temperature > 0, temperature, 1.0)
    best = logits.topk(min(LIKELY, logits.shape[-1]), dim=-1).values
    greatest, count = best[..., :1], best.shape[-1]
    counted = (top_k == 0) | (torch.arange(count, device=logits.device) < top_k)
    weights = ((best - greatest) / divisor).exp() * counted
    whole = ((logits - greatest) / divisor).exp().sum(-1, keepdim=True)
    total = torch.where((top_k > 0) & (top_k <= count), weights.sum(-1, keepdim=True), whole)
    kept = counted & ((weights.cumsum(-1) - weights < top_p * total) | (top_p >= 1))
    edge = best.gather(-1, kept.sum(-1, keepdim=True) - 1)
    edge = torch.where(kept.all(-1, keepdim=True), -torch.inf, edge)
    edge = torch.maximum(edge, greatest + divisor * min_p.log())
    return logits.masked_fill((logits < edge) & (temperature > 0), -torch.inf)


def perturbed(logits: Tensor, noise: Tensor, temperature: Tensor) -> Tensor:
    """Returns ``logits + temperature · noise``, ``[B, W, V]``; ``temperature`` is ``[B]``.

    Its argmax is that of logits / temperature + noise, without a division, and rows of temperature
    0 are unchanged, whatever else is in the batch. These are two operations, not a fused multiply-add,
    so that compiled and eager code give the same bits.
    """
    return logits + noise * _per_row(temperature)


def scores(logits: Tensor, params: SamplingTensors, noise: Tensor | None) -> Tensor:
    """Returns scores whose argmax is the chosen token; their ranking is the draft's list of guesses.

    Args:
        logits: float [B, W, V].
        params: parameters of the B sequences.
        noise: Gumbel noise float32 [B, W, V] at the position each row chooses
            (``noise.gumbel(params.seed[:, None], positions, V)``); None is allowed when no row is random.

    Returns:
        float32 [B, W, V]: logits plus temperature times noise, dropped tokens at -inf, in rows
        with temperature > 0; the logits themselves in rows with temperature 0. Filters only where
        ``params.filtered``; returns the logits where ``params.random`` is false.

    Raises:
        ValueError: shapes do not match, or ``noise`` is missing for a random row.

    Source: Gumbel-max trick, see ``noise.py``.
    """
    _check_shape(logits, params)
    if not params.random:
        return logits.to(torch.float32)
    if noise is None:
        raise ValueError("noise is needed: some row has temperature > 0")
    if noise.shape != logits.shape:
        raise ValueError(f"noise must have the shape of the logits {tuple(logits.shape)}, not {tuple(noise.shape)}")
    logits = logits.to(torch.float32)
    if params.filtered and has_operators(logits.device):
        each = torch.arange(logits.shape[1]).expand(logits.shape[:2])
        return torch.ops.ssd.scores(logits, noise, each, params.packed(), None, None)
    chosen = perturbed(logits, noise, params.temperature)
    if params.filtered:
        chosen.masked_fill_(sorted_filter(logits, params) == float("-inf"), float("-inf"))
    return chosen


def choose(logits: Tensor, params: SamplingTensors, noise: Tensor | None) -> Tensor:
    """Returns the chosen token of each row, int64 [B, W]: the argmax of :func:`scores`, with the same arguments and
    errors. Among equal scores the device's argmax decides (on a CPU, the lowest id)."""
    return scores(logits, params, noise).argmax(-1)
