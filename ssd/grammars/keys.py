"""Keys of JSON objects, each at most once.

A grammar cannot remember which keys an object has, so it lets a model repeat one for ever where names are free. The
scanner here follows the output and tells which tokens would complete a key that its object already has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

_QUOTE, _ESCAPE = ord('"'), ord("\\")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyScan:
    """Where in a JSON text an output stands, as far as keys matter."""

    open: tuple[frozenset[bytes] | None, ...] = ()
    """The keys of every open object, outermost first; None for an array."""
    expects_key: bool = False
    text: bytes | None = None
    """The key that is being written, or anything within another string; None outside of strings."""
    in_key: bool = False
    escaped: bool = False
    repeated: bool = False
    """Whether an object got a key for the second time."""

    def after(self, data: bytes) -> KeyScan:
        """Returns the state after more of the output."""
        opened, expects, text, in_key = list(self.open), self.expects_key, self.text, self.in_key
        escaped, repeated = self.escaped, self.repeated
        for byte in data:
            if text is not None:
                if escaped or byte != _QUOTE:
                    escaped = byte == _ESCAPE and not escaped
                    text = text + bytes((byte,)) if in_key else text
                    continue
                if in_key and opened and (keys := opened[-1]) is not None:
                    repeated |= text in keys
                    opened[-1] = keys | {text}
                text = None
            elif byte == _QUOTE:
                text, in_key, expects = b"", expects, False
            elif byte == ord("{"):
                opened.append(frozenset())
                expects = True
            elif byte == ord("["):
                opened.append(None)
                expects = False
            elif byte in b"}]":
                del opened[-1:]
                expects = False
            elif byte == ord(","):
                expects = bool(opened) and opened[-1] is not None
        return KeyScan(
            open=tuple(opened), expects_key=expects, text=text, in_key=in_key, escaped=escaped, repeated=repeated
        )

    @property
    def may_repeat(self) -> bool:
        """Whether a key could be repeated before another object opens or closes."""
        return any(keys for keys in self.open)

    @property
    def at_key(self) -> bool:
        """Whether a key is being written, or comes next."""
        return self.expects_key or (self.text is not None and self.in_key)


class KeyTokens:
    """The tokens of a vocabulary that can complete a key.

    Args:
        tokens: The bytes of every token.
    """

    def __init__(self, tokens: Sequence[bytes]):
        self._tokens = tokens
        quotes = np.array([token.count(b'"') for token in tokens])
        self._closing, self._whole = np.flatnonzero(quotes >= 1), np.flatnonzero(quotes >= 2)

    def after(self, scan: KeyScan, path: Sequence[int]) -> KeyScan:
        """Returns the state after these tokens."""
        return scan.after(b"".join(self._tokens[token] for token in path))

    def restrict(self, mask: np.ndarray, scan: KeyScan) -> np.ndarray:
        """Returns a token mask ``[V]`` without the tokens that would repeat a key.

        Returns the mask itself if there are none, or if nothing would be left: then the schema has fewer names than its
        object needs.
        """
        if not scan.may_repeat:
            return mask
        start = replace(scan, repeated=False)
        candidates = self._closing if scan.at_key else self._whole
        repeating = [t for t in candidates[mask[candidates]] if start.after(self._tokens[t]).repeated]
        if not repeating:
            return mask
        left = mask.copy()
        left[repeating] = False
        return left if left.any() else mask
