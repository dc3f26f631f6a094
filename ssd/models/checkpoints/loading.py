"""Loads stock transformers causal LMs from a local folder or a GGUF file, and refuses models that would give wrong
tokens."""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging

from ...errors import ModelError, first_line
from ..cpu import operators
from . import adapters, gguf_metadata, quantised
from .gguf_file import GgufFile
from .naming import Naming, check_complete
from .support import check_supported

if TYPE_CHECKING:  # fronts read configurations and tokenizers only, and this import takes two seconds
    from transformers import PreTrainedModel

    from .gguf_weights import Weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# transformers sets torch's default dtype while it loads, for all threads of the process.
_LOADING = threading.Lock()


def load_tokenizer(path: Path) -> Any:
    """Returns the tokenizer of a model.

    Args:
        path: of a model folder or a GGUF file.

    Raises:
        ModelError: the model has none that transformers can load.
    """
    if gguf_metadata.is_gguf(path):
        return gguf_metadata.load_tokenizer(path)
    _check_folder(path)
    with Naming(path, "no usable tokenizer"):
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def load_model(
    path: Path,
    *,
    dtype: str,
    device: str,
    max_positions: int,
    weights: Weights = "dequantised",
    adapter: str | None = None,
) -> PreTrainedModel:
    """Returns a causal LM for ``ForwardRunner``, in evaluation mode and without gradients.

    Args:
        path: of a transformers model's folder, or of a GGUF file.
        dtype: a key of ``DTYPES``.
        device: where it runs.
        max_positions: positions it will be asked for.
        weights: how weights of a quantised model are kept.
        adapter: folder of a LoRA adapter to merge into the weights.

    Raises:
        ModelError: the model has no weights that can be loaded, needs remote code, or its configuration is not
            supported; or the adapter does not fit it.
    """
    logging.disable_progress_bar()
    config = read_config(path)
    check_supported(config, max_positions)
    weights = check_weights(path, config, weights=weights, device=device, adapter=adapter)
    if gguf_metadata.is_gguf(path):
        model = _load_gguf(path, config, dtype=dtype, device=device, weights=weights)
    else:
        model = _load_folder(path, config, dtype=dtype, device=device, weights=weights)
    if adapter is not None:
        with _LOADING:
            model = adapters.merge_adapter(model, adapters.adapter_folder(adapter))
    return model.to(device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]


def _load_folder(
    folder: Path, config: PretrainedConfig, *, dtype: str, device: str, weights: Weights
) -> PreTrainedModel:
    found = quantised.find_quantisation(folder, config)
    packed = quantised.stays_packed(folder, found, weights=weights, device=device)
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder, "config": config}
    if found is not None and not packed:
        source = quantised.loading_arguments(folder, config, found, DTYPES[dtype])
    # With accelerate, weights go directly to the device, shard by shard; otherwise through host memory to a GPU. Some
    # quantised weights would go to any GPU there is.
    placed = torch.device(device).type == "cuda" or found is not None
    if placed and "state_dict" not in source and importlib.util.find_spec("accelerate") is not None:
        source["device_map"] = {"": device}
    with Naming(folder, "cannot be loaded"), _LOADING:
        kind: Any = AutoModelForCausalLM
        if "state_dict" in source:  # which that class does not take
            with torch.device("meta"):
                kind = type(AutoModelForCausalLM.from_config(source["config"]))
        model, report = kind.from_pretrained(
            **source,
            dtype=DTYPES[dtype],
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
        if found is not None and not packed:
            quantised.dequantise(model, found, DTYPES[dtype])
    check_complete(folder, report["missing_keys"], report["mismatched_keys"])
    return model


def _load_gguf(path: Path, config: PretrainedConfig, *, dtype: str, device: str, weights: Weights) -> PreTrainedModel:
    from . import gguf_weights

    header = read_header(path)
    packs = gguf_weights.packs(header, weights=weights, dtype=dtype, device=device)
    built = packs and operators.blocks_available()
    if weights == "packed" and not built:
        raise ModelError(f"{path}: the operators for packed weights cannot be built; set weights to auto")
    with _LOADING:
        if built:
            return gguf_weights.load_packed(header, config)
        return gguf_weights.load_dequantised(header, config, DTYPES[dtype])


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"no model folder {folder}; give a local folder (hubs are not downloaded from)")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; give the folder of a transformers model")


def read_header(path: Path) -> GgufFile:
    """Returns the header of a GGUF file. Raises: ModelError: a package is missing, or the file is damaged."""
    gguf_metadata.check_packages(path)
    return GgufFile.read(path)


def read_config(folder: Path) -> PretrainedConfig:
    """Returns the configuration of a model folder or a GGUF file.

    Raises:
        ModelError: this engine does not load models from there.
    """
    if gguf_metadata.is_gguf(folder):
        return gguf_metadata.read_config(folder)
    _check_folder(folder)
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: config.json cannot be read ({first_line(error)})") from error
    if "auto_map" in raw:
        raise ModelError(f"{folder}: config.json needs its own code (auto_map); remote code is refused")
    if (folder / adapters.CONFIG).is_file():
        raise ModelError(
            f"{folder} has an adapter beside its model, which transformers may load unasked; move {adapters.CONFIG} "
            "and its weights to a folder, and name that in the key adapter"
        )
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has no *.safetensors; only safetensors weights are loaded")
    with Naming(folder, "unknown architecture"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    quantised.find_quantisation(folder, config)
    return config


def check_weights(
    path: Path, config: PretrainedConfig, *, weights: Weights, device: str, adapter: str | None
) -> Weights:
    """Returns how a model's weights are to be kept: dequantised if an adapter is merged into them. Reads no weights.

    Args:
        path: of a model folder or a GGUF file.
        config: as ``read_config`` returns it.
        weights: how the configuration says they are kept.
        device: where the model runs.
        adapter: folder of an adapter, or None.

    Raises:
        ModelError: a folder's weights cannot stay packed, or the adapter cannot be merged.
    """
    if not gguf_metadata.is_gguf(path):
        found = quantised.find_quantisation(path, config)
        quantised.stays_packed(path, found, weights=weights, device=device)
    if adapter is None:
        return weights
    adapters.check_adapter(adapters.adapter_folder(adapter), config)
    if weights == "packed":
        raise ModelError(f"{path}: an adapter cannot be merged into packed weights; set weights to auto or dequantised")
    return "dequantised"


def count_parameters(config: PretrainedConfig) -> int:
    """Returns the parameters of a model, tied ones once. A quantised folder's tensors do not tell."""
    with torch.device("meta"), Naming(Path(config.name_or_path or "."), "unknown architecture"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(weight.numel() for weight in model.parameters())


def lay_out_for_cpu(model: PreTrainedModel) -> None:
    """Stores every linear weight of a float32 model input-major.

    CPU libraries are slowest at the product of a few rows with an output-major weight: eight rows take up to
    three times as long as one, against 1.2 times input-major (in bfloat16 there is no difference). ``weight``
    keeps its shape; only its strides change.
    """
    done: set[int] = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in done:
            done.add(id(module.weight))
            module.weight.data = module.weight.data.t().contiguous().t()
