"""What is wrong with a model file, in one line that names the file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import ModelError, first_line


class Naming:
    """A context that turns any error of transformers, tokenizers, safetensors or gguf into a ModelError.

    No list of types would do: some of theirs are bare ``Exception``.

    Args:
        path: of the model.
        problem: what the error means.
    """

    def __init__(self, path: Path, problem: str):
        self._path, self._problem = path, problem

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, ModelError):
            raise ModelError(f"{self._path}: {self._problem} ({first_line(error)})") from error


def check_complete(path: Path, missing: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]] = ()) -> None:
    """Raises ModelError if weights are missing or have other shapes: transformers would initialise them at random, so
    that every start gives other tokens.

    Args:
        path: of the model.
        missing: names of parameters without a weight.
        mismatched: names of parameters, shapes in the files, and shapes by the configuration.
    """
    for name, stored, wanted in sorted(mismatched, key=str):
        raise ModelError(f"{path}: {name} has shape {tuple(stored)}, not {tuple(wanted)} as the configuration says")
    if absent := sorted(missing):
        raise ModelError(f"{path}: the weights lack {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}")
