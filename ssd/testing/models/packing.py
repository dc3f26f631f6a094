"""Tiny folders with quantised weights, packed as each format is described; written independently of the reader.

Each function takes the folder of a tiny model, writes another one, and returns the weights as they are after
dequantisation: float32, by name.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a four-bit float, in the order of their codes; the fourth bit is the sign."""


def write_gptq(
    source: Path,
    folder: Path,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    shuffled: bool = False,
    layout: str | None = None,
    with_groups: bool = True,
) -> dict[str, Tensor]:
    """Writes GPTQ weights.

    Args:
        shuffled: inputs belong to groups in any order (``desc_act``).
        layout: ``checkpoint_format`` in the configuration: ``gptq`` and None subtract one from the zero points.
        with_groups: store ``g_idx``.
    """
    random = np.random.default_rng(3)

    def pack(name: str, weight: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        inputs = weight.shape[1]
        size = group_size if group_size > 0 else inputs
        group = np.arange(inputs) // size
        if shuffled:
            group = random.permutation(group)
        values, zeros, scales, dense = _quantise(weight, group, bits, symmetric)
        stored = zeros.astype(np.int64)  # [groups, N]
        words = _pack_rows(stored.T.copy(), bits).T  # fields along the outputs
        if layout != "gptq_v2":
            words = (words - sum(1 << shift for shift in range(0, 32, bits))) % 2**32
        parts = {
            "qweight": _int32(_pack_rows(values, bits)),
            "qzeros": _int32(words),
            "scales": scales,
            "g_idx": group.astype(np.int32),
        }
        if not with_groups:
            del parts["g_idx"]
        return parts, dense

    settings = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": shuffled}
    if layout is not None:
        settings["checkpoint_format"] = layout
    return _write(source, folder, settings, pack)


def write_awq(source: Path, folder: Path, *, group_size: int = 32) -> dict[str, Tensor]:
    """Writes AWQ weights in the GEMM layout."""

    def pack(name: str, weight: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        inputs = weight.shape[1]
        group = np.arange(inputs) // (group_size if group_size > 0 else inputs)
        values, zeros, scales, dense = _quantise(weight, group, 4, False)
        return {"qweight": _awq_words(values), "qzeros": _awq_words(zeros), "scales": scales}, dense

    settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return _write(source, folder, settings, pack)


def write_fp8(source: Path, folder: Path, *, block: int = 32) -> dict[str, Tensor]:
    """Writes fine-grained FP8 weights, a scale for every ``block`` × ``block`` numbers."""

    def pack(name: str, weight: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
        rows, columns = (-(-size // block) for size in weight.shape)
        scales = np.zeros((rows, columns), np.float32)
        for row in range(rows):
            for column in range(columns):
                part = weight[row * block : (row + 1) * block, column * block : (column + 1) * block]
                scales[row, column] = np.abs(part).max() / 448
        spread = scales.repeat(block, 0).repeat(block, 1)[: weight.shape[0], : weight.shape[1]]
        packed = torch.from_numpy(weight / spread).to(torch.float8_e4m3fn)
        return {"weight": packed, "weight_scale_inv": scales}, packed.float().numpy() * spread

    return _write(
        source,
        folder,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [block, block]},
        pack,
    )


def write_mxfp4(source: Path, folder: Path) -> dict[str, Tensor]:
    """Writes the experts of a GPT-OSS model as MXFP4: blocks of 32 four-bit floats with one exponent."""
    dense = load_file(source / "model.safetensors")
    stored = dict(dense)
    for name in [name for name in dense if name.endswith((".gate_up_proj", ".down_proj"))]:
        weight = dense[name].float().transpose(1, 2).numpy()  # [experts, outputs, inputs]
        blocks = weight.reshape(*weight.shape[:2], -1, 32)
        exponents = np.ceil(np.log2(np.abs(blocks).max(-1) / 6))
        scaled = blocks / 2 ** exponents[..., None]
        codes = np.abs(np.abs(scaled)[..., None] - np.array(E2M1)).argmin(-1)
        values = np.array(E2M1)[codes] * np.sign(scaled) * 2 ** exponents[..., None]
        codes = codes + 8 * (scaled < 0)
        stored[f"{name}_blocks"] = torch.from_numpy((codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8))
        stored[f"{name}_scales"] = torch.from_numpy((exponents + 127).astype(np.uint8))
        dense[name] = torch.from_numpy(values.reshape(weight.shape).astype(np.float32)).transpose(1, 2).contiguous()
        del stored[name]
    _copy(source, folder, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return dense


def write_compressed(source: Path, folder: Path, *, groups: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Tensor]:
    """Writes weights with the compressors of the ``compressed-tensors`` package.

    Args:
        groups: for each target (``Linear``, or a pattern that begins with ``re:``) the name of a format of the package,
            and the settings of the weights.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    dense = load_file(source / "model.safetensors")
    stored = dict[str, Tensor]()
    for name, weight in list(dense.items()):
        if not _quantised(name):
            stored[name] = weight
            continue
        target = next(one for one in groups if one == "Linear" or re.match(one.removeprefix("re:"), name))
        kind, settings = groups[target]
        scheme: Any = QuantizationScheme(
            targets=[target], weights=QuantizationArgs(**settings), format=CompressionFormat(kind)
        )
        size = settings.get("group_size") or weight.shape[1]
        parts = weight.reshape(weight.shape[0], -1, size)
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), scheme.weights)
        compressor: Any = BaseCompressor.get_value_from_registry(kind)
        state = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
        for key, value in state.items():
            stored[f"{name.removesuffix('weight')}{key}"] = value.contiguous()
        dense[name] = compressor.decompress(state, scheme)["weight"]
    kinds = {kind for kind, _ in groups.values()}
    about = {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {"targets": [target], "weights": settings, "format": kind}
            for index, (target, (kind, settings)) in enumerate(groups.items())
        },
        "ignore": ["lm_head"],
    }
    _copy(source, folder, stored, about)
    return dense


def _quantise(
    weight: np.ndarray, group: np.ndarray, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns values ``[K, N]``, zero points and float16 scales ``[groups, N]``, and the dequantised ``[N, K]``."""
    most, groups = 2**bits - 1, group.max() + 1
    scales = np.zeros((groups, weight.shape[0]), np.float16)
    zeros = np.zeros(scales.shape, np.int64)
    for index in range(groups):
        part = weight[:, group == index]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if index == 0:
            low = np.where(np.arange(len(low)) % 5 == 0, 0, low)  # zero points of 0 are the hard case
        if symmetric:
            low, high = -np.abs(part).max(1), np.abs(part).max(1)
        scales[index] = (high - low) / most
        zeros[index] = (most + 1) // 2 if symmetric else np.round(-low / scales[index].astype(np.float32))
    spread = scales.astype(np.float32)[group]
    values = np.clip(np.round(weight.T / spread) + zeros[group], 0, most).astype(np.int64)
    return values, zeros, scales, ((values - zeros[group]) * spread).T.astype(np.float32)


def _pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs consecutive rows into 32-bit words, lowest bits first: ``[K, N]`` to ``[K * bits / 32, N]``."""
    per = 32 // bits
    words = np.zeros((len(values) // per, values.shape[1]), np.int64)
    for row, numbers in enumerate(values):
        words[row // per] |= numbers << bits * (row % per)
    return words


def _awq_words(values: np.ndarray) -> np.ndarray:
    words = np.zeros((len(values), values.shape[1] // 8), np.int64)
    for word in range(words.shape[1]):
        for field, column in enumerate(AWQ_COLUMNS):
            words[:, word] |= values[:, word * 8 + column] << 4 * field
    return _int32(words)


def _int32(words: np.ndarray) -> np.ndarray:
    return words.astype(np.uint32).view(np.int32)


def _quantised(name: str) -> bool:
    return name.endswith(".weight") and name.split(".")[-2] in LAYERS


def _write(
    source: Path,
    folder: Path,
    settings: dict[str, Any],
    pack: Callable[[str, np.ndarray], tuple[dict[str, Any], np.ndarray]],
) -> dict[str, Tensor]:
    dense = load_file(source / "model.safetensors")
    stored = dict[str, Tensor]()
    for name, weight in list(dense.items()):
        if not _quantised(name):
            stored[name] = weight
            continue
        parts, values = pack(name, weight.float().numpy())
        dense[name] = torch.from_numpy(values.copy())
        for part, value in parts.items():
            tensor = value if isinstance(value, Tensor) else torch.from_numpy(value.copy())
            stored[f"{name.removesuffix('weight')}{part}"] = tensor
    _copy(source, folder, stored, settings)
    return dense


def _copy(source: Path, folder: Path, stored: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Writes a folder with the source's tokenizer, other weights, and a ``quantization_config``."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
