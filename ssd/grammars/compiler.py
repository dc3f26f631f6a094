"""Grammars for structured output, compiled by ``llguidance`` (the only file that imports it).

A worker compiles a grammar once and copies its matcher for every request.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, NoReturn

import numpy as np

from ..errors import RequestError
from ..request.structured import StructuredOutputsParams
from .keys import KeyTokens
from .matcher import GrammarMatcher, next_mask, one_line, problem
from .schemas.prepare import PreparedSchema, prepare, subschemas

KEPT = 64
"""Compiled grammars that a worker keeps, those used last."""
MAX_WAITING = 4096
"""Grammars that were asked for and not taken yet."""
COMPILE_S = 20.0
"""How long a request waits for its grammar to be compiled."""
WHITESPACE = r" |\r?\n(?: {0,24}|\t{0,8})"
"""What may stand between two tokens of JSON, unless the request says otherwise: a blank, or a line break and an
indentation. It has an end, so that no model writes blanks until its limit."""
MASK_FUEL, MAX_STATES = 100_000, 50_000
"""Limits of llguidance: they bound the time of a mask and the memory of a grammar (about 2 kB for each state)."""
TRIALS, TRIAL_TOKENS, TRIAL_LEAST, TRIAL_S = 2, 32, 4, 0.3
"""Random outputs that are begun to see whether a grammar stays within the limits, the tokens of each at most and
at least, and the time for all."""
LOCATED, LOCATE_S = 200, 1.0
"""Most parts of a refused schema that are compiled by themselves to find the cause, and the time for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Compiled:
    """A grammar at the beginning of an output."""

    matcher: Any
    open_keys: bool


