"""The configuration: one YAML file per target–draft pairing, every field checked.

Shipped configurations are called by their bare name (``embedded``); everything else is a path.
Model names work the same way: ``embedded/target`` and ``embedded/draft`` come with the package,
everything else is a local folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from ..errors import ConfigError, ModelError
from .speculation import Number, Section, SpeculationConfig, check_rule
from .words import describe, first_line, given

PACKAGE = Path(__file__).resolve().parents[1]
CONFIG_FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")
"""Where shipped configurations lie: in an installed package, and in a checkout."""
MODEL_FOLDER = PACKAGE / "data"
SHIPPED_MODELS = ("embedded/target", "embedded/draft")


class ModelConfig(Section):
    """One model and where its worker runs."""

    model: str = Field(min_length=1)
    """``embedded/target``, ``embedded/draft`` or a local folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = Field(default="cpu", min_length=1)
    cores: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    """CPU cores the worker is pinned to; none leaves it to the system."""
    compile: Literal["auto"] | bool = "auto"
    graphs: Literal["auto"] | bool = "auto"
    """CUDA graphs of the forwards; ``auto``: on a GPU."""
    attention: Literal["auto", "rows", "tree"] = "auto"
    """``rows``: masked, on any device; ``tree``: Triton kernels; ``auto``: those, on a GPU."""
    priority: Literal["normal", "high"] = "normal"
    """Of the worker's CUDA stream, where draft and target share a GPU."""

    @field_validator("device")
    @classmethod
    def _numbered(cls, device: str) -> str:
        """One name for each GPU: ``cuda`` is ``cuda:0``."""
        kind, _, index = device.partition(":")
        return f"cuda:{int(index or 0)}" if kind == "cuda" and (index.isdecimal() or not index) else device


class TargetConfig(ModelConfig):
    """The target, and how many ranks share it."""

    tensor_parallel: int = Field(default=1, ge=1, le=64)
    """Ranks the model is divided among, by transformers' plan. Each takes its share of ``cores``
    (all of them if they are fewer), and the next GPU from ``device`` on."""


class DraftConfig(ModelConfig):
    """The draft, and how many devices speculate side by side."""

    data_parallel: int = Field(default=1, ge=1, le=16)
    """Ranks that hold the whole draft each and prepare for ``speculation.forecast.budget`` outcomes of their own.
    ``cores`` and GPUs are shared out as those of ``target.tensor_parallel``."""


class EngineConfig(Section):
    """Sizes and deadlines."""

    max_batch: int = Field(default=1, ge=1, le=256)
    max_model_len: int = Field(default=1024, ge=16)
    """Prompt and generated tokens together."""
    prefill_chunk: int = Field(default=64, ge=8, le=2048)  # prompt tokens computed between two rounds
    prefix_caching: bool = True  # reuse keys and values that an earlier prompt left
    scheduling: Literal["fair", "priority"] = "fair"  # who is next: clients in turn, or the lowest ``priority`` first
    workers: Literal["auto", "processes", "threads"] = "auto"
    """``threads``: draft and target in one process, on two streams; ``auto``: where they share a GPU."""
    link: Literal["auto", "shared", "gloo", "nccl", "host"] = "auto"
    """Between draft and verifier. ``auto``: shared memory on one machine; between machines gloo for
    CPUs, ``host`` (ZMQ) for GPUs."""
    link_timeout_s: Number = Field(default=60.0, gt=0)
    start_timeout_s: Number = Field(default=600.0, gt=0)
    draft_restarts: int = Field(default=3, ge=0, le=100)  # tries in a row to bring a lost draft back
    draft_restart_delay_s: Number = Field(default=1.0, gt=0)  # before the first; each further one takes twice that


class ServerConfig(Section):
    """``ssd serve``: where it listens, whom it lets in, and how much at once."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to bind. Off loopback an API key is required."""
    port: int = Field(default=8000, ge=0, le=65535)  # 0 takes a free one
    model_name: str | None = Field(default=None, min_length=1)
    """What clients call the model; by default the target's name."""
    api_key_file: str | None = Field(default=None, min_length=1)  # one key a line; clients send it as a bearer token
    chat_template: str | None = Field(default=None, min_length=1)
    """A Jinja file for models whose tokenizer has no chat template."""
    allowed_hosts: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Host names, beside the bound address, by which browsers and clients may call."""
    allowed_origins: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Web origins, beside the server's own, whose pages may call."""
    max_body_bytes: int = Field(default=2**20, ge=1024, le=2**28)
    max_queue: int = Field(default=256, ge=0)
    """Requests that wait for a slot; beyond, clients get 429."""
    max_tokens_in_flight: int = Field(default=2**18, ge=16)
    """Prompt and answer tokens of all requests, waiting or running; beyond, clients get 429."""
    shadow_rate: Number = Field(default=0.0, ge=0, le=1)  # share of finished requests decoded again plainly
    lane: str | None = Field(default=None, min_length=1)
    """Where ``ssd.Client`` connects: ``ipc://PATH``, or ``tcp://HOST:PORT`` with keys. None: nowhere."""
    lane_keys: str | None = Field(default=None, min_length=1)
    """Folder of CURVE keys for a tcp lane, made by ``ssd lane-keys``."""


