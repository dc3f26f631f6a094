"""Model folders with quantised weights: what they are, and how they become a model.

Weights are dequantised while they are loaded, so the model is an ordinary one: it can be compiled, divided over ranks
and computed with the CPU operators. transformers dequantises most formats. It loads AWQ and GPTQ only with
``gptqmodel``, which needs a newer torch than this engine; these two packings are simple and read here. It takes one
scheme for all layers of a compressed-tensors model; here that package's compressors get each layer's own.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ...errors import ModelError
from .naming import Naming

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FLOATS = ("F64", "F32", "F16", "BF16")
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ stores each of eight columns in a word: column 1 is the fifth field."""
COMPRESSED_PARTS = (
    "weight",
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
)
"""Tensors that compressed-tensors stores for a weight; a format has some of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A quantisation format.

    Attributes:
        packages: that loading needs, import name and the name to install.
        packed: how weights can stay packed on a GPU. ``default``: they do unless the configuration says otherwise.
            ``asked``: with kernels that transformers takes from a hub's cache. ``never``: there are no kernels.
    """

    packages: tuple[tuple[str, str], ...] = ()
    packed: Literal["default", "asked", "never"] = "never"


_ACCELERATE = ("accelerate", "accelerate")
FORMATS = {
    "awq": Format(),
    "gptq": Format(),
    "compressed-tensors": Format(packages=(("compressed_tensors", "compressed-tensors"),)),
    "fp8": Format(packages=(_ACCELERATE,), packed="asked"),
    "mxfp4": Format(packages=(_ACCELERATE,), packed="asked"),
    "bitsandbytes": Format(packages=(("bitsandbytes", "bitsandbytes"), _ACCELERATE), packed="default"),
    "torchao": Format(packages=(("torchao", "torchao"),), packed="default"),
}
"""By ``quant_method`` in ``config.json``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor of a folder: its type as safetensors names it, and its shape."""

    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantisation:
    """How a folder's weights are quantised.

    Attributes:
        method: a key of ``FORMATS``.
        settings: ``quantization_config`` of the model's configuration.
    """

    method: str
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        settings = self.settings
        details = list[str]()
        if self.method in ("awq", "gptq"):
            group = _group_size(settings)
            details = [f"{settings.get('bits', settings.get('w_bit', 4))} bits"]
            details += [f"groups of {group}"] if group > 0 else []
        elif self.method == "bitsandbytes":
            four = settings.get("load_in_4bit", False)
            details = [f"4 bits, {settings.get('bnb_4bit_quant_type', 'fp4')}" if four else "8 bits"]
        elif self.method == "compressed-tensors":
            details = [str(settings.get("format"))]
        elif self.method == "fp8" and (block := settings.get("weight_block_size")):
            details = ["blocks of " + " × ".join(map(str, block))]
        return f"{self.method} ({', '.join(details)})" if details else self.method


def find_quantisation(folder: Path, config: PretrainedConfig) -> Quantisation | None:
    """Returns how a folder's weights are quantised, or None if they are not. Reads no weights.

    Raises:
        ModelError: the format is not supported, a package is missing, or the weights are of another type than the
            configuration says.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        settings = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    stored = stored_tensors(folder)
    if settings is None:
        _check_plain(folder, stored)
        return None
    if not isinstance(settings, Mapping):
        raise ModelError(f"{folder}: quantization_config in config.json must be an object")
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        method = "bitsandbytes"
    if method not in FORMATS:
        what = f"quantisation {method!r} is not supported" if method else "quantization_config has no quant_method"
        raise ModelError(f"{folder}: {what}; supported are {', '.join(sorted(FORMATS))}, and GGUF files")
    found = Quantisation(method=method, settings=settings)
    if (check := _CHECKS.get(method)) is not None and (problem := check(settings, stored)) is not None:
        raise ModelError(f"{folder}: {found} {problem}")
    missing = [name for module, name in FORMATS[method].packages if importlib.util.find_spec(module) is None]
    if missing:
        raise ModelError(f"{folder}: {found} weights need pip install {' '.join(missing)}")
    return found


def stays_packed(folder: Path, found: Quantisation | None, *, weights: str, device: str) -> bool:
    """Returns whether transformers keeps a folder's weights packed.

    Args:
        weights: ``auto``, ``packed`` or ``dequantised``.

    Raises:
        ModelError: ``weights`` is ``packed`` and they cannot stay so.
    """
    gpu = torch.device(device).type == "cuda"
    kept = FORMATS[found.method].packed if found is not None else "never"
    if weights == "packed" and not (gpu and kept != "never"):
        able = ", ".join(sorted(name for name, one in FORMATS.items() if one.packed != "never"))
        raise ModelError(
            f"{folder}: {f'{found} weights' if found else 'weights that are not quantised'} cannot stay packed on "
            f"{device}: that needs a GPU and one of {able}; set weights to auto or dequantised"
        )
    if weights == "packed" and kept == "asked" and importlib.util.find_spec("kernels") is None:
        raise ModelError(f"{folder}: packed {found} weights need pip install kernels")
    return gpu and (weights == "packed" or (weights == "auto" and kept == "default"))


def loading_arguments(
    folder: Path, config: PretrainedConfig, found: Quantisation, dtype: torch.dtype
) -> dict[str, Any]:
    """Returns how ``from_pretrained`` loads a folder's weights dequantised: its configuration and, if transformers
    does not read the format, the weights.

    Raises:
        ModelError: the weights are not what the format says.
    """
    config = copy.deepcopy(config)
    whole = getattr(config, "quantization_config", None) is not None
    place: Any = config if whole else config.get_text_config(decoder=True)
    if found.method in ("awq", "gptq", "compressed-tensors"):
        del place.quantization_config
        return {
            "pretrained_model_name_or_path": None,
            "config": config,
            "state_dict": _dequantised(folder, found, dtype),
        }
    if found.method in ("fp8", "mxfp4"):
        place.quantization_config = {**found.settings, "dequantize": True}
    return {"pretrained_model_name_or_path": folder, "config": config}


def dequantise(model: PreTrainedModel, found: Quantisation, dtype: torch.dtype) -> None:
    """Dequantises, in place, the weights that ``from_pretrained`` can only load packed."""
    if found.method == "bitsandbytes":
        model.dequantize(dtype=dtype)
    elif found.method == "torchao":
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                if type(weight.data) is not Tensor:  # torchao's weights are subclasses
                    setattr(module, name, nn.Parameter(weight.dequantize().to(dtype), requires_grad=False))
        quantizer: Any = model.hf_quantizer
        quantizer.remove_quantization_config(model)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Returns the tensors of a folder's safetensors files, from their headers. Raises: ModelError."""
    found = {}
    with Naming(folder, "cannot be loaded"):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is not a dictionary
                    entry = file.get_slice(name)
                    found[name] = Stored(type=entry.get_dtype(), shape=tuple(entry.get_shape()))
    return found


