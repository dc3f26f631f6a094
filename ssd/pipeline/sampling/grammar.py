"""Grammars for structured output, compiled and matched by ``llguidance`` (the only file that imports it).

A worker compiles a grammar once and copies its matcher for every request. A matcher's state is that after the certain
tokens of its sequence; for the row of a candidate a copy consumes the candidate's path. Draft and verifier have one
each, so that the draft proposes what the target may choose.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import RequestError
from ...request.structured import StructuredOutputsParams

KEPT = 64
"""Compiled grammars that a worker keeps, those used last."""


class GrammarMatcher:
    """The state of one output in its grammar (a ``decoding.processors.Constraint``).

    Args:
        matcher: ``llguidance.LLMatcher``.
        vocabulary: V.
    """

    def __init__(self, matcher: Any, vocabulary: int):
        self._matcher, self._vocabulary = matcher, vocabulary

    @property
    def complete(self) -> bool:
        """Whether the output is complete, so that nothing may follow."""
        return bool(self._matcher.is_stopped() and self._matcher.is_accepting())

    @property
    def error(self) -> str | None:
        """Why the library gave up, for example at one of its limits; None if it did not."""
        return _problem(self._matcher)

    def advance(self, token: int) -> bool:
        """Consumes a certain token. Returns False, and changes nothing, if the grammar does not allow it."""
        return self._matcher.try_consume_tokens([token]) == 1

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
                forced = matcher.compute_ff_tokens()[: len(chain) - taken]
        return [*chain[:taken], *forced, *chain[taken + len(forced) :]] if forced else list(chain)

    def _mask(self, path: tuple[int, ...]) -> np.ndarray:
        """``[V]`` bool."""
        # A copy: an error on a candidate's path must not affect the sequence.
        matcher = self._matcher.deep_copy() if path else self._matcher
        taken = matcher.try_consume_tokens(list(path)) if path else 0
        if taken < len(path) and not matcher.is_stopped():
            return np.ones(self._vocabulary, dtype=bool)
        packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(packed, count=self._vocabulary, bitorder="little").astype(bool)


class Grammars:
    """Compiles grammars for one vocabulary, in a thread: rounds go on meanwhile, since llguidance compiles without
    holding the interpreter's lock.

    Args:
        tokenizer: returns a fast tokenizer of transformers; called once, at the first request that needs it.
        vocabulary: V.
        ends: end-of-text ids.
    """

    def __init__(self, tokenizer: Callable[[], Any], *, vocabulary: int, ends: Iterable[int]):
        self._load, self._vocabulary, self._ends = tokenizer, vocabulary, list(ends)
        self._compiled: OrderedDict[StructuredOutputsParams, Future[Any]] = OrderedDict()
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def ready(self, wanted: StructuredOutputsParams) -> bool:
        """Whether ``matcher`` answers without waiting. Starts to compile if nobody has asked before."""
        return self._started(wanted).done()

    def matcher(self, wanted: StructuredOutputsParams) -> GrammarMatcher:
        """Returns a matcher at the beginning of an output, once the grammar is compiled.

        Raises:
            RequestError: the grammar cannot be compiled; the message says why in one line.
        """
        return GrammarMatcher(self._started(wanted).result().deep_copy(), self._vocabulary)

    def _started(self, wanted: StructuredOutputsParams) -> Future[Any]:
        if wanted not in self._compiled:
            self._compiled[wanted] = self._compiler.submit(self._compile, wanted)
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(wanted)
        return self._compiled[wanted]

    @cached_property
    def _tokenizer(self) -> Any:
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._load(), n_vocab=self._vocabulary, eos_token=self._ends or None)
        except ValueError as error:
            raise RequestError(f"structured_outputs does not work with this model's tokenizer: {error}") from None

    def _compile(self, wanted: StructuredOutputsParams) -> Any:
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._tokenizer, _grammar(wanted), log_level=0)
        except (ValueError, RecursionError) as error:
            raise _refused(wanted, str(error)) from None
        first = GrammarMatcher(matcher, self._vocabulary).allowed([()])[0]
        if (problem := _problem(matcher)) is not None:
            raise _refused(wanted, problem)
        first[self._ends] = False
        if not first.any() and not matcher.is_accepting():
            raise _refused(wanted, "no text matches")
        return matcher


def _grammar(wanted: StructuredOutputsParams) -> str:
    """Returns the grammar in llguidance's notation. Raises: ValueError."""
    import json

    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, wanted.choice)))
    if wanted.grammar is not None:
        try:
            return LLMatcher.grammar_from_lark(any_to_lark(wanted.grammar))
        except GbnfToLarkError as error:
            raise ValueError(str(error)) from None
    schema = '{"type":"object"}' if wanted.json_object else wanted.json
    options: Any = {}
    if wanted.disable_any_whitespace:
        options["whitespace_flexible"] = False
    if wanted.whitespace_pattern:
        options["whitespace_pattern"] = wanted.whitespace_pattern
    assert isinstance(schema, str)
    json.loads(schema)  # its error message refers to the schema; llguidance's refers to its own notation
    return LLMatcher.grammar_from_json_schema(schema, overrides=options or None)


def _refused(wanted: StructuredOutputsParams, why: str) -> RequestError:
    return RequestError(f"structured_outputs.{wanted.kind} cannot be used: {_one_line(why)}")


def _problem(matcher: Any) -> str | None:
    """Returns a matcher's error, if any. That no token fits is not one."""
    message = _one_line(matcher.get_error()) if matcher.is_error() else ""
    return None if message in ("", "NoExtensionBias") else message


def _one_line(message: str) -> str:
    """Returns llguidance's message without the parser's state."""
    return " ".join(message.split("<state>")[0].split())[:300]