class Config(Section):
    """A target–draft pairing and how to run it."""

    target: TargetConfig
    draft: DraftConfig | None = None
    """Needed unless ``speculation.method`` is ``none`` or ``self``."""
    speculation: SpeculationConfig = SpeculationConfig()
    numerics: Literal["strict", "fast"] = "strict"
    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()

    @property
    def roles(self) -> tuple[str, ...]:
        """Of all workers: ``verifier``, its other ranks ``verifier-1``.., then ``draft``, ``draft-1``.."""
        return (*_ranks("verifier", self.target.tensor_parallel), *self.draft_roles)

    @property
    def draft_roles(self) -> tuple[str, ...]:
        return () if self.draft is None else _ranks("draft", self.draft.data_parallel)

    def for_role(self, role: str) -> Config:
        """As a worker reads it: a rank finds its own cores and device."""
        rank, changed = rank_of(role), {}
        if section_of(role) == "target":
            changed["target"] = _share(self.target, rank, self.target.tensor_parallel)
        elif self.draft is not None:
            changed["draft"] = _share(self.draft, rank, self.draft.data_parallel)
        return self.model_copy(update=changed)


def rank_of(role: str) -> int:
    """Among the ranks of the verifier, or those of the draft."""
    return int(role.partition("-")[2] or 0)


def section_of(role: str) -> Literal["target", "draft"]:
    """Which section of the configuration says how the role's worker runs."""
    return "draft" if role.partition("-")[0] == "draft" else "target"


def _ranks(first: str, count: int) -> tuple[str, ...]:
    return (first, *(f"{first}-{rank}" for rank in range(1, count)))


def _share(model: ModelConfig, rank: int, ranks: int) -> ModelConfig:
    if ranks == 1:
        return model
    changed: dict[str, Any] = {}
    if model.cores is not None:
        changed["cores"] = model.cores[rank::ranks] or model.cores
    kind, _, index = model.device.partition(":")
    if kind == "cuda":
        changed["device"] = f"cuda:{int(index or 0) + rank}"
    return model.model_copy(update=changed)


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    Args:
        source: a shipped configuration's name, the path of a YAML file, a mapping, or a Config.
        overrides: ``a.b=c``, applied in order; the values are YAML.

    Raises:
        ConfigError: in one line, what is wrong and what would be right.
    """
    where = ""
    if isinstance(source, Config):
        tree = source.model_dump()
    elif isinstance(source, Mapping):
        tree = _plain(source)
    else:
        path = config_path(source)
        tree = _read_yaml(path)
        where = f"{path}: "
    _refuse_unknown_keys(tree, where)
    for override in overrides:
        _override(tree, override)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(where + _one_line(error, tree)) from None
    if config.draft is None and config.speculation.method in ("sd", "ssd"):
        raise ConfigError(
            f"{where}draft is missing; speculation.method={config.speculation.method} needs a draft model "
            "(or set speculation.method=none, or self)"
        )
    check_rule(config.speculation, where)
    if config.draft is not None and config.draft.data_parallel > 1 and config.speculation.anytime:
        raise ConfigError(
            f"{where}speculation.anytime ends the tree of one draft; set draft.data_parallel=1 or anytime=false"
        )
    if config.draft is not None and config.draft.data_parallel > 1 and config.speculation.forecast.shape == "measured":
        raise ConfigError(
            f"{where}draft.data_parallel={config.draft.data_parallel} needs a forecast that all ranks make alike; set "
            "speculation.forecast.shape=confidence (measured learns from sets that only the first rank sees whole)"
        )
    return config


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted({path.stem for folder in CONFIG_FOLDERS for path in folder.glob("*.yaml")})


def config_path(source: str | Path) -> Path:
    """The file behind a shipped name or a path.

    A name without folder or suffix is a shipped configuration, wherever the caller stands.

    Raises:
        ConfigError: there is no such file.
    """
    text = str(source)
    path = Path(text).expanduser()
    if text and path.name == text and not path.suffix:
        for folder in CONFIG_FOLDERS:
            shipped = folder / f"{text}.yaml"
            if shipped.is_file():
                return shipped
    elif path.is_file():
        return path
    known = ", ".join(shipped_configs()) or "none"
    what = "is a folder" if text and path.is_dir() else "not found"
    raise ConfigError(
        f"configuration {text!r} {what}; give the path of a YAML file, or the name of a shipped one: {known}"
    )


def resolve_model_path(name: str) -> Path:
    """The folder of a model: a shipped one by its name, otherwise a local folder.

    Raises:
        ModelError: there is no model there.
    """
    shipped = name in SHIPPED_MODELS
    folder = MODEL_FOLDER / name if shipped else Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if shipped:
        raise ModelError(
            f"model {name!r}: its weights are missing from this installation ({folder}); "
            "reinstall the package, or train them with scripts/train_pair.py"
        )
    if folder.is_dir():
        raise ModelError(f"model {name!r}: the folder has no config.json; give the folder of a transformers model")
    raise ModelError(
        f"model {name!r} is not a folder on this machine (hub ids are not downloaded); "
        f"give a local folder with config.json and *.safetensors, or one of {', '.join(SHIPPED_MODELS)}"
    )


def _plain(mapping: Mapping[Any, Any]) -> dict[str, Any]:
    """A deep copy whose keys are strings and whose sections are dicts."""
    return {
        str(key): value.model_dump()
        if isinstance(value, BaseModel)
        else _plain(value)
        if isinstance(value, Mapping)
        else value
        for key, value in mapping.items()
    }


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {first_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping with the keys {', '.join(Config.model_fields)}")
    return _plain(tree)


def _override(tree: dict[str, Any], override: str) -> None:
    """Apply ``a.b=c`` in place."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not dotted:
        raise ConfigError(f"override {override!r} must look like key=value, for example speculation.lookahead=6")
    if dotted not in _keys():
        raise ConfigError(_unknown(dotted))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: not a YAML value: {first_line(error)}") from None
    *sections, last = dotted.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    value = _plain(value) if isinstance(value, dict) else value
    tree[last] = value
    if isinstance(value, dict):
        _refuse_unknown_keys(value, "", f"{dotted}.")


