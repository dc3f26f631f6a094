"""Text for training the embedded pair, from files that every machine with Python has.

Two kinds of document:

code
    Source files of the standard library (tests included, generated tables left out).
prose
    Docstrings of the standard library and of this project's own dependencies,
    ``pydoc`` topics, and package descriptions.

The split is by *file*: the SHA-256 of its relative path decides whether a file, with all its docstrings, is held out.
So training never uses any part of a held-out file.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.03
PROSE_PACKAGES = ("torch", "numpy", "transformers", "tokenizers", "huggingface_hub", "networkx", "sympy")
SKIPPED_PARTS = {"site-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3", "bad_coding"}
MAX_FILE_BYTES = 200_000
MIN_PROSE_CHARS = 200
MAX_PROSE_CHARS = 12_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    kind: str  # "code" | "prose"
    name: str  # path or topic it came from
    text: str
    held_out: bool


def is_held_out(name: str) -> bool:
    """Returns the split; it depends on the name alone, so it is the same on every machine."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_SHARE


def _read(path: Path) -> str | None:
    try:
        if not 200 < path.stat().st_size <= MAX_FILE_BYTES:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _docstrings(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, holders) and (doc := ast.get_docstring(node)):
            yield inspect.cleandoc(doc)


def _python_files(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_PARTS & set(relative.parts):
            continue
        if (source := _read(path)) is not None:
            yield relative.as_posix(), source


def collect() -> list[Document]:
    """Yields all documents in a fixed order, without duplicates."""
    documents: list[Document] = []
    seen: set[bytes] = set()
    prose_chars = 0

    def add(kind: str, name: str, text: str) -> None:
        nonlocal prose_chars
        key = hashlib.sha256(re.sub(r"\s+", " ", text).encode()).digest()
        if key in seen:
            return
        seen.add(key)
        if kind == "prose":
            if len(text) < MIN_PROSE_CHARS or prose_chars > MAX_PROSE_CHARS:
                return
            prose_chars += len(text)
        documents.append(Document(kind=kind, name=name, text=text, held_out=is_held_out(name)))

    stdlib = Path(sysconfig.get_path("stdlib"))
    for name, source in _python_files(stdlib):
        add("code", name, source)
        for docstring in _docstrings(source):
            add("prose", name, docstring)

    from pydoc_data import topics

    for topic, text in sorted(topics.topics.items()):
        add("prose", f"topic/{topic}", text)
    for package in sorted(PROSE_PACKAGES):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        for name, source in _python_files(Path(spec.submodule_search_locations[0])):
            for docstring in _docstrings(source):
                add("prose", f"{package}/{name}", docstring)
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: d.name or ""):
        description = distribution.metadata.get_payload() if distribution.metadata else None
        if isinstance(description, str):
            add("prose", f"metadata/{distribution.name}", description)
    return documents
