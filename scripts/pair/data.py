"""Tokenizer and token streams."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .corpus import END_OF_TEXT, Document, collect
from .recipe import SEED, SEQUENCE, VOCABULARY

KINDS = ("code", "prose")


def _train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Indentation is one token however deep: runs of spaces stay together.
            pre_tokenizers.Split(pattern=_pattern(), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents if not d.held_out), trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def _pattern():
    from tokenizers import Regex

    return Regex(r"\n[ ]*| ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+|[ ]+(?! )|\s")


def prepare(root: Path) -> None:
    """Write ``tokenizer/`` (unless it is there), ``{kind}-{split}.npy`` (uint16 token streams) and ``corpus.json``."""
    if (root / "corpus.json").exists():
        return
    root.mkdir(parents=True, exist_ok=True)
    documents = collect()
    if (root / "tokenizer").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "tokenizer")
    else:
        tokenizer = _train_tokenizer(documents)
        tokenizer.save_pretrained(root / "tokenizer")
    end = tokenizer.eos_token_id
    summary: dict[str, dict[str, int]] = {}
    held_out: dict[str, list[str]] = {kind: [] for kind in KINDS}
    order = np.random.default_rng(SEED)
    for kind in KINDS:
        for split, flag in (("train", False), ("heldout", True)):
            chosen = [d for d in documents if d.kind == kind and d.held_out == flag]
            order.shuffle(chosen)
            ids = tokenizer([d.text for d in chosen], add_special_tokens=False)["input_ids"]
            stream = np.concatenate([np.array([*row, end], dtype=np.uint16) for row in ids])
            np.save(root / f"{kind}-{split}.npy", stream)
            summary[f"{kind}-{split}"] = {
                "documents": len(chosen),
                "characters": sum(len(d.text) for d in chosen),
                "tokens": len(stream),
            }
            if flag:
                held_out[kind] = [d.text for d in chosen]
    (root / "heldout.json").write_text(json.dumps(held_out))
    (root / "corpus.json").write_text(json.dumps(summary, indent=1))


class Batches:
    """Deterministic batches: step ``i`` is a function of (seed, i) alone, so a resumed run
    sees what an unbroken one would have seen.

    Rows walk each stream in a seeded order of windows, without replacement within an epoch.
    """

    def __init__(self, root: Path, *, rows: int, code_share: float, seed: int):
        self.streams = {kind: np.load(root / f"{kind}-train.npy", mmap_mode="r") for kind in KINDS}
        self.rows, self.code_rows, self.seed = rows, round(rows * code_share), seed

    def step(self, index: int) -> torch.Tensor:
        """Token ids ``[rows, SEQUENCE + 1]``."""
        out = []
        for kind, count in (("code", self.code_rows), ("prose", self.rows - self.code_rows)):
            stream = self.streams[kind]
            windows = (len(stream) - 1) // SEQUENCE
            for row in range(index * count, (index + 1) * count):
                epoch, place = divmod(row, windows)
                order = np.random.default_rng((self.seed, epoch)).permutation(windows)
                start = int(order[place]) * SEQUENCE
                out.append(stream[start : start + SEQUENCE + 1].astype(np.int64))
        return torch.from_numpy(np.stack(out))


def heldout_windows(root: Path, kind: str, *, count: int, length: int) -> torch.Tensor:
    """Evenly spaced held-out windows ``[count, length]``."""
    stream = np.load(root / f"{kind}-heldout.npy")
    starts = np.linspace(0, len(stream) - length - 1, count).astype(int)
    return torch.from_numpy(np.stack([stream[s : s + length] for s in starts]).astype(np.int64))
