"""Loads the weights of a GGUF file: dequantised by transformers, or packed for the CPU operators.

Packed, a model is made without weights, and the file's tensors are read one after the other. Those of linear layers
and embeddings keep their blocks; all others are dequantised. transformers' own processing of a tensor decides what it
is: where it only moves rows of a weight (Llama's queries and keys), the rows of blocks are moved alike; where it does
anything else, the weight is dequantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ...errors import ModelError
from ..cpu import operators
from ..cpu.blocks_linear import TYPES, Blocks, BlocksEmbedding, BlocksLinear, packed_size
from .gguf_file import GgufFile, Stored
from .naming import Naming, check_complete

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = Literal["auto", "packed", "dequantised"]
"""How weights are kept. ``auto``: packed where that is possible."""
ALIGNED = 64
"""Bytes of a cache line."""
ROTARY, ROTARY_LONG = "rope_freqs.weight", "rope_factors_long.weight"
_OPERATORS = {number: name for name, number in TYPES.items()}
_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}


def packs(header: GgufFile, *, weights: Weights, dtype: str, device: str) -> bool:
    """Returns whether a file's weights stay packed.

    That needs float32 on a CPU, a C++ compiler, blocks that the operators multiply, and an architecture whose tensors
    transformers processes one by one.

    Raises:
        ModelError: ``weights`` is ``packed`` and they cannot stay so.
    """
    possible = (
        dtype == "float32"
        and torch.device(device).type == "cpu"
        and operators.compiler() is not None
        and any(tensor.type in _OPERATORS for tensor in header.tensors.values())
        and _processors(header.architecture) is not None
    )
    if weights == "packed" and not possible:
        raise ModelError(
            f"{header.path}: the weights cannot stay packed: that needs dtype float32, a CPU, a C++ compiler and an "
            "architecture and quantisation that the operators cover; set weights to auto or dequantised"
        )
    return possible and weights != "dequantised"


def load_dequantised(header: GgufFile, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the model as transformers loads it, on the CPU.

    Raises:
        ModelError: transformers does not load this architecture, or weights are missing.
    """
    path = header.path
    with Naming(path, "cannot be loaded"):
        model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            path.parent,
            gguf_file=path.name,
            config=config,
            **_dequantise(),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="eager",
            output_loading_info=True,
        )
    check_complete(path, report["missing_keys"], report["mismatched_keys"])
    return model


