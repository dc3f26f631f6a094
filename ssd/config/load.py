"""Loading: a YAML file and its overrides become a checked configuration; names become paths.

A shipped configuration is named without folder and suffix (``embedded``); everything else is a path. Names of models:
``model_paths``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import ConfigError
from ..request.methods import WITH_DRAFT
from .model_paths import MODEL_FOLDER, resolve_model_path
from .sections import Config
from .speculation import check_rule
from .words import is_section, keys, problems_in, unknown, yaml_problem

__all__ = ["MODEL_FOLDER", "config_path", "load_config", "resolve_model_path", "shipped_configs"]

PACKAGE = Path(__file__).resolve().parents[1]
CONFIG_FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")
"""Folders of the shipped configurations: of an installed package, and of a checkout."""


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """Reads and checks a configuration.

    Args:
        source: a shipped configuration's name, the path of a YAML file, a mapping, or a Config.
        overrides: ``section.key=value`` in the order in which they apply; values are YAML.

    Raises:
        ConfigError: in one line, what is wrong and what is allowed.
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
        raise ConfigError(where + problems_in(error, tree)) from None
    _check_draft(config, where)
    check_rule(config.speculation, where)
    return config


def _check_draft(config: Config, where: str) -> None:
    """Raises ConfigError where the draft section does not fit the speculation section."""
    speculation, draft = config.speculation, config.draft
    if draft is None:
        if speculation.method in WITH_DRAFT:
            raise ConfigError(
                f"{where}draft is missing; speculation.method={speculation.method} needs a draft model "
                "(or set speculation.method=none, or self)"
            )
        return
    if bool(draft.model) == (draft.propose is not None):
        raise ConfigError(f"{where}draft.model is missing; give a model (or a function as draft.propose, not both)")
    if draft.propose is not None and (speculation.method == "ssd" or draft.data_parallel > 1):
        raise ConfigError(
            f"{where}draft.propose makes candidates on demand, in one process; set speculation.method=sd and "
            "draft.data_parallel=1"
        )
    if draft.data_parallel > 1 and speculation.anytime:
        raise ConfigError(
            f"{where}speculation.anytime ends the tree of one draft only; set draft.data_parallel=1 or "
            "speculation.anytime=false"
        )
    if draft.data_parallel > 1 and speculation.forecast.shape == "measured":
        raise ConfigError(
            f"{where}draft.data_parallel={draft.data_parallel} needs a forecast that all ranks make alike; set "
            "speculation.forecast.shape=confidence (measured learns from whole speculation sets, which only the "
            "first rank sees)"
        )


def shipped_configs() -> list[str]:
    """Returns the names of the configurations that come with the package."""
    return sorted({path.stem for folder in CONFIG_FOLDERS for path in folder.glob("*.yaml")})


def config_path(source: str | Path) -> Path:
    """Returns the file of a configuration, given a shipped name or a path.

    A name without folder and suffix always means a shipped configuration, whatever the working directory holds.

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


def _plain(mapping: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns a deep copy whose keys are strings and whose sections are dicts."""
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
        raise ConfigError(f"{path}: not valid YAML: {yaml_problem(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping with the keys {', '.join(Config.model_fields)}")
    return _plain(tree)


def _override(tree: dict[str, Any], override: str) -> None:
    """Applies ``section.key=value`` to the tree, in place."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not dotted:
        raise ConfigError(f"override {override!r} must look like key=value, for example speculation.lookahead=6")
    if dotted not in keys():
        raise ConfigError(unknown(dotted))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: not a YAML value: {yaml_problem(error)}") from None
    *sections, last = dotted.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    value = _plain(value) if isinstance(value, dict) else value
    tree[last] = value
    if isinstance(value, dict):
        _refuse_unknown_keys(value, "", f"{dotted}.")


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")


def _refuse_unknown_keys(tree: Mapping[str, Any], where: str, prefix: str = "") -> None:
    for dotted in _flat(tree, prefix):
        # A mapping given for a plain value is a wrong value, not an unknown key.
        if dotted not in keys() and is_section(dotted.rpartition(".")[0]):
            raise ConfigError(where + unknown(dotted))
