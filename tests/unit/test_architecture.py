"""Fences: who may import what, and what must not appear in the package."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ssd"
MAX_LINES = 400
MAX_MODULES = 12
MAX_PARAMETERS = 8
PIPELINE_LINES = 8300
"""``ssd/pipeline`` stays smaller than this, docstrings included."""

STACK = (
    "errors",
    "request",
    "decoding",
    "config",
    "grammars",
    "models",
    "pipeline",
    "engine",
    "serving",
    "cluster",
    "bench",
    "testing",
    "__init__",
    "cli",
)
"""Bottom to top: a layer imports only what stands before it."""
ALLOWED = {layer: {*STACK[:index]} for index, layer in enumerate(STACK)}
ROOMS = {
    "pipeline": {
        "round": set(),
        "transport": {"round"},
        "policy": {"round"},
        "sampling": {"round"},
        "verifier": {"round", "transport", "policy", "sampling"},
        "draft": {"round", "transport", "sampling"},
        "runtime": {"round", "transport", "policy", "sampling", "verifier", "draft"},
    },
    "serving": {
        "http": set(),
        "lane": set(),
        "parsers": set(),
        "openai": {"http", "parsers"},
        "responses": {"http", "parsers", "openai"},
        "anthropic": {"http", "parsers", "openai"},
        "batch": {"http", "openai"},
    },
}
"""Rooms of a layer, and which of its other rooms each may import."""
OPEN = {"ssd.__version__"}
"""Importable from everywhere."""
FENCED = {
    "ray": ("ssd/cluster/", "launch/"),
    "zmq": ("ssd/pipeline/transport/", "ssd/serving/lane/"),
    "torch.distributed": ("ssd/pipeline/transport/", "ssd/models/", "launch/"),
    "llguidance": ("ssd/grammars/compiler.py",),
    "transformers": ("ssd/models/", "ssd/engine/", "ssd/testing/", "ssd/bench/peers/worker.py"),
    "typer": ("ssd/cli/",),
    "fastapi": ("ssd/serving/",),
    "opentelemetry": ("ssd/serving/tracing.py",),
    "uvicorn": ("ssd/serving/", "ssd/testing/twins/served.py"),
}
DECODING_IMPORTS = {"torch", "ssd"}
BORDERS = {"ssd/serving/http/border.py", "ssd/serving/lane/server.py", "ssd/serving/batch/lines.py"}
"""Where any error becomes an error of the protocol: nowhere else may ``except Exception`` stand."""
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


@pytest.mark.parametrize("path", sources(*(f"ssd/{owner}" for owner in ROOMS)), ids=name)
def test_rooms(path: Path) -> None:
    """Inside a layer the fences are as strict."""
    owner, room, *rest = path.relative_to(PACKAGE).with_suffix("").parts
    if not rest:  # a module of the layer itself
        return
    rooms = ROOMS[owner]
    for module in imports(path):
        parts = module.split(".")
        if parts[:2] == ["ssd", owner] and len(parts) > 2 and parts[2] in rooms and parts[2] != room:
            assert parts[2] in rooms[room], f"{name(path)} must not import {module}"


@pytest.mark.parametrize("path", sources("ssd/pipeline/policy"), ids=name)
def test_policy_needs_no_torch(path: Path) -> None:
    assert not [module for module in imports(path) if within(module, "torch")]


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


def test_folders_stay_small() -> None:
    folders = Counter(path.parent for path in sources("ssd") if path.name != "__init__.py")
    large = {name(folder): count for folder, count in folders.items() if count > MAX_MODULES}
    assert not large, f"more than {MAX_MODULES} modules in {large}; make rooms by noun"


@pytest.mark.parametrize("path", sources("ssd/pipeline", "ssd/engine", "ssd/models"), ids=name)
def test_constructors_stay_small(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            given = node.args
            count = len([*given.posonlyargs, *given.args, *given.kwonlyargs]) - 1
            assert count <= MAX_PARAMETERS, f"{name(path)}:{node.lineno} takes {count} parameters"


def test_the_pipeline_stays_small() -> None:
    assert sum(len(path.read_text().splitlines()) for path in sources("ssd/pipeline")) < PIPELINE_LINES


@pytest.mark.parametrize("path", sources("ssd"), ids=name)
def test_nothing_unpickles(path: Path) -> None:
    used = uses(path)
    assert not [module for module in imports(path) if module.split(".")[0] in UNSAFE]
    assert not used & {"torch.load", "torch.save", "numpy.load", "np.load"}


@pytest.mark.parametrize("path", [path for path in sources("ssd") if layer(path) != "cli"], ids=name)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and dotted(node.func) == "print"]
    assert not calls, f"{name(path)} prints at line {calls[0].lineno}"


def catch_alls(module_tree: ast.Module) -> set[str]:
    """Which handlers for all errors a file has: ``Exception``, ``bare``, ``suppress``; ``BaseException`` if it raises
    nothing."""
    found: set[str] = set()
    for node in ast.walk(module_tree):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                found.add("bare")
            elif "Exception" in caught(node.type):
                found.add("Exception")
            elif "BaseException" in caught(node.type) and not any(isinstance(one, ast.Raise) for one in node.body):
                found.add("BaseException")
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "suppress":
            given = {one for argument in node.args for one in caught(argument)}
            found.update({"suppress"} if given & {"Exception", "BaseException"} else ())
    return found


def caught(node: ast.expr) -> set[str]:
    """Names of the exceptions in one expression, a tuple or not."""
    return {dotted(one).removeprefix("builtins.") for one in (node.elts if isinstance(node, ast.Tuple) else [node])}


def test_all_errors_are_caught_at_three_borders_only() -> None:
    found = {name(path): catch_alls(tree(path)) for path in sources("ssd", "launch")}
    assert {path: kinds for path, kinds in found.items() if kinds} == {border: {"Exception"} for border in BORDERS}


@pytest.mark.parametrize(
    ("code", "kinds"),
    [
        ("try: f()\nexcept Exception: g()", {"Exception"}),
        ("try: f()\nexcept (OSError, Exception) as error: g()", {"Exception"}),
        ("try: f()\nexcept builtins.Exception: g()", {"Exception"}),
        ("try: f()\nexcept: g()", {"bare"}),
        ("with suppress(Exception): f()", {"suppress"}),
        ("with contextlib.suppress(OSError, BaseException): f()", {"suppress"}),
        ("with suppress(OSError): f()", set()),
        ("try: f()\nexcept ExceptionGroup: g()", set()),
        ("try: f()\nexcept BaseException:\n    g()\n    raise", set()),
        ("try: f()\nexcept BaseException: g()", {"BaseException"}),
    ],
)
def test_handlers_of_all_errors_are_seen(code: str, kinds: set[str]) -> None:
    assert catch_alls(ast.parse(code)) == kinds


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
