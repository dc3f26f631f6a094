"""Text that a model thinks before it answers, and special tokens that nobody should see."""

from __future__ import annotations

from collections.abc import Collection

from .parts import Reasoning, Text
from .reader import Reader, Steps, Trimmed


class Think(Reader):
    """Reasoning between two markers at the beginning of the answer. Later markers are text.

    Args:
        inside: whether the answer begins inside, because the prompt holds the first marker. One at the beginning of the
            answer is dropped then.
    """

    def __init__(self, opening: str, closing: str, *, inside: bool, tokens: Collection[str] = ()):
        self._opening, self._closing, self._inside = opening, closing, inside
        self._thought = Trimmed(after_marker=True)
        super().__init__(tokens)

    def _read(self) -> Steps[None]:
        yield from self._space()
        start = self._at
        if not (yield from self._takes(self._opening)) and not self._inside:
            self._at = 0 if self._at == start else self._at  # what was cut off is dropped
            return
        if (yield from self._until((self._closing,), self._think)):
            self._visible.marker()

    def _think(self, text: str) -> None:
        if visible := self._thought.add(text):
            self._parts.append(Reasoning(text=visible))


class Hidden(Reader):
    """Everything but the texts of some special tokens is visible.

    Args:
        specials: none of them contains another.
    """

    def __init__(self, specials: tuple[str, ...]):
        self._specials = specials
        super().__init__(specials)

    def _read(self) -> Steps[None]:
        while (yield from self._until(self._specials, self._say)):
            pass

    def _say(self, text: str) -> None:
        if text:
            self._parts.append(Text(text=text))