def _check_plain(folder: Path, stored: Mapping[str, Stored]) -> None:
    """Raises ModelError for weights that transformers would take for plain numbers, without their scales."""
    for name, tensor in stored.items():
        if name.endswith(".weight") and tensor.type not in FLOATS:
            raise ModelError(
                f"{folder}: {name} is stored as {tensor.type}, but config.json has no quantization_config that says how"
            )


def _check_awq(settings: Mapping[str, Any], stored: Mapping[str, Stored]) -> str | None:
    layout = settings.get("version") or settings.get("format") or "gemm"
    if str(layout).lower() != "gemm" or settings.get("backend") == "llm-awq":
        return f"weights in the layout of {settings.get('backend') or layout} are not supported; gemm is"
    if (bits := settings.get("bits", settings.get("w_bit", 4))) != 4:
        return f"weights of {bits} bits are not supported; 4 are"
    scaled = [name.removesuffix(".scales") for name in stored if name.endswith(".act.scales")]
    return f"scales the activations of {scaled[0]}, which is not supported" if scaled else None


def _check_gptq(settings: Mapping[str, Any], stored: Mapping[str, Stored]) -> str | None:
    layout = _gptq_layout(settings)
    if layout not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        return f"weights in the layout of {layout} are not supported; gptq and gptq_v2 are"
    if (bits := settings.get("bits")) not in (2, 4, 8):
        return f"weights of {bits} bits are not supported; 2, 4 and 8 are"
    return None


def _check_compressed(settings: Mapping[str, Any], stored: Mapping[str, Stored]) -> str | None:
    if settings.get("transform_config"):
        return "weights with a transform_config are not supported: activations would have to be rotated"
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return "weights that are sparse are not supported"
    if ordered := next((name for name in stored if name.endswith(".weight_g_idx")), None):
        return f"weights in activation order ({ordered}) are not supported"
    return None


def _check_fp8(settings: Mapping[str, Any], stored: Mapping[str, Stored]) -> str | None:
    # transformers divides a weight evenly among its scales, which is another block size if the last block is smaller.
    block = settings.get("weight_block_size") or ()
    for name, scale in stored.items():
        weight = stored.get(name.removesuffix("_scale_inv"))
        if not name.endswith(".weight_scale_inv") or weight is None or len(scale.shape) != 2 or len(block) != 2:
            continue
        for size, blocks, of in zip(weight.shape, scale.shape, block, strict=True):
            if blocks > 1 and size % of:
                return f"{name.removesuffix('_scale_inv')} {list(weight.shape)} is not whole blocks; not supported"
    return None


_CHECKS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Stored]], str | None]] = {
    "awq": _check_awq,
    "gptq": _check_gptq,
    "compressed-tensors": _check_compressed,
    "fp8": _check_fp8,
}


