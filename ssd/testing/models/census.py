"""A census of transformers' causal language models: a tiny random model of every type, decoded by this engine.

``examine`` answers for one type: its tokens equal those of a loop over the model's own full forward without a cache,
with every method, or the engine refuses the type by name. Nothing else may happen.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...decoding.text.prefix import common_prefix
from ...engine.llm import LLM
from ...errors import SSDError, UsageError, first_line
from ...pipeline.runtime.launch import Pipeline
from ...pipeline.runtime.plan import Plan
from ...request.sampling_params import SamplingParams
from .census_sizes import COMMON, OWN
from .tiny import tiny_tokenizer

VOCABULARY = 160
PROMPTS = (3, 21)
"""Lengths of the prompts, in tokens: the second is longer than every window."""
NEW_TOKENS = 20
LARGEST = 20_000_000
"""Parameters of a tiny model."""
ANY = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What the code of one model type may raise."""
Outcome = Literal["equal", "refused", "different", "failed", "not built"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What happened to one model type."""

    model_type: str
    outcome: Outcome
    why: str = ""


def model_types() -> list[str]:
    """Returns all causal model types of the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_causal(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """Returns a tiny random model of a type. Raises: whatever its configuration or its code raises."""
    config = _config(model_type)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"its smallest configuration here has {size / 1e6:.0f} million parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.generation_config.eos_token_id = getattr(config.get_text_config(), "eos_token_id", None)
    return model.eval().requires_grad_(False)


def _config(model_type: str) -> Any:
    kind = CONFIG_MAPPING[model_type]
    return kind(**_sizes(kind, OWN.get(model_type, {})))


def _sizes(kind: type[Any], own: dict[str, Any]) -> dict[str, Any]:
    """Returns arguments of a configuration class: those of the common sizes that it knows, and a type's own."""
    known = {field.name for field in dataclasses.fields(kind)} | set(getattr(kind, "attribute_map", {}))
    values = {name: value for name, value in COMMON.items() if name in known}
    parts: dict[str, Any] = getattr(kind, "sub_configs", {})
    for name, part in parts.items():
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            values[name] = _sizes(part, {})
    return {**values, **own}


def reference(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Returns greedy tokens by the model's full forward, without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :VOCABULARY]
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def disturbed(model: PreTrainedModel, amount: float = 0.05) -> None:
    """Disturbs the weights in place: a draft that is right now and then."""
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.add_(torch.randn(weight.shape, generator=random).to(weight) * weight.std(), alpha=amount)


def examine(model_type: str, launch: Callable[[Plan], Pipeline]) -> Finding:
    """Decodes with a tiny model of a type. ``launch``: makes the pipeline."""
    try:
        target, draft = tiny_causal(model_type), tiny_causal(model_type)
        prompts = [torch.arange(5, 5 + length).mul(7).remainder(VOCABULARY).tolist() for length in PROMPTS]
        expected = [reference(target, prompt) for prompt in prompts]
    except ANY as error:
        return Finding(model_type=model_type, outcome="not built", why=f"{type(error).__name__}: {first_line(error)}")
    disturbed(draft)
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("target", target), ("draft", draft)):
            _save(model, model_type, Path(folder, name))
            tiny_tokenizer(VOCABULARY).save_pretrained(Path(folder, name))
        try:
            why = _differences(Path(folder), prompts, expected, launch)
        except SSDError as error:
            refused = isinstance(error, UsageError)
            return Finding(model_type=model_type, outcome="refused" if refused else "failed", why=first_line(error))
        except ANY as error:
            return Finding(model_type=model_type, outcome="failed", why=f"{type(error).__name__}: {first_line(error)}")
    return Finding(model_type=model_type, outcome="different" if why else "equal", why=why)


def _save(model: PreTrainedModel, model_type: str, folder: Path) -> None:
    """Saves a model as its checkpoints are: with the whole configuration, where the model is a part of another."""
    model.save_pretrained(folder)
    if model.config.model_type != model_type:
        _config(model_type).save_pretrained(folder)


def _differences(
    folder: Path, prompts: list[list[int]], expected: list[list[int]], launch: Callable[[Plan], Pipeline]
) -> str:
    """Returns which method's tokens are wrong; empty if none are."""
    config = {
        "target": {"model": str(folder / "target"), "compile": False},
        "draft": {"model": str(folder / "draft"), "compile": False},
        "speculation": {"method": "ssd", "lookahead": 3, "siblings": 1, "governor": False, "forecast": {"budget": 8}},
        "engine": {"max_batch": 2, "max_model_len": 64, "prefill_chunk": 8, "workers": "threads"},
    }
    found = []
    with LLM(config, launch=launch) as llm:
        hot: dict[str, Any] = {}
        for method in ("none", "sd", "ssd"):
            for temperature in (0.0, 1.0):
                params = SamplingParams(
                    max_tokens=NEW_TOKENS, ignore_eos=True, temperature=temperature, seed=3, method=method
                )
                tokens = [list(output.token_ids) for output in llm.generate(prompts, params)]
                wanted = expected if temperature == 0 else hot.setdefault("tokens", tokens)
                if tokens != wanted:
                    at = [common_prefix(*pair) for pair in zip(tokens, wanted, strict=True)]
                    found.append(f"{method} at T = {temperature:g}: equal up to tokens {at} of {NEW_TOKENS}")
    return "; ".join(found)


def take(types: Iterable[str], launch: Callable[[Plan], Pipeline]) -> list[Finding]:
    """Examines several types, one after the other."""
    return [examine(model_type, launch) for model_type in types]