class Grammars:
    """Compiles grammars for one vocabulary, in a thread: rounds continue meanwhile, since llguidance compiles without
    holding the interpreter's lock.

    Args:
        tokenizer: Returns a fast tokenizer of transformers; called once, at the first request that needs it.
        vocabulary: V.
        ends: End-of-text ids.
    """

    def __init__(self, tokenizer: Callable[[], Any], *, vocabulary: int, ends: Iterable[int]):
        self._load, self._vocabulary, self._ends = tokenizer, vocabulary, list(ends)
        self._waiting = OrderedDict[StructuredOutputsParams, Future[_Compiled]]()
        """Grammars that were asked for and not taken yet. Evicting one would begin its compilation again at every
        question, so that more requests than are kept would wait for ever."""
        self._taken = OrderedDict[StructuredOutputsParams, Future[_Compiled]]()
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._lock = Lock()

    def ready(self, wanted: StructuredOutputsParams) -> bool:
        """Whether ``matcher`` answers without waiting. Starts to compile if nobody has asked before."""
        return self._started(wanted).done()

    def matcher(self, wanted: StructuredOutputsParams) -> GrammarMatcher:
        """Returns a matcher at the beginning of an output, once the grammar is compiled.

        Raises:
            RequestError: The grammar cannot be compiled, or not in time; the message says why in one line.
        """
        future = self._started(wanted)
        try:
            compiled = future.result(COMPILE_S)
        except TimeoutError:
            raise _refused(wanted, f"it was not compiled within {COMPILE_S:g} s; make it smaller") from None
        finally:
            self._take(wanted, future)
        return self._matching(wanted, compiled.matcher.deep_copy(), compiled.open_keys)

    def _matching(self, wanted: StructuredOutputsParams, matcher: Any, open_keys: bool) -> GrammarMatcher:
        keys = self._key_tokens if open_keys else None
        spell = self._tokenizer.greedy_tokenize
        return GrammarMatcher(matcher, self._vocabulary, spell=spell, kind=wanted.kind, keys=keys)

    def _started(self, wanted: StructuredOutputsParams) -> Future[_Compiled]:
        with self._lock:
            found = self._taken.get(wanted) or self._waiting.get(wanted)
            if found is None:
                found = self._waiting[wanted] = self._compiler.submit(self._compile, wanted)
                if len(self._waiting) > MAX_WAITING:
                    # Requests that were cancelled never take theirs.
                    self._waiting.pop(next((one for one, future in self._waiting.items() if future.done()), wanted))
            return found

    def _take(self, wanted: StructuredOutputsParams, future: Future[_Compiled]) -> None:
        with self._lock:
            self._waiting.pop(wanted, None)
            self._taken[wanted] = future
            self._taken.move_to_end(wanted)
            if len(self._taken) > KEPT:
                self._taken.popitem(last=False)

    @cached_property
    def _tokenizer(self) -> Any:
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._load(), n_vocab=self._vocabulary, eos_token=self._ends or None)
        except ValueError as error:
            raise RequestError(f"structured_outputs does not work with this model's tokenizer: {error}") from None

    @cached_property
    def _key_tokens(self) -> KeyTokens:
        return KeyTokens([self._tokenizer.decode_bytes([token]) for token in range(self._vocabulary)])

    def _compile(self, wanted: StructuredOutputsParams) -> _Compiled:
        if wanted.kind not in ("json", "json_object"):
            try:
                matcher = self._built(_grammar(wanted))
            except ValueError as error:
                raise _refused(wanted, str(error)) from None
            return self._tried(wanted, _Compiled(matcher=matcher, open_keys=False))
        try:
            schema = _parsed(wanted)
            prepared = prepare(schema, closed=wanted.disable_additional_properties)
        except (ValueError, RecursionError) as error:
            raise _refused(wanted, str(error)) from None
        try:
            matcher = self._built(_json_grammar(wanted, prepared))
        except ValueError as error:
            raise _refused(wanted, self._located(wanted, schema) or str(error)) from None
        return self._tried(wanted, _Compiled(matcher=matcher, open_keys=prepared.open_keys))

    def _built(self, grammar: str) -> Any:
        """Returns the matcher of a grammar in llguidance's notation. Raises: ValueError."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(step_lexer_fuel=MASK_FUEL, max_lexer_states=MAX_STATES)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if (wrong := problem(matcher)) is not None:
            raise ValueError(wrong)
        return matcher

    def _tried(self, wanted: StructuredOutputsParams, compiled: _Compiled) -> _Compiled:
        """Returns the grammar after some random outputs of it were begun.

        Raises:
            RequestError: No text matches, the tokenizer cannot write it, or the library's limits are exceeded.
        """
        ends = [end for end in self._ends if 0 <= end < self._vocabulary]
        began, rng = time.monotonic(), np.random.default_rng(0)
        for _ in range(TRIALS):
            matcher, tokens = compiled.matcher.deep_copy(), list[int]()
            for position in range(TRIAL_TOKENS):
                mask = next_mask(matcher, self._vocabulary, self._tokenizer.greedy_tokenize)
                if (wrong := problem(matcher)) is not None:
                    raise _refused(wanted, wrong)
                mask[ends] = False
                if not mask.any():
                    if not matcher.is_accepting():
                        raise _refused(wanted, self._dead_end(compiled, tokens))
                    break
                tokens.append(int(rng.choice(np.flatnonzero(mask))))
                matcher.try_consume_tokens(tokens[-1:])
                if (wrong := problem(matcher)) is not None:
                    raise _refused(wanted, wrong)
                late = position >= TRIAL_LEAST and time.monotonic() - began > TRIAL_S
                if matcher.is_stopped() or late:
                    break
        return compiled

    def _dead_end(self, compiled: _Compiled, tokens: list[int]) -> str:
        """Returns why nothing can follow some tokens."""
        matcher = compiled.matcher.deep_copy()
        matcher.try_consume_tokens(tokens)
        text, written = matcher.compute_ff_bytes().decode(errors="replace"), self._tokenizer.decode_str(tokens)
        if not tokens:
            return f"the model's tokenizer cannot write {text!r}" if text else "no text matches"
        if not text:
            return f"no token of the model can follow {written!r}"
        return f"the model's tokenizer cannot write {text!r} after {written!r}"

    def _located(self, wanted: StructuredOutputsParams, schema: Any) -> str | None:
        """Returns the library's error about the smallest part of a schema that it refuses, with that part's path."""
        until = time.monotonic() + LOCATE_S
        for count, path in enumerate(subschemas(schema)):
            if count >= LOCATED or time.monotonic() > until:
                return None
            try:
                self._built(_json_grammar(wanted, prepare(schema, at=path)))
            except ValueError as error:
                return f"{error} (at {path})"
        return None


def _parsed(wanted: StructuredOutputsParams) -> Any:
    """Returns the schema that the output follows. Raises: ValueError: it is not JSON."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    if wanted.json_object:
        return {"type": "object"}
    assert isinstance(wanted.json, str)
    return json.loads(wanted.json, parse_constant=refuse)


def _json_grammar(wanted: StructuredOutputsParams, prepared: PreparedSchema) -> str:
    from llguidance import LLMatcher

    options: Any = {"whitespace_pattern": wanted.whitespace_pattern or WHITESPACE}
    if wanted.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    # The library takes options beside an object only.
    schema = prepared.schema if isinstance(prepared.schema, dict) else {"anyOf": [prepared.schema]}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)


def _grammar(wanted: StructuredOutputsParams) -> str:
    """Returns the grammar in llguidance's notation. Raises: ValueError."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, wanted.choice)))
    assert wanted.grammar is not None
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(wanted.grammar))
    except GbnfToLarkError as error:
        raise ValueError(str(error)) from None


def _refused(wanted: StructuredOutputsParams, why: str) -> RequestError:
    return RequestError(f"structured_outputs.{wanted.kind} cannot be used: {one_line(why)}")
