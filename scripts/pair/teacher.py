"""Continuations of training text by the target, with its distribution at every position.

The polishing stage (:mod:`.polish`) learns from these shards alone, so the teacher runs once. A
shard is a safetensors file: ``ids [rows, length]``, ``lengths [rows]`` (positions of a row that
count), ``top [rows, length, SUPPORT]`` and ``logprobs`` of the same shape: the target's most
likely next tokens after each position, the likeliest first, and their log probabilities at
temperature 1. ``temperature`` and ``prompt`` (tokens of each prompt) are scalars.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from .evaluate import GRAM, choose
from .recipe import SEED, Teaching


class _Reserved(DynamicLayer):
    """A cache layer with room for ``length`` positions, so that growing copies nothing."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.buffers, self.used = length, [], 0

    def update(self, key_states, value_states, *args, **kwargs):
        new = (key_states, value_states)
        if not self.buffers:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [s.new_empty(*s.shape[:2], self.length, s.shape[3]) for s in new]
        end = self.used + key_states.shape[2]
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[:, :, self.used : end] = states
        self.used = end
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.used] for buffer in self.buffers)


def _prompts(root: Path, teaching: Teaching, index: int) -> torch.Tensor:
    """Returns windows of training text ``[rows, length]``; a shard has one kind and one length."""
    draw = np.random.default_rng((SEED, index))
    length = int(draw.integers(teaching.shortest_prompt, teaching.longest_prompt + 1))
    kind = teaching.kinds[index % len(teaching.kinds)]
    stream = np.load(root / f"{kind}-train.npy", mmap_mode="r")
    starts = draw.integers(0, len(stream) - length, teaching.rows)
    return torch.from_numpy(np.stack([stream[start : start + length].astype(np.int64) for start in starts]))


class _Ends:
    """Tracks which rows have ended: at the end of text, or where an 8-gram of the continuation repeats, because
    nothing is learnt from loops."""

    def __init__(self, rows: int, end: int):
        self.end = end
        self.written: list[list[int]] = [[] for _ in range(rows)]
        self.grams: list[set[tuple[int, ...]]] = [set() for _ in range(rows)]

    def add(self, row: int, token: int) -> int | None:
        """Returns the number of tokens of the continuation that count if the row ends with ``token``."""
        written = self.written[row]
        written.append(token)
        if token == self.end:
            return len(written)
        gram = tuple(written[-GRAM:])
        if len(gram) == GRAM and gram in self.grams[row]:
            return len(written) - GRAM
        self.grams[row].add(gram)
        return None


@torch.no_grad()
def write_shard(
    target: LlamaForCausalLM, prompts: torch.Tensor, temperature: float, teaching: Teaching, index: int
) -> dict[str, torch.Tensor]:
    """Writes one shard from prompts ``[rows, length]``; ``index`` seeds its noise."""
    rows, prompt = prompts.shape
    length = prompt + teaching.new_tokens
    ids = torch.zeros(rows, length, dtype=torch.int64)
    ids[:, :prompt] = prompts
    lengths = torch.full((rows,), length - 1)  # the last token has no next one
    top = torch.zeros(rows, length, teaching.support, dtype=torch.int16)
    logprobs = torch.zeros(rows, length, teaching.support, dtype=torch.float16)
    ends, alive = _Ends(rows, target.config.eos_token_id), torch.arange(rows)
    cache = DynamicCache()
    cache.layers = [_Reserved(length) for _ in range(target.config.num_hidden_layers)]
    begin, inputs = 0, prompts
    for step in range(teaching.new_tokens):
        logits = target(inputs, past_key_values=cache, use_cache=True).logits.float()
        values, places = logits.log_softmax(-1).topk(teaching.support)
        stop = begin + inputs.shape[1]
        top[alive, begin:stop] = places.to(torch.int16)
        logprobs[alive, begin:stop] = values.to(torch.float16)
        chosen = choose(logits[:, -1], temperature, step, 1_000 + index)
        ids[alive, stop] = chosen
        going = []
        for place, (row, token) in enumerate(zip(alive.tolist(), chosen.tolist(), strict=True)):
            counted = ends.add(row, token)
            if counted is None:
                going.append(place)
            else:  # the token a position predicts must count, too
                lengths[row] = prompt + counted - 1
        if len(going) < rows * teaching.fewest_share:
            lengths[alive[going]] = stop
            break
        if len(going) < len(alive):
            keep = torch.tensor(going)
            alive, chosen = alive[keep], chosen[keep]
            cache.batch_select_indices(keep)
        begin, inputs = stop, chosen.unsqueeze(1)
    longest = int(lengths.max()) + 1
    return {
        "ids": ids[:, :longest].to(torch.int16),
        "lengths": lengths.to(torch.int16),
        "top": top[:, :longest].contiguous(),
        "logprobs": logprobs[:, :longest].contiguous(),
        "temperature": torch.tensor(temperature),
        "prompt": torch.tensor(prompt),
    }


def teach(root: Path, out: Path, target: LlamaForCausalLM, teaching: Teaching) -> None:
    """Writes the missing shards: ``out/00000.safetensors``, ``out/00001.safetensors``, …"""
    out.mkdir(parents=True, exist_ok=True)
    positions = 0
    with Progress() as progress:
        bar = progress.add_task("teacher", total=teaching.shards)
        for index in range(teaching.shards):
            path = out / f"{index:05}.safetensors"
            if not path.exists():
                temperature = teaching.temperatures[index % len(teaching.temperatures)]
                shard = write_shard(target, _prompts(root, teaching, index), temperature, teaching, index)
                positions += int(shard["lengths"].sum())
                save_file(shard, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").rename(path)
            progress.update(bar, advance=1, description=f"teacher, {positions:,} positions")
