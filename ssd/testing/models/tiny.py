"""Tiny randomly initialised causal LMs of many architectures, and a toy tokenizer.

They run in milliseconds on one core and need no download. The spread of the weights is large enough that greedy text
varies and that the gap between the two largest logits is far above rounding errors, so a wrong mask, position or cache
slot changes tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

EOS_ID, BOS_ID, PAD_ID, UNK_ID = 0, 1, 2, 3
SPECIAL_TOKENS = ("<eos>", "<bos>", "<pad>", "<unk>")
CONTEXT = 512  # max_position_embeddings of every tiny model

# All layers of Mistral, and every second one of the Gemmas, attend SHORT_WINDOW tokens only.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_neox", "phi", "olmo2")
# State that cannot be rolled back by forgetting cache slots.
RECURRENT_ARCHITECTURES = ("mamba", "recurrent_gemma")
SHORT_WINDOW = 8

_MODEL_TYPES = {"gemma3": "gemma3_text"}


def _config_values(architecture: str, overrides: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns transformers' ``model_type`` and the configuration of an architecture."""
    known = ARCHITECTURES + RECURRENT_ARCHITECTURES
    if architecture not in known:
        raise ValueError(f"unknown tiny architecture {architecture!r}; one of {', '.join(known)}")
    base = architecture
    layers = overrides.get("num_hidden_layers", 2)
    values: dict[str, Any] = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        eos_token_id=EOS_ID,
        bos_token_id=BOS_ID,
        pad_token_id=PAD_ID,
        tie_word_embeddings=base.startswith("gemma"),
    )
    if base == "mamba":
        values |= dict(hidden_size=32, intermediate_size=64, state_size=8, time_step_rank=4)
        return base, values | overrides
    values |= dict(num_attention_heads=4, max_position_embeddings=CONTEXT)
    if base == "recurrent_gemma":
        del values["max_position_embeddings"]
        values |= dict(
            num_key_value_heads=1,
            head_dim=16,
            lru_width=64,
            attention_window_size=CONTEXT,
            block_types=["recurrent", "attention"],
            tie_word_embeddings=True,
        )
        return base, values | overrides
    if base != "gpt_neox":  # which has no grouped-query attention
        values["num_key_value_heads"] = 2
    if base in ("llama", "qwen3", "mistral", "gemma2", "gemma3"):
        values["head_dim"] = 16
    if base == "mistral":
        values["sliding_window"] = SHORT_WINDOW
    if base.startswith("gemma"):
        values |= dict(
            query_pre_attn_scalar=16,
            sliding_window=SHORT_WINDOW,
            layer_types=[("sliding_attention", "full_attention")[i % 2] for i in range(layers)],
        )
    return _MODEL_TYPES.get(base, base), values | overrides


@torch.no_grad()
def _initialise(model: PreTrainedModel, seed: int) -> None:
    """Draws the weights in fp32 in a fixed order, so that a bf16 model is the rounded fp32 model."""
    generator = torch.Generator().manual_seed(seed)
    gemma = model.config.model_type.startswith("gemma")  # whose norms multiply by 1 + weight
    tied = bool(model.config.tie_word_embeddings)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            value = 0.1 * noise  # not all one: a forgotten norm weight or bias must show
            if name.endswith("weight") and not gemma:
                value += 1.0
            elif name == "model.norm.weight":
                value += 40.0  # wide logits in spite of the small tied embedding
            elif "q_norm" in name or "k_norm" in name:
                value += 1.0  # attention that picks, where a mean of the past would hardly change
            elif name.endswith("post_attention_layernorm.weight"):
                value -= 0.8  # leaves the current token a say
        elif "embed" in name and parameter.shape[0] == model.config.vocab_size:
            # A tied embedding that dominates the residual stream would predict its own token
            # for ever. Gemma multiplies embeddings by sqrt(hidden size).
            value = noise * ((0.01 if gemma else 0.3) if tied else 1.0)
        elif parameter.shape[0] == model.config.vocab_size:
            value = 0.5 * noise
        else:
            value = noise * 1.6 / math.sqrt(parameter.shape[1])
        parameter.copy_(value)


