"""The comparison with another server: shapes, differences, and reasons in the documentation."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def differential() -> ModuleType:
    folder = ROOT / "benchmarks" / "serving"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("differential", folder / "differential.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def record(differential: ModuleType, status: int, answer: Any) -> dict[str, Any]:
    return {"status": status, "shape": differential.shape_of("application/json", json.dumps(answer))}


def test_a_shape_is_the_types_at_each_path(differential: ModuleType) -> None:
    answer = {"a": [{"b": 1}, {"b": "x", "c": None}], "d": {}, "e": [], "f": True, "top_logprobs": [{" x": -1.5}]}
    assert differential.shape_of("application/json", json.dumps(answer)) == {
        "a[].b": ["number", "string"],
        "f": ["boolean"],
        "top_logprobs[].*": ["number"],
    }


def test_the_shape_of_a_stream_is_the_union_of_its_events(differential: ModuleType) -> None:
    text = 'event: one\ndata: {"a": 1}\n\ndata: {"b": "x"}\n\ndata: [DONE]\n\n'
    assert differential.shape_of("text/event-stream", text) == {
        "[DONE]": ["event"],
        "a": ["number"],
        "b": ["string"],
        "event one": ["event"],
    }


def test_differences_are_named(differential: ModuleType) -> None:
    ours = record(differential, 200, {"a": 1, "x": 1, "same": ""})
    assert differential.differences(ours, record(differential, 204, {"a": "", "b": 1, "same": ""})) == [
        "lacks b",
        "adds x",
        "a is number, theirs string",
    ]
    assert differential.differences(ours, record(differential, 404, {})) == ["status 200, theirs 404"]


def test_a_difference_needs_a_reason_and_a_reason_a_difference(differential: ModuleType) -> None:
    ours = {name: record(differential, 200, {"a": [{"b": 1}]}) for name in ("chat/one", "chat/two")}
    theirs = {"chat/one": record(differential, 200, {}), "chat/two": record(differential, 400, {})}
    page = differential.SECTION + "\n| `chat/*: adds a[].*` `chat/three` | because |\n\n## Next\n| `chat/two` | no |\n"
    result = differential.compare(ours, theirs, page)
    assert result["without a reason"] == {"chat/two": ["status 200, theirs 400"]}
    assert result["reasons without a difference"] == ["chat/three: *"]
    assert (result["requests"], result["same status class"], result["same shape"]) == (2, 1, 0)


def test_requests_have_different_names(differential: ModuleType) -> None:
    names = [sent.name for sent in differential.requests()]
    assert len(names) == len(set(names)) >= 200


def test_the_documentation_gives_a_reason_for_every_difference_of_the_kept_run(differential: ModuleType) -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "differential.json").read_text())
    assert not kept["without a reason"] and not kept["reasons without a difference"]
    pairs = differential.reasons(differential.REASONS.read_text(encoding="utf-8"))
    for name, lines in kept["differences"].items():
        for line in lines:
            assert differential.explained(pairs, name, line), f"{name}: {line}"