def _dequantise() -> dict[str, Any]:
    """Returns the argument by which transformers dequantises; releases before ``GgufConfig`` always do."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def load_packed(header: GgufFile, config: PretrainedConfig) -> PreTrainedModel:
    """Returns the model in float32, with the weights of linear layers and embeddings in the file's blocks.

    Raises:
        ModelError: the file lacks weights, or has some of another shape than the configuration says.
    """
    from transformers.initialization import no_init_weights

    with Naming(header.path, "cannot be loaded"):
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        _Packing(header, model).load()
    return model


def scale_rotary(header: GgufFile, model: PreTrainedModel) -> None:
    """Divides the model's rotary frequencies by the file's factors (Llama 3.1 and later), in place.

    The header has no key for this scaling, only a tensor, which transformers 5.24 does not read.

    Raises:
        ModelError: the factors are of a kind that depends on the length of the text, or do not fit the model.
    """
    if ROTARY_LONG in header.tensors:
        raise ModelError(f"{header.path}: {ROTARY_LONG} (rotary factors that depend on the length) is not supported")
    stored = header.tensors.get(ROTARY)
    if stored is None or model.config.get_text_config().rope_parameters.get("rope_type", "default") != "default":
        return
    factors = torch.from_numpy(np.array(header.data(stored))).view(_FLOATS[stored.type]).float()
    modules: list[Any] = [one for one in model.modules() if isinstance(getattr(one, "inv_freq", None), Tensor)]
    if not modules or any(module.inv_freq.shape != factors.shape for module in modules):
        raise ModelError(f"{header.path}: {ROTARY} does not fit the model's rotary embeddings")
    for module in modules:
        module.inv_freq = module.inv_freq / factors.to(module.inv_freq.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weight:
    """A tensor of the file, and the parameter it becomes.

    Attributes:
        stored: the tensor.
        name: of the parameter.
        rows: where each of the parameter's rows stands in the file; None if the file has them in order.
    """

    stored: Stored
    name: str
    rows: Tensor | None


class _Packing:
    def __init__(self, header: GgufFile, model: PreTrainedModel):
        self._header, self._model = header, model
        self._parameters = dict(model.named_parameters())
        kind = _processors(header.architecture)
        assert kind is not None
        self._parsed: dict[str, Any] = {"config": model.config.to_dict(), "tensors": {}}
        self._processor = kind(config=self._parsed["config"])
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        self._names: Mapping[str, str] = get_gguf_hf_weights_map(model, self._processor)
        self._loaded: set[str] = set()

    @torch.no_grad()
    def load(self) -> None:
        """Fills the model. Raises: ModelError."""
        packed, others = [], []
        for stored in self._header.tensors.values():
            weight = self._packable(stored)
            packed.append(weight) if weight is not None else others.append(stored)
        self._pack(packed)
        for stored in others:
            self._fill(stored)
        for name, value in self._parsed["tensors"].items():  # those that the processor assembles from several
            self._set(name, np.asarray(value))
        self._tie()
        check_complete(self._header.path, self._parameters.keys() - self._loaded)

    def _packable(self, stored: Stored) -> _Weight | None:
        name = self._names.get(stored.name)
        if name is None or stored.type not in _OPERATORS or len(stored.shape) != 2:
            return None
        module = self._model.get_submodule(name.rpartition(".")[0])
        known = type(module) in (nn.Linear, nn.Embedding) or _scale(module) is not None
        if not known or not name.endswith(".weight") or tuple(self._parameters[name].shape) != stored.shape:
            return None
        moved = self._moved_rows(stored)
        if moved is None:
            return None
        in_order = torch.equal(moved, torch.arange(len(moved)))
        return _Weight(stored=stored, name=name, rows=None if in_order else moved)

    def _moved_rows(self, stored: Stored) -> Tensor | None:
        """Returns where the processed tensor's rows stand in the file; None if processing does more than move rows."""
        before = np.arange(stored.shape[0] * 2, dtype=np.int32).reshape(-1, 2)
        parsed: dict[str, Any] = {"config": self._parsed["config"], "tensors": {}}
        try:
            after = self._processor.process(
                weights=before.copy(), name=stored.name, tensor_key_mapping=dict(self._names), parsed_parameters=parsed
            )
        except (ValueError, IndexError, KeyError, TypeError):
            return None
        values = after.weights
        if parsed["tensors"] or after.name != stored.name or getattr(values, "shape", None) != before.shape:
            return None
        rows = values[:, 0] // 2
        whole = np.array_equal(values, np.stack([rows * 2, rows * 2 + 1], axis=1))
        return torch.from_numpy(rows.astype(np.int64)) if whole and len({*rows.tolist()}) == len(rows) else None

    def _pack(self, weights: list[_Weight]) -> None:
        # One block of memory in large pages; pages that are never written take no memory.
        sizes = [packed_size(one.stored.type, *one.stored.shape) for one in weights]
        memory = torch.ops.ssd.reserve(sum(-(-size // ALIGNED) * ALIGNED for size in sizes))
        for weight, size in zip(weights, sizes, strict=True):
            stored = weight.stored
            rows = torch.from_numpy(np.array(self._header.data(stored))).view(stored.shape[0], -1)
            if weight.rows is not None:
                rows = rows[weight.rows]
            blocks = Blocks.of(rows, type=stored.type, depth=stored.shape[1], memory=memory[:size])
            memory = memory[-(-size // ALIGNED) * ALIGNED :]
            self._replace(weight.name, blocks)

    def _replace(self, parameter: str, blocks: Blocks) -> None:
        name = parameter.rpartition(".")[0]
        module = self._model.get_submodule(name)
        if isinstance(module, nn.Linear):
            packed = BlocksLinear(blocks, module.bias)
        else:
            packed = BlocksEmbedding(blocks, _scale(module))
        self._model.set_submodule(name, packed)
        self._loaded.add(parameter)

    def _fill(self, stored: Stored) -> None:
        result = self._processor.process(
            weights=self._dequantised(stored),
            name=stored.name,
            tensor_key_mapping=self._names,
            parsed_parameters=self._parsed,
        )
        if (name := self._names.get(result.name)) is not None:
            self._set(name, result.weights)

    def _dequantised(self, stored: Stored) -> np.ndarray:
        from gguf import GGMLQuantizationType, dequantize

        data = np.array(self._header.data(stored))
        if (kind := _FLOATS.get(stored.type)) is not None:
            values = torch.from_numpy(data).view(kind).view(stored.shape).float().numpy()
        else:
            values = dequantize(data.reshape(*stored.shape[:-1], -1), GGMLQuantizationType(stored.type))
        return values

    def _set(self, name: str, values: np.ndarray) -> None:
        parameter = self._parameters.get(name)
        if parameter is None:
            return
        if tuple(values.shape) != tuple(parameter.shape):
            raise ModelError(
                f"{self._header.path}: {name} has shape {tuple(values.shape)}, not {tuple(parameter.shape)} as the "
                "configuration says"
            )
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))
        self._loaded.add(name)

    def _tie(self) -> None:
        """Gives an output head that the file does not have the weights of the embedding."""
        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        name = next((name for name, module in self._model.named_modules() if module is head), None)
        if name is None or type(head) is not nn.Linear or f"{name}.weight" in self._loaded:
            return
        if isinstance(embedding, BlocksEmbedding):
            self._replace(f"{name}.weight", embedding.blocks)
        elif isinstance(embedding, nn.Embedding):
            head.weight = embedding.weight
            self._loaded.add(f"{name}.weight")


def _scale(module: nn.Module) -> Tensor | None:
    """Returns what an embedding multiplies its rows by (Gemma), or None."""
    scale = getattr(module, "embed_scale", None)
    scales = type(module).__name__.endswith("ScaledWordEmbedding") and isinstance(scale, Tensor)
    return scale if scales else None


def _processors(architecture: str) -> Any:
    """Returns transformers' class that processes tensors of an architecture; None where it has another way."""
    try:
        from transformers.modeling_gguf_pytorch_utils import (
            GGUF_SUPPORTED_ARCHITECTURES,
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,  # noqa: F401
        )
    except ImportError:
        return None
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        return None
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)
