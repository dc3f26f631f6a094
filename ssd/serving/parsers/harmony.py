"""Harmony, the format of the gpt-oss models: messages in channels for reasoning, calls and the answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from .json_calls import CallReader
from .parser import CallIds
from .parts import Reasoning, Text
from .reader import Steps, Trimmed

START, CHANNEL, MESSAGE, END, CALL, RETURN = (
    f"<|{name}|>" for name in ("start", "channel", "message", "end", "call", "return")
)
CONSTRAIN = "<|constrain|>"
MARKERS = (START, CHANNEL, MESSAGE, END, CALL, RETURN, CONSTRAIN)
NO_TOOLS = ("all", "assistant", "user")
"""Recipients of messages that are no calls."""
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


class _Messages:
    """Messages of one kind, a line break between them."""

    def __init__(self, give: Callable[[str], None]):
        self._give, self._trimmed = give, Trimmed(after_marker=True)
        self._some = self._apart = False

    def begin(self) -> None:
        self._trimmed.marker()
        self._apart = self._some

    def add(self, text: str) -> None:
        if visible := self._trimmed.add(text):
            self._give("\n" * self._apart + visible)
            self._some, self._apart = True, False


class Harmony(CallReader):
    """``<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…``. A message to
    ``functions.NAME`` is a call of NAME with the message as arguments. Messages in ``analysis`` are reasoning. All
    others are visible text, and so is text outside of messages.

    Args:
        header: the part of the first message's header that the prompt holds.
    """

    def __init__(self, ids: CallIds, header: str = "", tokens: Collection[str] = ()):
        self._header = header
        self._shown = _Messages(lambda text: self._parts.append(Text(text=text)))
        self._thought = _Messages(lambda text: self._parts.append(Reasoning(text=text)))
        super().__init__(ids, tokens)

    def _read(self) -> Steps[None]:
        header, headed = self._header, False
        ended: str | None = ""
        while ended is not None:
            if MESSAGE not in header and (headed or (yield from self._sees(CHANNEL, " to=", MESSAGE))):
                pieces: list[str] = []
                ended = yield from self._until((MESSAGE, END, CALL, RETURN, START), pieces.append)
                header += "".join(pieces)
                if ended is None and self._cut:
                    return
                if ended != MESSAGE:  # a header without a message
                    self._shown.begin()
                    self._shown.add(_words(header))
            else:
                ended = MESSAGE
            if ended == MESSAGE:
                ended = yield from self._until((END, CALL, RETURN, START, CHANNEL), self._message(header))
            header, headed = CHANNEL if ended == CHANNEL else "", ended in (START, CHANNEL)
            if ended in (END, CALL, RETURN):
                headed = (yield from self._takes(START)) is not None

    def _message(self, header: str) -> Callable[[str], None]:
        """Begins a message. Returns what takes its text."""
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        if recipient is not None and recipient[1] not in NO_TOOLS:
            self._begin(recipient[1].removeprefix("functions."))
            return self._argue
        messages = self._thought if channel is not None and channel[1] == "analysis" else self._shown
        messages.begin()
        return messages.add


def _words(header: str) -> str:
    """Returns what a header says, without its markers and the role."""
    for marker in MARKERS:
        header = header.replace(marker, " ")
    return header.strip().removeprefix("assistant").strip()
