"""The draft's last stage: training for acceptance, on the target's own continuations.

The teacher's shards (:mod:`.teacher`) hold its distribution ``p`` on a support of its most probable
tokens; the rest is one bucket. With the draft's ``q`` on the same support and bucket, the loss of a
position is the forward KL and a term for acceptance:

- in greedy text the cross-entropy to the target's argmax;
- in sampled text the total variation, one minus the acceptance rate of an ideal coupling.

The result is a mean of the weights before and after (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models"),
because training on the few shards alone overfits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from .evaluate import LOGGED_WINDOWS, evaluate, heldout_text
from .recipe import POLISHING, SEED, SEQUENCE, Polishing, Recipe
from .train import run

SMALLEST = 1e-6  # of the bucket outside the support


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Continuations packed into rows of SEQUENCE tokens; each attends only itself."""

    ids: torch.Tensor  # [rows, SEQUENCE]
    places: torch.Tensor  # [rows, SEQUENCE], position in its own continuation
    owner: torch.Tensor  # [rows, SEQUENCE], which continuation of the row; -1 for padding
    greedy: torch.Tensor  # [rows, SEQUENCE], the next token was written greedily
    counted: torch.Tensor  # [rows, SEQUENCE]
    top: torch.Tensor  # [rows, SEQUENCE, SUPPORT], likeliest first
    logprobs: torch.Tensor  # [rows, SEQUENCE, SUPPORT]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: str) -> Batch:
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def split(self, rows: int) -> list[Batch]:
        parts = zip(*(tensor.split(rows) for tensor in vars(self).values()), strict=True)
        return [Batch(**dict(zip(vars(self), part, strict=True))) for part in parts]


class Lessons:
    """Batches from shards. Step ``i`` depends on (seed, i) and the shards alone."""

    def __init__(self, folder: Path, stage: Polishing):
        self.stage = stage
        self.shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        self.samples = [
            (shard, row, int(length))
            for shard, content in enumerate(self.shards)
            for row, length in enumerate(content["lengths"])
        ]
        self.epoch, self.packed = -1, []
        self.steps_per_epoch = len(self._pack(0)) // stage.rows

    def _pack(self, epoch: int) -> list[list[int]]:
        """Packs an epoch: each sample goes to the first of a few open rows that has room."""
        order = np.random.default_rng((SEED, epoch)).permutation(len(self.samples))
        done: list[list[int]] = []
        opened: list[tuple[int, list[int]]] = []
        for sample in order.tolist():
            length = self.samples[sample][2]
            for place, (room, row) in enumerate(opened):
                if length <= room:
                    opened[place] = (room - length, [*row, sample])
                    break
            else:
                opened.append((SEQUENCE - length, [sample]))
            if len(opened) > 32:
                opened.sort(key=lambda entry: -entry[0])
                done.append(opened.pop()[1])
        rows = done + [row for _, row in opened]
        return [rows[place] for place in np.random.default_rng((SEED, epoch, 1)).permutation(len(rows))]

    def step(self, index: int) -> Batch:
        epoch, place = divmod(index, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.packed = epoch, self._pack(epoch)
        rows, support = self.stage.rows, self.shards[0]["top"].shape[2]
        ids = torch.zeros(rows, SEQUENCE, dtype=torch.int64)
        places = torch.zeros_like(ids)
        owner = torch.full_like(ids, -1)
        greedy = torch.zeros(rows, SEQUENCE, dtype=torch.bool)
        counted = torch.zeros_like(greedy)
        top = torch.zeros(rows, SEQUENCE, support, dtype=torch.int64)
        logprobs = torch.full((rows, SEQUENCE, support), -20.0)
        for row, samples in enumerate(self.packed[place * rows : (place + 1) * rows]):
            begin = 0
            for name, sample in enumerate(samples):
                shard, line, length = self.samples[sample]
                content, end = self.shards[shard], begin + length
                ids[row, begin:end] = content["ids"][line, :length]
                places[row, begin:end] = torch.arange(length)
                owner[row, begin:end] = name
                own = begin + int(content["prompt"]) - 1  # from here on the next token is the target's own
                greedy[row, own:end] = bool(content["temperature"] == 0)
                counted[row, begin + self.stage.context : end] = True
                top[row, begin:end] = content["top"][line, :length].long()
                logprobs[row, begin:end] = content["logprobs"][line, :length].float()
                begin = end
        return Batch(ids=ids, places=places, owner=owner, greedy=greedy, counted=counted, top=top, logprobs=logprobs)


def own_text(owner: torch.Tensor) -> torch.Tensor:
    """Returns the mask ``[rows, 1, length, length]``: a position attends those before it in its own continuation."""
    length = owner.shape[1]
    before = torch.ones(length, length, dtype=torch.bool).tril()
    return ((owner[:, :, None] == owner[:, None, :]) & before)[:, None]


def loss_of(draft: LlamaForCausalLM, batch: Batch, share: float) -> torch.Tensor:
    """Returns the mean loss over counted positions, of which ``share`` is the acceptance term."""
    hidden = draft.model(
        input_ids=batch.ids, position_ids=batch.places, attention_mask=own_text(batch.owner), use_cache=False
    ).last_hidden_state
    logits = draft.lm_head(hidden).float()
    logq = logits.gather(-1, batch.top) - logits.logsumexp(-1, keepdim=True)
    p, q = batch.logprobs.exp(), logq.exp()
    p_rest, q_rest = ((1 - x.sum(-1)).clamp(min=SMALLEST) for x in (p, q))
    divergence = (p * (batch.logprobs - logq)).sum(-1) + p_rest * (p_rest / q_rest).log()
    variation = 1 - torch.minimum(p, q).sum(-1) - torch.minimum(p_rest, q_rest)
    rejected = torch.where(batch.greedy, -logq[..., 0], variation)
    return (((1 - share) * divergence + share * rejected) * batch.counted).sum() / batch.counted.sum()


def polish_draft(recipe: Recipe, device: str, micro_rows: int) -> None:
    """Trains the draft of the last generation further; see the module."""
    stage, target_path = POLISHING, recipe.path("target")
    lessons = Lessons(recipe.polished("shards"), stage)
    target = LlamaForCausalLM.from_pretrained(target_path, dtype=torch.float32).eval()
    text = heldout_text(recipe.root, target, windows=LOGGED_WINDOWS)
    del target

    def measure(draft: LlamaForCausalLM) -> dict[str, float]:
        results = evaluate(recipe.root, draft, text)
        return {
            f"alpha_{kind}_{row['temperature']:g}": row["alpha_fresh"] for kind, rows in results.items() for row in rows
        }

    run(
        "polish",
        stage,
        recipe.polished("draft"),
        lambda: LlamaForCausalLM.from_pretrained(recipe.path("draft"), dtype=torch.float32),
        lessons.step,
        lambda draft, batch: loss_of(draft, batch, stage.acceptance),
        measure,
        device,
        micro_rows,
    )
    mean = mean_of_weights(recipe.path("draft"), recipe.polished("draft"), stage.kept)
    mean.save_pretrained(recipe.polished("mean"))


def mean_of_weights(start: Path, end: Path, kept: float) -> LlamaForCausalLM:
    """Returns ``kept · start + (1 - kept) · end`` of two models of the same shape, in float32."""
    model, other = (LlamaForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (end, start))
    with torch.no_grad():
        for mine, first in zip(model.parameters(), other.parameters(), strict=True):
            mine.lerp_(first, kept)
    return model
