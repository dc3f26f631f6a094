"""Runs a client's checks and prints their outcome; imported by the scripts beside it, in the client's environment.

A script is called with the server's address (without ``/v1``), the model's name, and the model's folder. It prints one
JSON object as its last line: for each check ``ok``, with figures where the check returns some, or what went wrong.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable

URL, MODEL, FOLDER = sys.argv[1:4]
V1 = f"{URL}/v1"
QUESTION = "What is the capital of France?"
Check = Callable[[], "str | None"]
_checks: list[Check] = []


def check(function: Check) -> Check:
    """Registers a check; the function's name is the check's, and a text that it returns is shown."""
    _checks.append(function)
    return function


def run() -> None:
    """Runs every check, whatever the others do."""
    outcome: dict[str, str] = {}
    for function in _checks:
        try:
            figures = function()
            outcome[function.__name__] = f"ok: {figures}" if figures else "ok"
        except Exception as error:
            traceback.print_exc()
            outcome[function.__name__] = f"{type(error).__name__}: {error}"[:600]
        print(f"{function.__name__}: {outcome[function.__name__]}", file=sys.stderr, flush=True)
    print(json.dumps(outcome))
