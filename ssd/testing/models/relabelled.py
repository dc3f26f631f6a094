"""Tiny drafts that are their target under other token ids: only the map of the pair decides what is accepted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ...models.checkpoints.vocabulary import Vocabulary
from .tiny import tiny_tokenizer

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def sentencepiece(words: Sequence[str], *, seed: int = 0) -> PreTrainedTokenizerFast:
    """Returns a byte-fallback tokenizer that marks spaces with U+2581, as Llama 2's and Gemma's: special tokens, all
    bytes and ``words``, in an order that ``seed`` decides."""
    names = ["<pad>", "</s>", "<s>", "<unk>", *BYTES, *words]
    random.Random(seed).shuffle(names)
    made = Tokenizer(
        models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_relabelled(target: Path, folder: Path, *, missing: int = 0) -> Path:
    """Writes a draft that has its tiny target's weights and another tokenizer. Returns ``folder``.

    Args:
        target: a folder of ``save_tiny``.
        folder: a new one.
        missing: every so many words of the target are left out; 0 leaves out none.
    """
    ours = Vocabulary.of(tiny_tokenizer(AutoModelForCausalLM.from_pretrained(target).config.vocab_size))
    words = [raw.decode() for token, raw in sorted(ours.spoken.items()) if raw.isascii()]
    kept = [word.replace(" ", "\u2581") for n, word in enumerate(words) if not missing or n % missing]
    tokenizer = sentencepiece(kept)
    theirs = Vocabulary.of(tokenizer)
    rows = torch.full((theirs.size,), -1)
    for token in theirs.tokens:
        other = theirs.counterpart(token, ours)
        rows[token] = -1 if other is None else other
    model = AutoModelForCausalLM.from_pretrained(target)
    _replace_rows(model, rows)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_trimmed(target: Path, folder: Path, kept: Sequence[int], *, embedding: bool) -> Path:
    """Writes a draft that is its tiny target with a trimmed vocabulary. Returns ``folder``.

    Args:
        target: a folder of ``save_tiny``.
        folder: a new one.
        kept: token ids, in the order of the rows.
        embedding: trim the embedding too; otherwise the stored weights are the target's.
    """
    model = AutoModelForCausalLM.from_pretrained(target)
    size = model.config.vocab_size
    if embedding:
        _replace_rows(model, torch.tensor(kept))
    model.save_pretrained(folder)
    tiny_tokenizer(size).save_pretrained(folder)
    tensors = {
        "d2t": torch.tensor([token - row for row, token in enumerate(kept)]),
        "t2d": torch.tensor([token in set(kept) for token in range(size)]),
    }
    save_file(tensors, folder / "draft_vocab.safetensors")
    return folder


@torch.no_grad()
def _replace_rows(model: PreTrainedModel, rows: Tensor) -> None:
    """Gives embedding and head these rows of their own, in this order; random ones for -1."""
    generator = torch.Generator().manual_seed(3)

    def picked(weight: Tensor) -> nn.Parameter:
        found = weight[rows.clamp(min=0)]
        found[rows < 0] = torch.randn(found[rows < 0].shape, generator=generator) * weight.std()
        return nn.Parameter(found)

    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head.weight is embedding.weight
    embedding.weight = picked(embedding.weight)
    embedding.num_embeddings = len(rows)
    embedding.padding_idx = None
    head.weight = embedding.weight if tied else picked(head.weight)
    head.out_features = len(rows)
    model.config.vocab_size = len(rows)
