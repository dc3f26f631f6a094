"""A census of transformers' causal language models: a tiny random model of every type, decoded by this engine.

``examine`` answers for one type: its tokens equal those of a loop over the model's own full forward without a cache,
with every method, or the engine refuses the type by name. Nothing else may happen.
``write_table`` writes what was found into a page.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...decoding.text.prefix import common_prefix
from ...engine.llm import LLM
from ...errors import SSDError, UsageError, first_line
from ...pipeline.runtime.launch import Pipeline
from ...pipeline.runtime.plan import Plan
from ...request.methods import ServedMethod
from ...request.sampling_params import SamplingParams
from .census_sizes import COMMON, OWN
from .tiny import tiny_tokenizer

VOCABULARY = 160
PROMPTS = (3, 21, 34)
"""Lengths of the prompts, in tokens: all but the first are longer than every window."""
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
MARKS = "<!-- census -->", "<!-- end of census -->"
"""Stand around the table of a page."""
Outcome = Literal["equal", "refused", "different", "failed", "not built"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What happened to one model type."""

    model_type: str
    outcome: Outcome
    why: str = ""
    skips: bool = True
    """Whether it drafts for itself with layers left out, if it is equal."""


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
    stranger = tiny_causal(model_type, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("target", target), ("draft", draft), ("stranger", stranger)):
            _save(model, model_type, Path(folder, name))
            tiny_tokenizer(VOCABULARY).save_pretrained(Path(folder, name))
        try:
            why, skips = _differences(Path(folder), prompts, expected, launch)
        except SSDError as error:
            refused = isinstance(error, UsageError)
            return Finding(model_type=model_type, outcome="refused" if refused else "failed", why=first_line(error))
        except ANY as error:
            return Finding(model_type=model_type, outcome="failed", why=f"{type(error).__name__}: {first_line(error)}")
    return Finding(model_type=model_type, outcome="different" if why else "equal", why=why, skips=skips)


def _save(model: PreTrainedModel, model_type: str, folder: Path) -> None:
    """Saves a model as its checkpoints are: with the whole configuration, where the model is a part of another."""
    model.save_pretrained(folder)
    if model.config.model_type != model_type:
        _config(model_type).save_pretrained(folder)


def _differences(
    folder: Path, prompts: list[list[int]], expected: list[list[int]], launch: Callable[[Plan], Pipeline]
) -> tuple[str, bool]:
    """Returns which method's tokens are wrong, empty if none are, and whether the model drafts for itself."""
    hot: dict[float, list[list[int]]] = {0.0: expected}
    found = list[str]()

    def decode(llm: LLM, methods: Iterable[ServedMethod], name: str) -> None:
        for method in methods:
            for temperature in (0.0, 1.0):
                params = SamplingParams(
                    max_tokens=NEW_TOKENS, ignore_eos=True, temperature=temperature, seed=3, method=method
                )
                tokens = [list(output.token_ids) for output in llm.generate(prompts, params)]
                wanted = hot.setdefault(temperature, tokens)
                if tokens != wanted:
                    at = [common_prefix(*pair) for pair in zip(tokens, wanted, strict=True)]
                    found.append(f"{method} ({name}) at T = {temperature:g}: equal up to tokens {at} of {NEW_TOKENS}")

    near = {"lookahead": 3, "siblings": 1, "forecast": {"budget": 8}}
    methods: tuple[ServedMethod, ...] = ("none", "sd", "self", "ssd")
    try:
        llm = LLM(_settings(folder, "draft", {**near, "self": {}}), launch=launch)
    except UsageError:  # the model is not supported, or its layers cannot be left out
        methods = ("none", "sd", "ssd")
        llm = LLM(_settings(folder, "draft", near), launch=launch)
    with llm:
        decode(llm, methods, "near draft")
    # Candidates of a stranger are rejected many times in a row.
    far = {"lookahead": 8, "siblings": 0, "forecast": {"budget": 12}}
    with LLM(_settings(folder, "stranger", far), launch=launch) as llm:
        decode(llm, ("sd", "ssd"), "random draft")
    return "; ".join(found), "self" in methods


def _settings(folder: Path, draft: str, speculation: dict[str, Any]) -> dict[str, Any]:
    return {
        "target": {"model": str(folder / "target"), "compile": False},
        "draft": {"model": str(folder / draft), "compile": False},
        "speculation": {"method": "ssd", "governor": False, **speculation},
        "engine": {"max_batch": 3, "max_model_len": 64, "prefill_chunk": 8, "workers": "threads"},
    }


def append_finding(file: Path, finding: Finding) -> None:
    """Adds a finding to a file, as a line of JSON."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(dataclasses.asdict(finding)) + "\n")


def read_findings(file: Path | None) -> list[Finding]:
    """Returns the findings of a file; none without a file. The last one of a type counts."""
    lines = file.read_text(encoding="utf-8").splitlines() if file and file.exists() else []
    return list({one.model_type: one for one in (Finding(**json.loads(line)) for line in lines)}.values())


def write_table(page: Path, findings: Iterable[Finding]) -> None:
    """Replaces what stands between the marks of a page. Raises: ValueError: the page has no marks."""
    text = page.read_text(encoding="utf-8")
    before, first, rest = text.partition(MARKS[0])
    _, last, after = rest.partition(MARKS[1])
    if not last:
        raise ValueError(f"{page} has no {MARKS[0]} and {MARKS[1]}")
    page.write_text(f"{before}{first}\n{table(findings)}\n{last}{after}", encoding="utf-8")


def table(findings: Iterable[Finding]) -> str:
    """Returns the findings as Markdown: counts, the equal types, and the others with the reason."""
    every = sorted(findings, key=lambda one: one.model_type)
    equal = [one for one in every if one.outcome == "equal"]
    names = {"not built": "not tried (no tiny model)", "refused": "refused"}
    others = [one for one in every if one.outcome != "equal"]
    lines = [
        f"transformers {transformers.__version__}: {len(equal)} of {len(every)} types are equal.",
        "",
        f"<details><summary>equal ({len(equal)})</summary>",
        "",
        ", ".join(f"`{one.model_type}`" for one in equal) + ".",
        "",
        "No `method: self`, since their layers cannot be left out: "
        + (", ".join(f"`{one.model_type}`" for one in equal if not one.skips) or "none")
        + ".",
        "",
        "</details>",
        "",
        f"<details><summary>others ({len(others)})</summary>",
        "",
        "| type | | why |",
        "|---|---|---|",
        *(f"| `{one.model_type}` | {names.get(one.outcome, one.outcome)} | {_reason(one)} |" for one in others),
        "",
        "</details>",
    ]
    return "\n".join(lines)


def _reason(finding: Finding) -> str:
    """Returns why, on one line of a table, without the model's name before it."""
    why = finding.why.removeprefix(f"{finding.model_type}: ").removesuffix("; not supported")
    return re.sub(r"/\S*/(target|draft|stranger)(: )?", "", why).replace("|", "\\|").replace("<", "&lt;")
