"""Drafts that others write: a function that proposes the next tokens of a text.

The function is called when a request waits for candidates::

    def propose(context: Sequence[int], count: int, deadline: float) -> Sequence[int]: ...

It gets the certain tokens of one request (prompt and output), the number of candidates wanted, and the
``time.monotonic()`` by which they are wanted. It returns up to ``count`` token ids, its guess of what follows. It
cannot change tokens, since candidates are verified. If it raises, is late, or returns anything else, there is no
proposal.
"""

from __future__ import annotations

import importlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from numbers import Integral
from typing import Any

import numpy as np

from ...errors import ConfigError, first_line

log = logging.getLogger(__name__)

Propose = Callable[[Sequence[int], int, float], Sequence[int]]
GROUP = "ssd.drafts"
"""Entry points of installed packages that name such functions."""


def find(name: str) -> Propose:
    """Returns the function that ``draft.propose`` names: ``module:function``, or an entry point of ``GROUP``.

    Raises:
        ConfigError: there is no such function.
    """
    module, colon, attribute = name.partition(":")
    try:
        if colon:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        else:
            found = entry_points(group=GROUP)[name].load()
    except KeyError:
        known = ", ".join(sorted(entry_points(group=GROUP).names)) or "none"
        raise ConfigError(f"draft.propose={name}: no installed package has this draft; known: {known}") from None
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"draft.propose={name}: cannot be imported ({first_line(error)})") from error
    if not callable(found):
        raise ConfigError(f"draft.propose={name}: not a function")
    return found  # pyright: ignore[reportReturnType]


class Proposer:
    """Calls a function in a thread, and waits no longer than agreed.

    A call that does not return keeps the thread; while it does, there are no proposals.

    Args:
        function: called with context, count and deadline.
        vocabulary: V.
        limit_s: how long a call may take.
    """

    def __init__(self, function: Propose, *, vocabulary: int, limit_s: float):
        self._function, self._vocabulary, self._limit_s = function, vocabulary, limit_s
        self._asked: queue.SimpleQueue[tuple[int, tuple[int, ...], int, float]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._number = self._answered = 0
        self._warned: set[str] = set()
        threading.Thread(target=self._work, name="ssd-propose", daemon=True).start()

    def propose(self, context: Sequence[int], count: int) -> list[int]:
        """Returns at most ``count`` candidates, fewer or none if the function gives no more."""
        self._drain()
        if self._answered < self._number:
            self._warn("an earlier call has not returned")
            return []
        self._number += 1
        deadline = time.monotonic() + self._limit_s
        self._asked.put((self._number, tuple(context), count, deadline))
        try:
            self._answered, answer = self._answers.get(timeout=self._limit_s)
        except queue.Empty:
            self._warn(f"a call took longer than draft.propose_timeout_s={self._limit_s:g}")
            return []
        if isinstance(answer, BaseException):
            self._warn(f"a call raised {type(answer).__name__} ({first_line(answer)})")
            return []
        return answer

    def _valid(self, answer: Any, count: int) -> list[int]:
        """Returns the ids of an answer, up to the first thing that is none."""
        if isinstance(answer, str | bytes) or not isinstance(answer, Sequence | np.ndarray):
            self._warn(f"a call returned {type(answer).__name__}, not a list of token ids")
            return []
        found: list[int] = []
        for token in answer[:count]:
            if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= int(token) < self._vocabulary:
                self._warn(f"a call returned something that is no token id below {self._vocabulary}")
                break
            found.append(int(token))
        return found  # pyright: ignore[reportReturnType]

    def _drain(self) -> None:
        while not self._answers.empty():
            self._answered, _ = self._answers.get()

    def _warn(self, why: str) -> None:
        """Logs each kind of failure once."""
        if (kind := why[:24]) not in self._warned:
            self._warned.add(kind)
            log.warning("draft.propose: no proposal, because %s; said once", why)

    def _work(self) -> None:
        while True:
            number, context, count, deadline = self._asked.get()
            with _Caught() as caught:
                caught.answer = self._valid(self._function(context, count, deadline), count)
            self._answers.put((number, caught.answer))


class _Caught:
    """Takes whatever a call raises as its answer. No list of types would do: the function is somebody else's."""

    answer: Any = None

    def __enter__(self) -> _Caught:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if error is not None:
            self.answer = error
        return True
