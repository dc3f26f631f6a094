"""Tiny GGUF files: Llama with random blocks of every quantisation type and a byte-level tokenizer. Needs ``gguf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

LAYERS, HIDDEN, FEED_FORWARD, HEADS, KEY_VALUE_HEADS, CONTEXT = 2, 256, 512, 4, 2, 512
END, TURN = "<|end|>", "<|turn|>"
TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def tokens() -> tuple[list[str], list[str]]:
    """Returns a byte-level vocabulary and its merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = ["t h", "th e", "i n", "Ġ the", "Ġ a", "e r", "o n", "in g"]
    alphabet = sorted(bytes_to_unicode().values())
    return [*alphabet, *(merge.replace(" ", "") for merge in merges), END, TURN], merges


def write_gguf(
    path: Path,
    *,
    kinds: tuple[str, ...] = ("Q4_K",),
    embedding: str = "Q8_0",
    tied: bool = True,
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Writes a file and returns its path.

    Args:
        kinds: quantisation types of the linear layers, in turns.
        embedding: type of the embedding, and of the head unless ``tied``.
        tied: the file has no output head.
        metadata: strings and integers that replace or extend the header's.
        without: tensors to leave out.
        extra: further tensors.
    """
    from gguf import GGUFWriter, TokenType

    vocabulary, merges = tokens()
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([TokenType.NORMAL] * (len(vocabulary) - 2) + [TokenType.CONTROL] * 2)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(vocabulary.index(END))
    writer.add_bos_token_id(vocabulary.index(TURN))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for key, value in (metadata or {}).items():
        writer.kv_data[0].pop(key, None)
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    random = np.random.default_rng(seed)
    narrow = HIDDEN // HEADS * KEY_VALUE_HEADS
    norms = [("output_norm", HIDDEN)]
    weights = [("token_embd", len(vocabulary), HIDDEN, embedding)]
    if not tied:
        weights.append(("output", len(vocabulary), HIDDEN, embedding))
    shapes = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (narrow, HIDDEN),
        "attn_v": (narrow, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (FEED_FORWARD, HIDDEN),
        "ffn_up": (FEED_FORWARD, HIDDEN),
        "ffn_down": (HIDDEN, FEED_FORWARD),
    }
    for layer in range(LAYERS):
        norms += [(f"blk.{layer}.attn_norm", HIDDEN), (f"blk.{layer}.ffn_norm", HIDDEN)]
        for index, (name, shape) in enumerate(shapes.items()):
            weights.append((f"blk.{layer}.{name}", *shape, kinds[(layer * len(shapes) + index) % len(kinds)]))
    for name, size in norms:
        if f"{name}.weight" not in without:
            writer.add_tensor(f"{name}.weight", random.normal(1, 0.1, size).astype(np.float32))
    for name, rows, columns, kind in weights:
        if f"{name}.weight" not in without:
            _add(writer, f"{name}.weight", random_blocks(random, rows, columns, kind), kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(random: np.random.Generator, rows: int, columns: int, kind: str) -> np.ndarray:
    """Returns a weight of standard deviation near 0.05 in a type's blocks: uint8 ``[rows, bytes of a row]``; float32
    ``[rows, columns]`` for type F32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind == "F32":
        return random.normal(0, 0.05, (rows, columns)).astype(np.float32)
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = random.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)

    def halves(value: float) -> np.ndarray:
        drawn = value * random.uniform(0.5, 1.5, (rows, columns // block, 1))
        return drawn.astype(np.float16).view(np.uint8)

    # Scales that give the standard deviation, and minima that centre the numbers.
    scale, minimum = {
        "Q4_0": (0.011, None),
        "Q4_1": (0.011, -0.08),
        "Q5_0": (0.0055, None),
        "Q5_1": (0.0055, -0.085),
        "Q8_0": (0.0007, None),
        "Q4_K": (0.0003, 0.0023),
        "Q5_K": (0.00015, 0.0023),
        "Q6_K": (0.00004, None),
        "Q2_K": (0.004, 0.004),
    }.get(kind, (0.001, None))
    at = {"Q6_K": 208, "Q2_K": 80}.get(kind, 0)
    blocks[..., at : at + 2] = halves(scale)
    if minimum is not None:
        blocks[..., at + 2 : at + 4] = halves(minimum)
    return blocks.reshape(rows, -1)


def _add(writer: Any, name: str, values: np.ndarray, kind: str) -> None:
    from gguf import GGMLQuantizationType

    if kind == "F32":
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType[kind])
