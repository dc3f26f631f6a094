"""Random outputs of a grammar, as a model without any sense would write them."""

from __future__ import annotations

import random
from typing import Any

from ..grammars.compiler import Grammars
from ..request.structured import StructuredOutputsParams

_CLOSING = tuple('"]},')


class Walker:
    """Writes random outputs.

    Args:
        tokenizer: A fast tokenizer of transformers.
        vocabulary: V.
        ends: End-of-text ids.
    """

    def __init__(self, tokenizer: Any, *, vocabulary: int, ends: list[int]):
        self.grammars = Grammars(lambda: tokenizer, vocabulary=vocabulary, ends=ends)
        self._tokenizer, self._ends = tokenizer, set(ends)
        self._texts = texts = [tokenizer.decode([token]) for token in range(vocabulary)]
        self._closing = {token for token, text in enumerate(texts) if text.startswith(_CLOSING)}
        self._ending = {token for token, text in enumerate(texts) if text.startswith(_CLOSING[:3])}

    def tokens(self, text: str) -> list[int]:
        """Returns the tokens of a text, without any that mark its beginning."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def blanks(self) -> list[int]:
        """Returns the tokens that are nothing but whitespace."""
        return [token for token, text in enumerate(self._texts) if text and not text.strip()]

    def walk(self, wanted: StructuredOutputsParams, seed: int, *, limit: int = 300) -> tuple[str, bool]:
        """Returns an output of at most ``limit`` tokens, and whether it is complete.

        Tokens that end a string, an array or an object are preferred, after two thirds of the limit always.

        Raises:
            RequestError: The grammar cannot be compiled.
            AssertionError: It allows no token, or forbids one that it allowed.
        """
        matcher, rng, tokens = self.grammars.matcher(wanted), random.Random(seed), list[int]()
        while len(tokens) < limit and not matcher.complete:
            allowed = set(matcher.allowed([()])[0].nonzero().flatten().tolist())
            may_end = bool(allowed & self._ends)
            allowed -= self._ends
            late = len(tokens) > limit * 2 // 3
            if may_end and (late or not allowed or rng.random() < 0.5):
                return self._tokenizer.decode(tokens), True
            assert allowed, f"nothing may follow {self._tokenizer.decode(tokens)!r} ({matcher.error})"
            preferred = allowed & (self._ending if late else self._closing)
            if preferred and (late or rng.random() < 0.5):
                allowed = preferred
            token = rng.choice(sorted(allowed))
            assert matcher.advance(token), matcher.error
            tokens.append(token)
        return self._tokenizer.decode(tokens), matcher.complete
