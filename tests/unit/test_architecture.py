"""Fences: who may import what, and what must not appear in the package."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ssd"
MAX_LINES = 400

BASE = ("errors", "params", "structured")
STACK = (
    "config_words",
    "config_speculation",
    "config",
    "models",
    "pipeline",
    "engine",
    "learning",
    "serving",
    "cluster",
    "bench",
    "testing",
)
"""Bottom to top: a layer imports only what stands before it (models also decoding)."""
MEASURING = ("cli_bench", "cli_plan", "cli_tune")
ALLOWED = {
    "errors": set(),
    "structured": {"errors"},
    "params": {"errors", "structured"},
    "decoding": {*BASE},
    **{layer: {*BASE, "decoding", *STACK[:index]} for index, layer in enumerate(STACK)},
    "config_words": set(),
    "config_speculation": {"errors"},
    "config": {*BASE, "config_words", "config_speculation"},
    # The package's face and its commands stand above everything.
    "__init__": {*BASE, "decoding", *STACK},
    "cli": {
        "__init__",
        *BASE,
        "decoding",
        *STACK,
        "cli_serving",
        "cli_remote",
        "cli_certify",
        "cli_values",
        *MEASURING,
    },
    "cli_values": {*BASE},
    "cli_serving": {"__init__", *BASE, "decoding", *STACK},
    "cli_remote": {"__init__", *BASE, "decoding", *STACK},
    "cli_certify": {"__init__", *BASE, "decoding", *STACK, "cli_serving"},
    **{command: {"__init__", *BASE, "decoding", *STACK, "cli_plan"} for command in MEASURING},
}
OPEN = {"ssd.__version__"}
"""Importable from everywhere."""
FENCED = {
    "ray": ("ssd/cluster/", "launch/"),
    "zmq": ("ssd/pipeline/", "ssd/serving/"),
    "torch.distributed": ("ssd/pipeline/", "ssd/models/", "launch/"),
    "llguidance": ("ssd/pipeline/grammar.py",),
    "transformers": ("ssd/models/", "ssd/engine/", "ssd/testing/", "ssd/bench/peers/worker.py"),
    "typer": tuple(f"ssd/{name}.py" for name in ("cli", "cli_serving", "cli_remote", "cli_certify", *MEASURING)),
    "fastapi": ("ssd/serving/",),
    "uvicorn": ("ssd/serving/", "ssd/testing/served.py"),
}
DECODING_IMPORTS = {"torch", "ssd"}
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> list[str]:
    return list(imported(tree(path), path.relative_to(ROOT).with_suffix("").parts))


def imported(module_tree: ast.Module, home: tuple[str, ...]) -> Iterator[str]:
    """Full names of the modules a file imports, at any depth; ``from a import b`` gives a.b."""
    for node in ast.walk(module_tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the folder the file lies in, also for __init__.py.
            base = ".".join(home[: -node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def uses(path: Path) -> set[str]:
    """What a file imports, and the dotted names it spells out."""
    return {*imports(path), *(dotted(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute))}


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_there_is_something_to_check() -> None:
    assert len(sources("ssd")) > 5


def test_every_file_belongs_to_a_layer() -> None:
    assert {layer(path) for path in sources("ssd")} <= set(ALLOWED)


@pytest.mark.parametrize("path", sources("ssd"), ids=name)
def test_layers(path: Path) -> None:
    for module in imports(path):
        if within(module, "ssd"):
            parts = module.split(".")
            inner = parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "__init__"
            if inner != layer(path) and module not in OPEN:
                assert inner in ALLOWED[layer(path)], f"{name(path)} must not import {module}"


@pytest.mark.parametrize("path", sources("ssd", "launch"), ids=name)
def test_fenced_libraries(path: Path) -> None:
    for library, homes in FENCED.items():
        if not name(path).startswith(homes):
            found = [used for used in uses(path) if within(used, library)]
            assert not found, f"{name(path)}: {library} belongs in {', '.join(homes)}"


@pytest.mark.parametrize("path", sources("ssd/decoding"), ids=name)
def test_decoding_is_pure(path: Path) -> None:
    for module in imports(path):
        top = module.split(".")[0]
        assert top in DECODING_IMPORTS or top in sys.stdlib_module_names, f"{name(path)} must not import {module}"


@pytest.mark.parametrize("path", sources("ssd"), ids=name)
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name(path)} has {lines} lines; split it by noun"


@pytest.mark.parametrize("path", sources("ssd"), ids=name)
def test_nothing_unpickles(path: Path) -> None:
    used = uses(path)
    assert not [module for module in imports(path) if module.split(".")[0] in UNSAFE]
    assert not used & {"torch.load", "torch.save", "numpy.load", "np.load"}


@pytest.mark.parametrize("path", [path for path in sources("ssd") if path != PACKAGE / "cli.py"], ids=name)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and dotted(node.func) == "print"]
    assert not calls, f"{name(path)} prints at line {calls[0].lineno}"


def test_relative_and_nested_imports_are_seen() -> None:
    code = (
        "import torch\n"
        "from .. import __version__\n"
        "def f():\n"
        "    from ..pipeline import link\n"
        "    from . import llm\n"
        "    import torch.distributed as dist\n"
    )
    found = {"torch", "ssd.__version__", "ssd.pipeline.link", "ssd.engine.llm", "torch.distributed"}
    assert set(imported(ast.parse(code), ("ssd", "engine", "imagined"))) == found
