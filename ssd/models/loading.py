"""Loading stock transformers causal LMs from a local folder, and refusing what cannot work."""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging

from ..errors import ModelError, first_line

if TYPE_CHECKING:  # fronts read configurations and tokenizers only; importing it takes two seconds
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# transformers sets torch's default dtype while it loads, for all threads of the process.
_LOADING = threading.Lock()
_RECURRENT = ("ssm", "mamba", "rwkv", "recurrent", "linear_attention", "conv")


def load_tokenizer(folder: Path) -> Any:
    """Raises: ModelError if the folder has none that transformers can load."""
    _check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}: no usable tokenizer ({first_line(error)})") from error


def load_model(folder: Path, *, dtype: str, device: str, max_positions: int) -> PreTrainedModel:
    """A causal LM ready for ``ForwardRunner``.

    Args:
        max_positions: positions it will be asked for.

    Raises:
        ModelError: not a local folder with safetensors, needs remote code, or has layers that
            row attention over a slot cache would compute wrongly.
    """
    logging.disable_progress_bar()
    config = read_config(folder)
    check_supported(config, max_positions)
    # Straight to the GPU, shard by shard, where accelerate is installed; otherwise through host memory.
    straight = torch.device(device).type == "cuda" and importlib.util.find_spec("accelerate") is not None
    try:
        with _LOADING:
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
    except Exception as error:
        raise ModelError(f"{folder}: cannot be loaded ({first_line(error)})") from error
    # transformers would draw them at random: other tokens at every start.
    if absent := sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"]))):
        raise ModelError(f"{folder}: the weights lack {', '.join(absent[:3])}{', ..' if len(absent) > 3 else ''}")
    if getattr(model, "_is_stateful", False):
        raise ModelError(f"{folder}: {type(model).__name__} keeps a state that cannot be rolled back; not supported")
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(f"{folder}: {type(model).__name__} does not accept an attention function from outside")
    return model.to(device).eval().requires_grad_(False)


def check_supported(config: PretrainedConfig, max_positions: int) -> None:
    """Refuse what would give wrong tokens.

    Raises:
        ModelError: recurrent or convolutional layers (their state cannot be rolled back),
            encoder–decoders, a sliding window shorter than the context (its slots cannot be
            masked yet), or fewer positions than asked for.
    """
    text = config.get_text_config()
    kind = text.model_type
    layers = set(getattr(text, "layer_types", None) or ())
    foreign = {layer for layer in layers if layer not in ("full_attention", "sliding_attention")}
    if foreign or any(word in kind for word in _RECURRENT):
        what = ", ".join(sorted(foreign)) or kind
        raise ModelError(f"{kind}: layers of kind {what} keep a state that cannot be rolled back; not supported")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind}: encoder-decoder models are not supported")
    window = getattr(text, "sliding_window", None)
    slides = "sliding_attention" in layers or (not layers and getattr(text, "use_sliding_window", True))
    if window is not None and slides and window < max_positions:
        raise ModelError(
            f"{kind}: attention slides over {window} tokens, shorter than engine.max_model_len allows; "
            f"set engine.max_model_len so that {max_positions} positions become at most {window}"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    moving = {p.get("rope_type") for p in (rope, *rope.values()) if isinstance(p, dict)} & {"dynamic", "longrope"}
    if moving:
        raise ModelError(f"{kind}: {moving.pop()} rotary embeddings change with the length of the text; not supported")
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and max_positions > positions:
        raise ModelError(f"{kind}: knows {positions} positions, {max_positions} are needed; lower engine.max_model_len")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"no model folder {folder}; give a local folder (hubs are not downloaded from)")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; give the folder of a transformers model")


def read_config(folder: Path) -> PretrainedConfig:
    """Raises: ModelError if the folder is not one this engine loads from."""
    _check_folder(folder)
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: config.json cannot be read ({first_line(error)})") from error
    if "auto_map" in raw:
        raise ModelError(f"{folder}: config.json asks for code of its own (auto_map); remote code is refused")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has no *.safetensors; only safetensors weights are loaded")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}: unknown architecture ({first_line(error)})") from error


def lay_out_for_cpu(model: PreTrainedModel) -> None:
    """Store every linear weight of an fp32 model input-major.

    The product of a few rows with an output-major weight is what CPU libraries do worst: with
    eight rows it takes up to three times the time of one row, input-major 1.2 times (in bf16
    there is no difference). ``weight`` keeps its shape; only its strides change.
    """
    done: set[int] = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in done:
            done.add(id(module.weight))
            module.weight.data = module.weight.data.t().contiguous().t()