def _dequantised(folder: Path, found: Quantisation, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns all tensors of a folder, with those that were quantised in ``dtype``. Raises: ModelError."""
    tensors = dict[str, Tensor]()
    with Naming(folder, "cannot be loaded"):
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
        if found.method == "compressed-tensors":
            _decompress(tensors, found, dtype)
            return tensors
    options = {"group_size": _group_size(found.settings)}
    if found.method == "gptq":
        options["zero_offset"] = 0 if _gptq_layout(found.settings) == "gptq_v2" else 1
    read: Callable[..., Tensor] = unpack_awq if found.method == "awq" else unpack_gptq
    packed = dict[str, dict[str, Tensor]]()
    for name in list(tensors):
        module, _, kind = name.rpartition(".")
        if kind in ("qweight", "qzeros", "scales", "g_idx"):
            packed.setdefault(module, {})[kind] = tensors.pop(name)
    while packed:
        module, parts = packed.popitem()
        if lacking := [kind for kind in ("qweight", "qzeros", "scales") if kind not in parts]:
            raise ModelError(f"{folder}: the weights lack {module}.{lacking[0]}")
        try:
            tensors[f"{module}.weight"] = read(**parts, **options).to(dtype)
        except (RuntimeError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
            shapes = ", ".join(f"{kind} {list(part.shape)}" for kind, part in parts.items())
            raise ModelError(f"{folder}: {module} has parts that do not fit together: {shapes}") from error
    return tensors


def _decompress(tensors: dict[str, Tensor], found: Quantisation, dtype: torch.dtype) -> None:
    """Replaces, in place, a model's compressed weights by dequantised ones. Raises what the package raises."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    config: Any = QuantizationConfig.model_validate(dict(found.settings))
    schemes = [(target, scheme) for scheme in config.config_groups.values() for target in scheme.targets]
    for module in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        named = [scheme for target, scheme in schemes if match_name(module, target)]
        named += [scheme for target, scheme in schemes if target == "Linear"]
        if not named:
            raise ValueError(f"{module} is in no group of quantization_config")
        names = [f"{module}.{part}" for part in COMPRESSED_PARTS if f"{module}.{part}" in tensors]
        state: dict[str, Any] = {name.rpartition(".")[2]: tensors.pop(name) for name in names}
        compressor: Any = BaseCompressor.get_value_from_registry(named[0].format or config.format)
        tensors[f"{module}.weight"] = compressor.decompress(state, named[0])["weight"].to(dtype)


def _gptq_layout(settings: Mapping[str, Any]) -> str:
    return str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()


def _group_size(settings: Mapping[str, Any]) -> int:
    return settings.get("group_size", settings.get("q_group_size", 128))


def unpack_awq(*, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Returns a linear layer's weight from AWQ's GEMM layout: float32 ``[N, K]``.

    Args:
        qweight: int32 ``[K, N / 8]``, eight numbers of four bits in a word, in the order ``AWQ_ORDER``.
        qzeros: int32 ``[groups, N / 8]`` likewise.
        scales: ``[groups, N]``.
        group_size: inputs that share a scale; -1: all do.

    Raises:
        ValueError: the shapes do not fit together.
    """
    values, zeros = (_fields(words, 4)[..., list(AWQ_ORDER)].flatten(1) for words in (qweight, qzeros))
    return _scaled(values, zeros, scales, _groups(len(values), group_size))


def unpack_gptq(
    *,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    group_size: int,
    zero_offset: int,
) -> Tensor:
    """Returns a linear layer's weight from GPTQ's layout: float32 ``[N, K]``.

    The number of bits follows from the shapes, as it may differ between layers.

    Args:
        qweight: int32 ``[K * bits / 32, N]``, consecutive inputs in a word, lowest bits first.
        qzeros: int32 ``[groups, N * bits / 32]``, consecutive outputs in a word.
        scales: ``[groups, N]``.
        g_idx: int32 ``[K]``, the group of each input.
        group_size: consecutive inputs that share a scale, where there is no ``g_idx``; -1: all do.
        zero_offset: what was subtracted from the zero points before they were stored.

    Raises:
        ValueError: the shapes do not fit together.
    """
    bits = 32 * qzeros.shape[1] // scales.shape[1]
    values = _fields(qweight.t(), bits).flatten(1).t()
    # The original layout subtracts from whole words, so a zero point of 0 borrows from its neighbour.
    ones = sum(zero_offset << shift for shift in range(0, 32, bits))
    zeros = _fields(qzeros.long() + ones, bits).flatten(1)
    return _scaled(values, zeros, scales, _groups(len(values), group_size) if g_idx is None else g_idx.long())


def _fields(words: Tensor, bits: int) -> Tensor:
    """Returns the fields of 32-bit words, lowest bits first: uint8 ``[..., 32 / bits]``."""
    if bits not in (2, 4, 8):
        raise ValueError(f"fields of {bits} bits")
    return ((words[..., None] >> torch.arange(0, 32, bits, dtype=words.dtype)) & (2**bits - 1)).to(torch.uint8)


def _groups(inputs: int, size: int) -> Tensor:
    return torch.arange(inputs) // (size if size > 0 else inputs)


def _scaled(values: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """Returns ``(values - zeros) * scales`` transposed, where ``group`` ``[K]`` has the row of both for an input."""
    if zeros.shape != scales.shape or group.shape != values.shape[:1] or int(group.max()) != len(scales) - 1:
        raise ValueError("the shapes do not fit together")
    return ((values.float() - zeros.float()[group]) * scales.float()[group]).t().contiguous()
