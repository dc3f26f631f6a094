"""Loads stock transformers causal LMs from a local folder, and refuses models that would give wrong tokens."""

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
from .support import check_supported

if TYPE_CHECKING:  # fronts read configurations and tokenizers only, and this import takes two seconds
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# transformers sets torch's default dtype while it loads, for all threads of the process.
_LOADING = threading.Lock()


def load_tokenizer(folder: Path) -> Any:
    """Returns the tokenizer of a model folder.

    Raises:
        ModelError: the folder has none that transformers can load.
    """
    _check_folder(folder)
    with _Naming(folder, "no usable tokenizer"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_model(folder: Path, *, dtype: str, device: str, max_positions: int) -> PreTrainedModel:
    """Returns a causal LM for ``ForwardRunner``, in evaluation mode and without gradients.

    Args:
        folder: of a transformers model.
        dtype: a key of ``DTYPES``.
        device: where it runs.
        max_positions: positions it will be asked for.

    Raises:
        ModelError: the folder has no safetensors, needs remote code, or its configuration is not supported.
    """
    logging.disable_progress_bar()
    config = read_config(folder)
    check_supported(config, max_positions)
    # With accelerate, weights go directly to the GPU, shard by shard; otherwise through host memory.
    straight = torch.device(device).type == "cuda" and importlib.util.find_spec("accelerate") is not None
    with _Naming(folder, "cannot be loaded"), _LOADING:
        model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder,
            config=config,
            dtype=DTYPES[dtype],
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",
            output_loading_info=True,
            **({"device_map": {"": device}} if straight else {}),
        )
    # transformers would initialise them at random, so that every start gives other tokens.
    if absent := sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"]))):
        raise ModelError(f"{folder}: the weights lack {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}")
    return model.to(device).eval().requires_grad_(False)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"no model folder {folder}; give a local folder (hubs are not downloaded from)")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; give the folder of a transformers model")


def read_config(folder: Path) -> PretrainedConfig:
    """Returns a model folder's configuration.

    Raises:
        ModelError: this engine does not load models from such a folder.
    """
    _check_folder(folder)
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: config.json cannot be read ({first_line(error)})") from error
    if "auto_map" in raw:
        raise ModelError(f"{folder}: config.json needs its own code (auto_map); remote code is refused")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has no *.safetensors; only safetensors weights are loaded")
    with _Naming(folder, "unknown architecture"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


class _Naming:
    """Turns any error of transformers, tokenizers or safetensors into a ModelError. No list of types would do: some of
    theirs are bare ``Exception``."""

    def __init__(self, folder: Path, problem: str):
        self._folder, self._problem = folder, problem

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, ModelError):
            raise ModelError(f"{self._folder}: {self._problem} ({first_line(error)})") from error


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
