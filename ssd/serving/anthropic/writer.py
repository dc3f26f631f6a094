"""A message of the Messages API, written from the parts of an answer: as events, and whole."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from ...request.output import RequestOutput
from ..parsers.parts import Arguments, Call, Part, Reasoning

Event = dict[str, Any]
PING: Event = {"type": "ping"}
BROKEN = "INVALID_JSON"
"""Key of a tool's input that is no JSON object, as Anthropic's documentation proposes. The value is its text."""
DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}
"""By type of block: the type of its deltas, and the field of block and delta that holds the text."""
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
INPUT_DELTA = ("input_json_delta", "partial_json")


class MessageWriter:
    """Writes one message. Methods return the events of what they add to it.

    Args:
        name: id of the message.
        model: the name of the model.
        input_tokens: of the prompt.
        stop_sequences: that the client asked for.
    """

    def __init__(self, *, name: str, model: str, input_tokens: int, stop_sequences: Collection[str] = ()):
        self._stop_sequences = stop_sequences
        self._content: list[dict[str, Any]] = []
        self._growing = False
        """Whether the last block of the content still grows."""
        self._pieces: list[str] = []
        """Text of the block that grows."""
        self.message: dict[str, Any] = {
            "id": name,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": self._content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(input_tokens, cached=0, output=0),
        }
        """The message, whole after ``end``."""

    def begin(self) -> list[Event]:
        """Begins the message. It is still empty."""
        return [{"type": "message_start", "message": {**self.message, "content": []}}, PING]

    def add(self, part: Part) -> list[Event]:
        """Adds a part: to the block that grows if it is of the same kind, otherwise to a new one."""
        if isinstance(part, Call):
            return self._begin_block({"type": "tool_use", "id": part.id, "name": part.name, "input": {}})
        if not part.text:
            return []
        if isinstance(part, Arguments):
            return [self._delta(*INPUT_DELTA, part.text)]
        kind = "thinking" if isinstance(part, Reasoning) else "text"
        delta, field = DELTAS[kind]
        events: list[Event] = []
        if not self._growing or self._content[-1]["type"] != kind:
            signature = {"signature": ""} if kind == "thinking" else {}
            events = self._begin_block({"type": kind, field: "", **signature})
        return [*events, self._delta(delta, field, part.text)]

    def end(
        self, output: RequestOutput, finish_reason: str, *, thinking_tokens: int, more: Mapping[str, Any]
    ) -> list[Event]:
        """Ends the message.

        Args:
            finish_reason: ``stop``, ``length`` or ``tool_calls``.
            thinking_tokens: tokens of the reasoning.
            more: further fields of the message, and of the event with its usage.
        """
        events = self._end_block()
        found = finish_reason == "stop" and output.stop_reason in self._stop_sequences
        stop = output.stop_reason if found else None
        reason = "stop_sequence" if found else STOP_REASONS[finish_reason]
        ending = {"stop_reason": reason, "stop_sequence": stop}
        usage = _usage(len(output.prompt_token_ids), cached=output.num_cached_tokens, output=len(output.token_ids))
        if thinking_tokens:
            usage["output_tokens_details"] = {"thinking_tokens": min(thinking_tokens, len(output.token_ids))}
        self.message |= {**ending, "usage": usage, **more}
        return [*events, {"type": "message_delta", "delta": ending, "usage": usage, **more}, {"type": "message_stop"}]

    def _begin_block(self, block: dict[str, Any]) -> list[Event]:
        ended = self._end_block()
        self._content.append(block)
        self._growing = True
        # The block is changed when it ends.
        return [*ended, {"type": "content_block_start", "index": len(self._content) - 1, "content_block": {**block}}]

    def _delta(self, kind: str, field: str, text: str) -> Event:
        self._pieces.append(text)
        index = len(self._content) - 1
        return {"type": "content_block_delta", "index": index, "delta": {"type": kind, field: text}}

    def _end_block(self) -> list[Event]:
        if not self._growing:
            return []
        block, text = self._content[-1], "".join(self._pieces)
        if block["type"] == "tool_use":
            block["input"] = _input(text)
        else:
            block[DELTAS[block["type"]][1]] = text
        self._growing, self._pieces = False, []
        return [{"type": "content_block_stop", "index": len(self._content) - 1}]


def _input(text: str) -> dict[str, Any]:
    """Returns a tool's input. An answer cut short may end within its JSON."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {BROKEN: text}
    return value if isinstance(value, dict) else {BROKEN: text}


def _usage(prompt: int, *, cached: int, output: int) -> dict[str, Any]:
    """Returns ``usage``. Counts are tokens; ``input_tokens`` are those that did not come from the prefix cache."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": output,
    }
