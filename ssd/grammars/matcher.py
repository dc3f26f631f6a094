"""The state of one output in its grammar.

Draft and verifier have one each, so that the draft proposes what the target may choose. A matcher's state is that after
the certain tokens of its sequence; for the row of a candidate a copy consumes the candidate's path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .keys import KeyScan, KeyTokens

_LIMIT_WORDS = ("too many", "too large", "fuel", "limit", "max is")
"""In messages about the library's limits."""
_TOO_LARGE = "it is too large or too ambiguous"


class GrammarMatcher:
    """The state of one output in its grammar (a ``decoding.processors.Constraint``).

    Args:
        matcher: ``llguidance.LLMatcher``.
        vocabulary: V.
        spell: Returns a text as ordinary tokens, never as special ones.
        kind: What kind of grammar it is, for messages.
        keys: Tokens that can complete a key; None if the grammar itself keeps keys apart.
    """

    def __init__(
        self,
        matcher: Any,
        vocabulary: int,
        *,
        spell: Callable[[str], list[int]],
        kind: str,
        keys: KeyTokens | None,
    ):
        self._matcher, self._vocabulary, self._spell = matcher, vocabulary, spell
        self._kind, self._keys = kind, keys
        self._scan = KeyScan()
        self._failure: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the output is complete, so that nothing may follow."""
        return bool(self._matcher.is_stopped() and self._matcher.is_accepting())

    @property
    def error(self) -> str | None:
        """Why the grammar cannot continue, for example because of one of the library's limits; None if it can."""
        return self._failure

    def advance(self, token: int) -> bool:
        """Consumes a certain token. Returns False, and changes nothing but ``error``, if the grammar does not allow
        it."""
        if self._matcher.try_consume_tokens([token]) == 1:
            if self._keys is not None:
                self._scan = self._keys.after(self._scan, [token])
            return True
        # The row's mask came from a copy of the matcher, so its error is not in this one.
        copy = self._matcher.deep_copy()
        packed = copy.compute_bitmask()
        why = problem(copy) or (None if any(packed) else "no token can follow the output so far")
        self._failure = None if why is None else f"structured_outputs.{self._kind} cannot continue: {one_line(why)}"
        return False

    def allowed(self, paths: Sequence[Sequence[int]]) -> Tensor:
        """Returns what may follow the certain tokens and each path, ``[R, V]`` bool on the host.

        End-of-text ids may follow where the output may end, and nothing else once it is complete. Everything may follow
        a path that the grammar does not allow, because such a row is never reached.
        """
        masks: dict[tuple[int, ...], np.ndarray] = {}
        rows = [tuple(path) for path in paths]
        for path in rows:
            if path not in masks:
                masks[path] = self._mask(path)
        return torch.from_numpy(np.stack([masks[path] for path in rows]))

    def mended(self, path: Sequence[int], chain: Sequence[int]) -> list[int]:
        """Returns the chain after the certain tokens and ``path``. From its first token that is not allowed, the tokens
        that the grammar forces replace its own."""
        matcher, forced = self._matcher.deep_copy(), []
        if matcher.try_consume_tokens(list(path)) == len(path):
            taken = matcher.try_consume_tokens(list(chain))
            if taken < len(chain) and not matcher.is_stopped():
                forced = forced_tokens(matcher, self._spell)[: len(chain) - taken]
        return [*chain[:taken], *forced, *chain[taken + len(forced) :]] if forced else list(chain)

    def _mask(self, path: tuple[int, ...]) -> np.ndarray:
        """``[V]`` bool."""
        # A copy: an error on a candidate's path must not affect the sequence.
        matcher = self._matcher.deep_copy() if path else self._matcher
        taken = matcher.try_consume_tokens(list(path)) if path else 0
        if taken < len(path) and not matcher.is_stopped():
            return np.ones(self._vocabulary, dtype=bool)
        mask = next_mask(matcher, self._vocabulary, self._spell)
        return mask if self._keys is None else self._keys.restrict(mask, self._keys.after(self._scan, path))


def next_mask(matcher: Any, vocabulary: int, spell: Callable[[str], list[int]]) -> np.ndarray:
    """Returns what may follow in a matcher's state, ``[V]`` bool.

    Where only one text can follow, llguidance allows the first token of the tokenizer's encoding of it. This may be a
    token that stands for something else: a special token whose name is the text, or the token of a normalized text. No
    such token can be consumed, and a token that spells the text replaces it.
    """
    packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    mask = np.unpackbits(packed, count=vocabulary, bitorder="little").astype(bool)
    if np.count_nonzero(mask) == 1 and not matcher.is_stopped():
        [allowed] = np.flatnonzero(mask).tolist()
        if not matcher.is_accepting() and not matcher.validate_tokens([allowed]):
            mask[allowed] = False
            mask[forced_tokens(matcher, spell)[:1]] = True
    return mask


def forced_tokens(matcher: Any, spell: Callable[[str], list[int]]) -> list[int]:
    """Returns the tokens that must follow in a matcher's state, as far as they can be consumed."""
    tokens = matcher.compute_ff_tokens()
    valid = matcher.validate_tokens(tokens) if tokens else 0
    if valid == len(tokens):
        return tokens
    after = matcher.deep_copy()
    after.try_consume_tokens(tokens[:valid])
    # The byte 0xFF, which is in no text, opens a special token that the grammar names.
    text = after.compute_ff_bytes().partition(b"\xff")[0].decode(errors="ignore")
    spelt = spell(text)
    return [*tokens[:valid], *spelt[: after.validate_tokens(spelt) if spelt else 0]]


def problem(matcher: Any) -> str | None:
    """Returns a matcher's error, if any. That no token fits is not one."""
    message = one_line(matcher.get_error()) if matcher.is_error() else ""
    return None if message in ("", "NoExtensionBias") else message


def one_line(message: str) -> str:
    """Returns llguidance's message without the parser's state, in one line."""
    line = " ".join(message.split("<state>")[0].split())[:300]
    if line.startswith(_TOO_LARGE) or not any(word in line for word in _LIMIT_WORDS):
        return line
    return f"{_TOO_LARGE} ({line})"
