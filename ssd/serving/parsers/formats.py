"""Which formats there are, and which of them a model writes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from . import harmony
from .harmony import Harmony
from .json_calls import CallReader, Hermes, Llama3
from .mistral import Mistral
from .parser import CallIds, Chain, FirstCall, MakeParser, Parser, Plain
from .qwen3_xml import Qwen3XML
from .reasoning import Hidden, Think

AUTO, NONE = "auto", "none"
GPT_OSS = "gpt_oss"
CALL_FORMATS: dict[str, tuple[str, ...]] = {
    "hermes": (Hermes.OPEN, Hermes.CLOSE),
    "qwen3_xml": (Qwen3XML.OPEN, Qwen3XML.CLOSE),
    "llama3_json": (Llama3.TAG,),
    "mistral": (Mistral.OPEN, Mistral.CALL_ID, Mistral.ARGS),
    GPT_OSS: harmony.MARKERS,
}
"""Formats of tool calls, and the markers of each."""
REASONING_FORMATS: dict[str, tuple[str, ...]] = {
    "think": ("<think>", "</think>"),
    "deepseek_r1": ("<think>", "</think>"),
    "mistral": ("[THINK]", "[/THINK]"),
    GPT_OSS: harmony.MARKERS,
}
"""Formats of reasoning, and the markers of each."""


class Thinking(Enum):
    """Whether an answer begins with reasoning."""

    NO = auto()
    INSIDE = auto()
    """The prompt holds the first marker."""
    PERHAPS = auto()


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    schema: Mapping[str, Any]
    """JSON schema of the arguments."""
    strict: bool = False
    """Whether the arguments must follow the schema even where the model is free to call or not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerFormat:
    """How a model writes reasoning and tool calls."""

    calls: str
    """One of ``CALL_FORMATS``, or ``none``."""
    reasoning: str
    """One of ``REASONING_FORMATS``, or ``none``."""
    tokens: Mapping[str, int]
    """Ids of the markers that are tokens."""
    hidden: tuple[str, ...]
    """Texts of the special tokens that nobody should see. None of them contains another."""
    special: bool
    """Whether some markers are special tokens: the answer must be decoded with its special tokens then."""

    @classmethod
    def of(cls, tokenizer: Any, template: str | None, *, calls: str = AUTO, reasoning: str = AUTO) -> AnswerFormat:
        """Reads the tokens of a tokenizer.

        Args:
            tokenizer: of the target.
            template: text of the chat template.
            calls, reasoning: names of formats; ``auto`` chooses by the markers in vocabulary and template.
        """
        added = {token.content: (id, token.special) for id, token in tokenizer.added_tokens_decoder.items()}
        known = {*added, *(marker for marker in _ALL_MARKERS if marker in (template or ""))}
        calls = _calls(known, template or "") if calls == AUTO else calls
        reasoning = _reasoning(known) if reasoning == AUTO else reasoning
        if GPT_OSS in (calls, reasoning):  # one parser reads both
            calls = reasoning = GPT_OSS
        markers = {*CALL_FORMATS.get(calls, ()), *REASONING_FORMATS.get(reasoning, ())}
        specials = {text for text, (_id, special) in added.items() if special and text}
        return cls(
            calls=calls,
            reasoning=reasoning,
            tokens={marker: added[marker][0] for marker in sorted(markers & set(added))},
            hidden=tuple(sorted(_innermost(specials - markers))),
            special=bool(markers & specials),
        )

    def thinking(self, prompt_end: str) -> Thinking:
        """Returns whether the answer to a prompt begins with reasoning.

        Args:
            prompt_end: the last characters of the prompt, special tokens included.
        """
        if self.reasoning in (NONE, GPT_OSS):
            return Thinking.NO
        opening, closing = REASONING_FORMATS[self.reasoning]
        end = prompt_end.rstrip()
        if end.endswith(closing):
            return Thinking.NO
        return Thinking.INSIDE if end.endswith(opening) or self.reasoning == "deepseek_r1" else Thinking.PERHAPS

    def parser(
        self,
        prompt_end: str,
        *,
        tools: Sequence[Tool] | None,
        first_only: bool = False,
        thinks: bool = True,
        show_specials: bool = False,
    ) -> MakeParser:
        """Returns what makes the parser of an answer.

        Args:
            prompt_end: the last characters of the prompt, special tokens included.
            tools: what the model may call. None: nothing, so that the text of a call is text.
            first_only: leave out all calls but the first.
            thinks: whether the answer may hold reasoning.
            show_specials: keep special tokens that are no markers in the text.
        """
        stages: list[Callable[[CallIds], Parser]] = []
        if self.special and self.hidden and not show_specials:
            stages.append(lambda _ids: Hidden(self.hidden))
        if self.calls == GPT_OSS:
            header = prompt_end.rpartition(harmony.START)[2] if harmony.START in prompt_end else ""
            stages.append(lambda ids: Harmony(ids, header, self.tokens))
        else:
            thinking = self.thinking(prompt_end) if thinks else Thinking.NO
            if thinking is not Thinking.NO:
                opening, closing = REASONING_FORMATS[self.reasoning]
                stages.append(
                    lambda _ids: Think(opening, closing, inside=thinking is Thinking.INSIDE, tokens=self.tokens)
                )
            if tools is not None and self.calls != NONE:
                stages.append(lambda ids: _reader(self.calls, ids, tools, self.tokens))
        return lambda ids: _joined([make(ids) for make in stages], first_only)


def _joined(stages: Sequence[Parser], first_only: bool) -> Parser:
    whole: Parser = stages[0] if stages else Plain()
    for stage in stages[1:]:
        whole = Chain(whole, stage)
    return FirstCall(whole) if first_only else whole


def _reader(name: str, ids: CallIds, tools: Sequence[Tool], tokens: Collection[str]) -> Parser:
    if name == "qwen3_xml":
        return Qwen3XML(ids, {tool.name: tool.schema for tool in tools}, tokens)
    readers: dict[str, type[CallReader]] = {"hermes": Hermes, "llama3_json": Llama3, "mistral": Mistral}
    return readers[name](ids, tokens)


_ALL_MARKERS = {
    marker for formats in (CALL_FORMATS, REASONING_FORMATS) for group in formats.values() for marker in group
}


def _calls(known: set[str], template: str) -> str:
    if {harmony.CHANNEL, harmony.MESSAGE} <= known:
        return GPT_OSS
    if Mistral.OPEN in known:
        return "mistral"
    if Qwen3XML.FUNCTION in template and Qwen3XML.PARAMETER in template:
        return "qwen3_xml"
    if Hermes.OPEN not in known and Llama3.TAG in known:
        return "llama3_json"
    return "hermes"


def _reasoning(known: set[str]) -> str:
    for name, markers in REASONING_FORMATS.items():
        if {*markers} <= known:
            return name
    return NONE


def _innermost(texts: set[str]) -> set[str]:
    """Returns the texts that contain no other."""
    return {text for text in texts if not any(other != text and other in text for other in texts)}