@cache
def _keys() -> dict[str, dict[str, Any]]:
    """Every dotted key, and the JSON schema of its value."""
    schema = Config.model_json_schema()
    keys: dict[str, dict[str, Any]] = {}

    def resolve(part: dict[str, Any]) -> dict[str, Any]:
        return schema["$defs"][part["$ref"].rsplit("/", 1)[1]] if "$ref" in part else part

    def walk(section: dict[str, Any], prefix: str) -> None:
        for name, part in section["properties"].items():
            options = [resolve(option) for option in part.get("anyOf", [part])]
            keys[prefix + name] = {"options": options}
            for option in options:
                if "properties" in option:
                    walk(option, f"{prefix}{name}.")

    walk(schema, "")
    return keys


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")


def _refuse_unknown_keys(tree: Mapping[str, Any], where: str, prefix: str = "") -> None:
    for dotted in _flat(tree, prefix):
        # A mapping given for a plain value is a wrong value, not an unknown key.
        if dotted not in _keys() and _is_section(dotted.rpartition(".")[0]):
            raise ConfigError(where + _unknown(dotted))


def _is_section(dotted: str) -> bool:
    return dotted == "" or any(key.startswith(f"{dotted}.") for key in _keys())


def _unknown(dotted: str) -> str:
    return f"unknown key {dotted} (nearest: {_nearest(dotted)})"


def _nearest(dotted: str) -> str:
    """The valid key most like ``dotted``, by the whole and by its last part."""

    def likeness(key: str) -> float:
        whole = SequenceMatcher(None, dotted, key).ratio()
        last = SequenceMatcher(None, dotted.rpartition(".")[2], key.rpartition(".")[2]).ratio()
        return whole + last

    return max(_keys(), key=likeness)


def _one_line(error: ValidationError, tree: Mapping[str, Any]) -> str:
    """All problems of a validation, each as dotted key, what was given, what is allowed."""
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False):
        loc = [str(part) for part in item["loc"]]
        # Pydantic adds union members and list positions after the key.
        dotted = next((key for n in range(len(loc), 0, -1) if (key := ".".join(loc[:n])) in _keys()), ".".join(loc))
        allowed = _allowed(dotted)
        if item["type"] == "missing":
            problems.setdefault(dotted, f"{dotted} is missing; it must be {allowed}")
        else:
            problems.setdefault(dotted, f"{dotted} must be {allowed}, not {given(tree, dotted)}")
    return "; ".join(problems.values())


def _allowed(dotted: str) -> str:
    return " or ".join(describe(option) for option in _keys()[dotted]["options"])
