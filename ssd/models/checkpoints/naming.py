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


def check_complete(path: Path, missing: Iterable[Any]) -> None:
    """Raises ModelError if weights are missing: transformers would initialise them at random, so that every start gives
    other tokens."""
    if absent := sorted(map(str, missing)):
        raise ModelError(f"{path}: the weights lack {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}")
