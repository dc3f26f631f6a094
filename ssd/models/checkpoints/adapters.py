"""LoRA adapters in ``peft``'s format: checked, and merged into a model's weights while it is loaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ModelError, first_line
from .naming import Naming
from .quantised import stored_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_UNMERGEABLE = {
    "layer_replication": "repeats layers",
    "alora_invocation_tokens": "acts from its invocation tokens on",
}
"""Settings of adapters that change more than weights, and what they do."""


def adapter_folder(name: str) -> Path:
    """Returns the folder of an adapter.

    Raises:
        ModelError: there is none, its weights are not safetensors, or it is not a LoRA for causal language models.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ModelError(f"no adapter folder {folder}; give a local folder (hubs are not downloaded from)")
    if not (folder / CONFIG).is_file():
        raise ModelError(f"adapter {folder} has no {CONFIG}; give the folder of a peft adapter")
    settings = _settings(folder)
    if (kind := settings.get("peft_type")) != "LORA":
        raise ModelError(f"adapter {folder} is of type {kind}; only LORA is supported")
    if (task := settings.get("task_type")) not in (None, "CAUSAL_LM"):
        raise ModelError(f"adapter {folder} is for the task {task}; only CAUSAL_LM is supported")
    for key, what in _UNMERGEABLE.items():
        if settings.get(key):
            raise ModelError(f"adapter {folder} {what} ({key}), so it cannot be merged")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"adapter {folder} has no {WEIGHTS}; only safetensors weights are loaded")
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"adapter {folder}: adapters need pip install peft")
    return folder


def check_adapter(folder: Path, config: PretrainedConfig) -> None:
    """Checks an adapter's weights against the model's configuration, from the headers of its files.

    Raises:
        ModelError: it resizes the vocabulary.
    """
    rows = config.get_text_config().vocab_size
    for name, tensor in stored_tensors(folder).items():
        layer = name.removesuffix(".weight").removesuffix(".base_layer").removesuffix(".modules_to_save")
        whole = name.endswith(".weight") and layer.endswith(("embed_tokens", "lm_head", "wte", "embed_in", "embed_out"))
        if whole and tensor.shape[0] != rows:
            raise ModelError(
                f"adapter {folder} resizes the vocabulary to {tensor.shape[0]} tokens, the model has {rows}; not "
                "supported: merge it with peft and save the result"
            )


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Returns the model with an adapter merged into its weights. The weights must be dequantised.

    Raises:
        ModelError: the adapter does not fit the model, or cannot be merged exactly.
    """
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    check_adapter(folder, model.config)
    tied = _tied(model)
    with Naming(folder, "the adapter does not fit the model"):
        config = peft.LoraConfig.from_pretrained(str(folder))
        config.inference_mode = True
        adapted = peft.PeftModelForCausalLM(model, config)  # pyright: ignore[reportArgumentType]
        try:
            report = adapted.load_adapter(str(folder), "default", torch_device=str(model.device))
        except RuntimeError as error:  # its first line only says that there are some
            first = (str(error).strip().splitlines()[1:] or [str(error)])[0]
            raise ModelError(f"{folder}: the adapter does not fit the model ({first.strip()})") from error
        if wrong := sorted({*report.missing_keys, *report.unexpected_keys}):
            raise ModelError(
                f"{folder}: the adapter does not fit the model: {'it lacks' if report.missing_keys else 'it has'} "
                f"{wrong[0]}"
            )
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if tied and any(isinstance(end, BaseTunerLayer) for end in ends):
            raise ModelError(f"{folder}: the adapter changes one of two tied embeddings; it cannot be merged")
        merged = adapted.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]
    return merged


def _tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"adapter {folder}: {CONFIG} cannot be read ({first_line(error)})") from error
    if not isinstance(settings, dict):
        raise ModelError(f"adapter {folder}: {CONFIG} must be an object")
    return settings
