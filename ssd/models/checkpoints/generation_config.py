"""What a model folder says about generation: the token ids that end a text, and sampling parameters."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from ...errors import ModelError, RequestError, first_line
from ...request.sampling_params import SamplingParams

log = logging.getLogger(__name__)

FILE = "generation_config.json"
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Keys that are sampling parameters, as in vLLM."""


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Returns the sampling parameters that a model folder's ``generation_config.json`` sets, as fields of
    ``SamplingParams``. Values out of range are left out with a warning.

    Raises:
        ModelError: The file is not a JSON object.
    """
    raw = _read(folder)
    defaults: dict[str, Any] = {}
    for name in SAMPLING:
        value: Any = raw.get(name)
        if name == "top_k" and value == -1:  # vLLM's value for all tokens
            value = 0
        if value is None:
            continue
        try:
            replace(SamplingParams(), **{name: value})
        except RequestError as error:
            log.warning("%s: %s in %s is ignored: %s", folder, name, FILE, error)
        else:
            defaults[name] = value
    return defaults


def end_ids(folder: Path, config: PretrainedConfig, tokenizer: Any, *, vocabulary: int) -> tuple[int, ...]:
    """Returns the token ids that end a text: those of ``generation_config.json``, or else of ``config.json``, and the
    tokenizer's own. Ids outside the vocabulary are left out with a warning.

    Args:
        config: The folder's.
        vocabulary: V.

    Raises:
        ModelError: The folder's end-of-text ids are not integers, or ``generation_config.json`` is not a JSON object.
    """
    ends = _ids(folder, FILE, _read(folder).get("eos_token_id"))
    if ends is None:
        text = getattr(config.get_text_config(), "eos_token_id", None)
        given = text if text is not None else getattr(config, "eos_token_id", None)
        ends = _ids(folder, "config.json", given) or ()
    known = {*ends, *(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))}
    outside = sorted(token for token in known if not 0 <= token < vocabulary)
    if outside:
        log.warning(
            "%s: end-of-text ids %s are ignored: token ids are below %s",
            folder,
            ", ".join(map(str, outside)),
            vocabulary,
        )
    return tuple(sorted(known - {*outside}))


def _read(folder: Path) -> dict[str, Any]:
    """Returns the contents of ``generation_config.json``; nothing without that file. Raises: ModelError."""
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: {FILE} cannot be read ({first_line(error)})") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{folder}: {FILE} must be a JSON object")
    return raw


def _ids(folder: Path, file: str, given: Any) -> tuple[int, ...] | None:
    if given is None:
        return None
    ids = given if isinstance(given, list) else [given]
    if not all(type(token) is int for token in ids):
        raise ModelError(f"{folder}: eos_token_id in {file} must be an integer or a list of integers")
    return tuple(ids)
