"""Tool calls that are JSON objects with a name and arguments: the formats of Hermes, Qwen and Llama 3."""

from __future__ import annotations

from collections.abc import Collection

from .parser import CallIds
from .parts import Arguments, Call
from .reader import Reader, Steps

ARGUMENTS = ("arguments", "parameters")


class CallReader(Reader):
    """Base of the parsers of tool calls.

    A call whose name cannot be read is visible text. Arguments are passed on exactly as they were written, also those
    that end too early.

    Args:
        ids: makes the ids of calls.
        tokens: as for ``Reader``.
    """

    ID_LENGTH = 24
    """Hexadecimal characters of an id."""
    ID_PREFIX = "call_"

    def __init__(self, ids: CallIds, tokens: Collection[str] = ()):
        self._ids, self._calls = ids, 0
        super().__init__(tokens)

    def _begin(self, name: str) -> None:
        """Begins a call."""
        self._visible.marker()
        self._parts.append(
            Call(index=self._calls, id=f"{self.ID_PREFIX}{self._ids(self._calls)[: self.ID_LENGTH]}", name=name)
        )
        self._calls += 1

    def _argue(self, text: str) -> None:
        """Adds text to the arguments of the call that began last."""
        if text:
            self._parts.append(Arguments(index=self._calls - 1, text=text))

    def _object(self, *, known: frozenset[str] | None = None, bare: bool = False) -> Steps[bool]:
        """Reads a call: ``{"name": ..., "arguments": {...}}``, the keys in any order.

        Args:
            known: with another key it is no call. None: other keys are skipped.
            bare: without arguments it is no call. Otherwise they are ``{}``.

        Returns whether a call began. What follows its arguments and does not belong to it is left unread.
        """
        if not (yield from self._takes("{")):
            return False
        name: str | None = None
        held: list[str] = []  # arguments that stand before the name
        end: int | None = None  # of the arguments of the call that began
        more = True
        while more:
            yield from self._space()
            key = yield from self._string()
            yield from self._space()
            if key is None or not (yield from self._takes(":")) or (known is not None and key not in known):
                return self._broken(end)
            yield from self._space()
            if key == "name" and name is None:
                name = yield from self._string()
                if not name:
                    return self._broken(end)
                if held:
                    self._begin(name)
                    self._argue("".join(held))
                    end = self._at
            elif key in ARGUMENTS and end is None and not held:
                if not (yield from self._sees("{")):
                    return False
                if name is not None:
                    self._begin(name)
                whole = yield from self._nested(held.append if name is None else self._argue)
                if name is not None:
                    end = self._at
                if not whole:
                    return self._broken(end)
            elif not (yield from self._value()):
                return self._broken(end)
            yield from self._space()
            closed = yield from self._takes(",", "}")
            if closed is None:
                return self._broken(end)
            more = closed == ","
        if end is None and name is not None and not bare:
            self._begin(name)
            self._argue("{}")
            return True
        return end is not None

    def _broken(self, end: int | None) -> bool:
        """Goes back to the end of the arguments, if a call began. Returns whether one did."""
        self._at = self._at if end is None else end
        return end is not None


class Hermes(CallReader):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` anywhere in the text: Hermes, Qwen 2.5, Qwen 3."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def _read(self) -> Steps[None]:
        while (yield from self._until((self.OPEN,), self._say)):
            start = self._at - len(self.OPEN)
            yield from self._space()
            if (yield from self._object()):
                yield from self._space()
                yield from self._takes(self.CLOSE)
            else:
                self._say_from(start)


class Llama3(CallReader):
    """``{"name": ..., "parameters": {...}}`` at the beginning of the text or after ``<|python_tag|>``; further calls
    follow after a semicolon."""

    TAG = "<|python_tag|>"
    KNOWN = frozenset({"type", "name", "id", *ARGUMENTS})

    def _read(self) -> Steps[None]:
        yield from self._space()
        if (yield from self._sees("{")):
            yield from self._listed(0)
        else:
            self._at = 0
        while (yield from self._until((self.TAG,), self._say)):
            start = self._at - len(self.TAG)
            yield from self._space()
            yield from self._listed(start)

    def _listed(self, start: int) -> Steps[None]:
        """Reads calls one after the other. Without a call, what was read since ``start`` is visible text."""
        while (yield from self._object(known=self.KNOWN, bare=True)):
            start = self._at
            yield from self._space()
            yield from self._takes(";")
            yield from self._space()
            if not (yield from self._sees("{")):
                self._at = start
                break
        else:
            self._say_from(start)
        yield from ()
