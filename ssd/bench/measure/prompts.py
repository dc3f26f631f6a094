"""Prompts to measure on: a file of JSON lines, or the demonstration's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RequestError
from ...request import checks


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A text to continue."""

    name: str
    text: str
    category: str = "other"


def load_prompts(path: str | Path) -> list[Prompt]:
    """Reads prompts from JSON lines.

    A line is ``{"prompt": …, "name"?: …, "category"?: …}``, or as in Spec-Bench
    ``{"question_id": …, "category": …, "turns": […]}``; then the first turn is the prompt.

    Raises:
        RequestError: the file or a line of it cannot be used; the message names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise RequestError(f"prompts file {str(path)!r} not found; give a file of JSON lines") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"prompts file {str(path)!r} cannot be read: {error}") from None
    prompts = list(_parse(path, lines))
    if not prompts:
        raise RequestError(f"prompts file {str(path)!r} holds no prompts")
    return prompts


def _parse(path: Path, lines: list[str]) -> Iterator[Prompt]:
    names: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(f"{where}: not JSON: {error.msg}") from None
        if not isinstance(record, dict):
            raise RequestError(f"{where}: must be a JSON object with the key prompt (or turns)")
        text = _text(record, where)
        name = str(record.get("name", record.get("question_id", number)))
        if name in names:
            raise RequestError(f"{where}: the name {name!r} is taken by an earlier line")
        names.add(name)
        yield Prompt(name=name, text=text, category=str(record.get("category") or "other"))


def _text(record: dict[str, Any], where: str) -> str:
    if "prompt" in record:
        key, text = "prompt", record["prompt"]
    elif "turns" in record:
        key, turns = "turns", record["turns"]
        text = turns[0] if isinstance(turns, list) and turns else None
    else:
        raise RequestError(f"{where}: has neither prompt nor turns")
    if not isinstance(text, str):
        wanted = "a text" if key == "prompt" else "a list of texts"
        raise RequestError(f"{where}: {key} must be {wanted}")
    if not text:
        raise RequestError(f"{where}: the prompt is empty")
    if not checks.is_utf8(text):
        raise RequestError(f"{where}: the prompt must be valid Unicode, without lone surrogates")
    return text


_PARSER = '''\
class CommandParser:
    """Parse command line strings into Python objects."""

    def __init__(self, prog=None, usage=None, description=None):
        self.prog = prog
        self.usage = usage
        self.description = description
        self._actions = []

    def parse_args(self, args=None, namespace=None):
        '''

_READER = '''\
import os
import io


class BufferedFile(io.RawIOBase):
    """A file that reads its data in blocks."""

    def __init__(self, path, mode="r", buffer_size=8192):
        if buffer_size <= 0:
            raise ValueError("invalid buffer size")
        self._path = path
        self._mode = mode
        self._buffer = b""

    def read(self, size=-1):
        '''

_TEST = """\
import unittest


class TestQueue(unittest.TestCase):

    def setUp(self):
        self.queue = Queue(maxsize=10)

    def test_put_and_get(self):
        """

_QUOTE = '''\
def split_header(line, separator=";"):
    """Split a header line into a value and a dictionary of parameters.

    Return a tuple (value, params).
    """
    params = {}
    '''

_LIBRARY = """\
The :mod:`shelve` module
************************

A shelf is a persistent, dictionary-like object. The difference with "dbm" databases is that the values \
in a shelf can be essentially arbitrary Python objects. This includes most class instances, recursive \
data types, and objects containing lots of shared sub-objects. The keys are"""

_REFERENCE = """\
The "with" statement
********************

The "with" statement is used to wrap the execution of a block with methods defined by a context manager. \
This allows common patterns to be encapsulated for convenient reuse.

The execution of the "with" statement with one item proceeds as follows:

1. The context expression"""

DEMO_PROMPTS = (
    Prompt(name="parser", category="code", text=_PARSER),
    Prompt(name="reader", category="code", text=_READER),
    Prompt(name="test", category="code", text=_TEST),
    Prompt(name="header", category="code", text=_QUOTE),
    Prompt(name="library", category="prose", text=_LIBRARY),
    Prompt(name="reference", category="prose", text=_REFERENCE),
)
"""Beginnings of Python source files and of documentation pages, for the embedded pair to continue."""