def tiny_model(
    architecture: str,
    *,
    seed: int = 0,
    vocab_size: int = 128,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PreTrainedModel:
    """Returns a random causal LM in evaluation mode on the CPU.

    ``architecture`` is one of :data:`ARCHITECTURES` or
    :data:`RECURRENT_ARCHITECTURES`; ``overrides`` are fields of its transformers
    configuration. The same arguments give the same weights; the caller's random state is not
    changed. Logits are ``[B, M, V]`` with V = ``vocab_size``.
    """
    model_type, values = _config_values(architecture, overrides)
    config = AutoConfig.for_model(model_type, vocab_size=vocab_size, **values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Built in ``dtype`` rather than cast afterwards: a cast would also round the rotary
        # frequencies, which from_pretrained keeps in fp32.
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if architecture not in RECURRENT_ARCHITECTURES:  # their own initialisation keeps them stable
        _initialise(model, seed)
    return model.eval()


def _symbols(count: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Returns ``count`` byte-level symbols, most frequent first, and the merges that form the longer ones."""
    to_symbol = _byte_symbols()
    order = [ord(c) for c in " \netaoinsrhldcumfpgwybvkxjqz"]
    order += [b for b in [*range(32, 127), 9] if b not in order]
    order += [b for b in range(256) if b not in order]
    single = [to_symbol[b] for b in order]
    # 97 ASCII symbols first; merges fill what room is left, unless all 256 bytes fit as well.
    alphabet = single if count >= 320 else single[:97]
    symbols, merges = alphabet[:count], []
    letters = single[:28]
    for left in letters:
        for right in letters[2:]:  # merges end in a letter: a space or newline only leads
            if len(symbols) >= count:
                return symbols, merges
            symbols.append(left + right)
            merges.append((left, right))
    while len(symbols) < count:  # vocabularies beyond all pairs: tokens that no text makes
        symbols.append(f"<extra_{len(symbols)}>")
    return symbols, merges


def _byte_symbols() -> dict[int, str]:
    """Returns the table from bytes to printable characters of GPT-2's byte-level encoding."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in printable}
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + len(table) - len(printable))
    return table


def tiny_tokenizer(vocab_size: int = 128) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer with a fixed vocabulary of exactly ``vocab_size`` ids.

    Ids 0 to 3 are ``<eos> <bos> <pad> <unk>``; no tokens are added around a text. With at least 101 ids, ASCII text
    decodes to itself after encoding; with at least 324, every text does (a character may take several tokens). With
    fewer, missing characters become ``<unk>``.
    """
    if vocab_size < 16:
        raise ValueError(f"a tiny tokenizer needs a vocabulary of at least 16, not {vocab_size}")
    symbols, merges = _symbols(vocab_size - len(SPECIAL_TOKENS))
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *symbols])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    eos, bos, pad, unk = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        bos_token=bos,
        pad_token=pad,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def save_tiny(
    folder: str | Path,
    architecture: str,
    *,
    seed: int = 0,
    vocab_size: int = 128,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    tokenizer_vocab_size: int | None = None,
    **overrides: Any,
) -> Path:
    """Writes :func:`tiny_model` (safetensors) and :func:`tiny_tokenizer`; returns ``folder``.

    A ``tokenizer_vocab_size`` below ``vocab_size`` gives a padded vocabulary, like Qwen's: the last logits belong to
    no token.
    """
    folder = Path(folder)
    model = tiny_model(architecture, seed=seed, vocab_size=vocab_size, dtype=dtype, **overrides)
    model.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer(tokenizer_vocab_size or vocab_size).save_pretrained(folder)
    return folder
