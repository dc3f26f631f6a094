"""Tool calls of Mistral's models."""

from __future__ import annotations

from .json_calls import CallReader
from .reader import SPACE, Steps


class Mistral(CallReader):
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``, or ``[TOOL_CALLS]name[ARGS]{...}`` for each call."""

    OPEN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
    ID_LENGTH, ID_PREFIX = 9, ""
    """Mistral's chat templates refuse other ids."""

    def _read(self) -> Steps[None]:
        while (yield from self._until((self.OPEN,), self._say)):
            start = self._at - len(self.OPEN)
            yield from self._space()
            if (yield from self._takes("[")):
                yield from self._array(start)
            elif not (yield from self._object() if (yield from self._sees("{")) else self._named()):
                self._say_from(start)

    def _array(self, start: int) -> Steps[None]:
        """Reads calls up to the bracket that closes the array. The rest of an array that breaks off, or all since
        ``start``, is visible text."""
        while True:
            yield from self._space()
            if not (yield from self._object()):
                return self._say_from(start)
            start = self._at
            yield from self._space()
            closed = yield from self._takes(",", "]")
            if closed is None:
                self._at = start
            if closed != ",":
                return None

    def _named(self) -> Steps[bool]:
        """Reads a name and arguments. Returns whether a call began."""
        name = yield from self._run_of(lambda character: character not in SPACE + "[{")
        if (yield from self._takes(self.CALL_ID)):
            yield from self._run_of(str.isalnum)
        yield from self._takes(self.ARGS)
        yield from self._space()
        if not name or not (yield from self._sees("{")):
            return False
        self._begin(name)
        yield from self._nested(self._argue)
        return True
