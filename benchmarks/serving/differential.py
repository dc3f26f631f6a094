"""The same requests to two servers, compared by status class and by the shape of the answer.

    python benchmarks/serving/differential.py ask http://127.0.0.1:8190 vllm.json
    python benchmarks/serving/differential.py ask http://127.0.0.1:8000 ours.json
    python benchmarks/serving/differential.py compare ours.json vllm.json --json differential.json

Both serve the same model under the name ``smollm2`` (``--served-model-name``, ``server.model_name``). ``compare`` ends
with 1 if a difference has no reason in ``docs/clients.md``, or if a reason there explains nothing.

The shape of an answer is the set of types at each path of its JSON. A null, an empty list and an empty object say
nothing and are left out; integers and fractions are both numbers; a stream is the union of its events.
"""

from __future__ import annotations

import argparse
import fnmatch
import http.client
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from differential_requests import Sent, requests

REASONS = Path(__file__).resolve().parents[2] / "docs" / "clients.md"
SECTION = "## Differences from vLLM"
LIMIT_S = 120.0
KEYED = {"top_logprobs", "prompt_logprobs", "acceptance_histogram_by_draft_length"}
"""Objects whose keys are values: tokens, ids, lengths."""
Shape = dict[str, list[str]]


def ask(url: str, sent: Sent) -> dict[str, Any]:
    """Sends one request and returns its record: status, shape and the beginning of the answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=LIMIT_S)
    try:
        if sent.body is None:
            connection.request("GET", sent.path)
        else:
            connection.request("POST", sent.path, json.dumps(sent.body), {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    kind = (answer.getheader("content-type") or "").partition(";")[0]
    return {"status": answer.status, "shape": shape_of(kind, text), "answer": text[:600]}


def shape_of(kind: str, text: str) -> Shape:
    """Returns the types at each path of a body.

    Args:
        kind: its content type.
    """
    found: dict[str, set[str]] = {}
    if kind == "text/event-stream":
        for line in text.splitlines():
            if line.startswith("event: "):
                found.setdefault(f"event {line.removeprefix('event: ')}", set()).add("event")
            elif line == "data: [DONE]":
                found.setdefault("[DONE]", set()).add("event")
            elif line.startswith("data: "):
                _walk("", json.loads(line.removeprefix("data: ")), found)
    elif kind == "application/json":
        _walk("", json.loads(text), found)
    elif text:
        found[kind] = {"text"}
    return {path: sorted(types) for path, types in sorted(found.items())}


def _walk(path: str, value: Any, found: dict[str, set[str]]) -> None:
    if isinstance(value, dict):
        keyed = path.removesuffix("[]").rpartition(".")[2] in KEYED and "token" not in value
        for key, inner in value.items():
            _walk(f"{path}.{'*' if keyed else key}", inner, found)
    elif isinstance(value, list):
        for inner in value:
            _walk(f"{path}[]", inner, found)
    elif value is not None:
        kind = {str: "string", bool: "boolean"}.get(type(value), "number")
        found.setdefault(path.removeprefix("."), set()).add(kind)


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Returns what differs between two records of one request, a line each; empty if nothing does."""
    if ours["status"] // 100 != theirs["status"] // 100:
        return [f"status {ours['status']}, theirs {theirs['status']}"]
    mine, other = ours["shape"], theirs["shape"]
    return [
        *(f"lacks {path}" for path in other if path not in mine),
        *(f"adds {path}" for path in mine if path not in other),
        *(
            f"{path} is {'/'.join(mine[path])}, theirs {'/'.join(types)}"
            for path, types in other.items()
            if path in mine and mine[path] != types
        ),
    ]


def reasons(page: str) -> list[tuple[str, str]]:
    """Returns pairs of patterns, one pair per backticked pair in the first column of the section's tables.

    A row's first cell has ``REQUEST`` or ``REQUEST: DIFFERENCE``, each a shell pattern.
    """
    section = page.partition(SECTION)[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    pairs = [name.partition(": ") for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    return [(request, difference or "*") for request, _, difference in pairs]


def compare(ours: dict[str, Any], theirs: dict[str, Any], page: str) -> dict[str, Any]:
    """Returns counts, differences by request, those without a reason, and reasons that explain nothing."""
    known = reasons(page)
    used: set[tuple[str, str]] = set()
    found: dict[str, list[str]] = {}
    unexplained: dict[str, list[str]] = {}
    same_status = 0
    for name, record in theirs.items():
        lines = differences(ours[name], record)
        same_status += not (lines and lines[0].startswith("status "))
        for line in lines:
            found.setdefault(name, []).append(line)
            matching = explained(known, name, line)
            used |= matching
            if not matching:
                unexplained.setdefault(name, []).append(line)
    return {
        "requests": len(theirs),
        "same status class": same_status,
        "same shape": len(theirs) - len(found),
        "differences": found,
        "without a reason": unexplained,
        "reasons without a difference": [": ".join(pair) for pair in known if pair not in used],
    }


def explained(known: Sequence[tuple[str, str]], name: str, line: str) -> set[tuple[str, str]]:
    """Returns those of the patterns that match one difference of one request. Brackets are literal: paths have them."""
    return {
        (request, difference)
        for request, difference in known
        if fnmatch.fnmatchcase(name, request) and fnmatch.fnmatchcase(line, difference.replace("[", "[[]"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("ask", help="send every request to a server and keep its answers")
    asking.add_argument("url")
    asking.add_argument("out", type=Path)
    comparing = commands.add_parser("compare", help="compare two files of answers")
    comparing.add_argument("ours", type=Path)
    comparing.add_argument("theirs", type=Path)
    comparing.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.command == "ask":
        records = {}
        for sent in requests():
            start = time.monotonic()
            records[sent.name] = ask(given.url, sent)
            print(f"{records[sent.name]['status']} {time.monotonic() - start:6.2f} s {sent.name}", flush=True)
        given.out.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
        return
    result = compare(
        json.loads(given.ours.read_text()), json.loads(given.theirs.read_text()), REASONS.read_text(encoding="utf-8")
    )
    print(json.dumps(result, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["without a reason"] or result["reasons without a difference"]))


if __name__ == "__main__":
    main()
