"""A response of the Responses API, written from the parts of an answer: as events, and whole."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ...request.output import RequestOutput
from ..http.errors import APIError
from ..parsers.parts import Arguments, Call, Part, Reasoning

Event = dict[str, Any]
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
"""Of the ids of output items, by type."""
PARTS = {
    "message": {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
    "reasoning": {"type": "reasoning_text", "text": ""},
}
"""The one content part of an output item, by the item's type."""


class ResponseWriter:
    """Writes one response. Methods return the events of what they add to it.

    Args:
        head: fields of the response that are known before it begins.
    """

    def __init__(self, head: Mapping[str, Any]):
        self._output: list[dict[str, Any]] = []
        self._growing = False
        """Whether the last output item still grows."""
        self._pieces: list[str] = []
        """Text of the item that grows."""
        self._logprobs: list[Mapping[str, Any]] = []
        """Log-probabilities of the message that grows."""
        self._count = 0
        """Events so far."""
        self.response: dict[str, Any] = {
            **head,
            "status": "in_progress",
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": self._output,
            "usage": None,
        }
        """The response, whole after ``end`` or ``fail``."""

    def begin(self) -> list[Event]:
        """Begins the response. It is still empty."""
        empty = {**self.response, "output": []}
        return [self._event("response.created", response=empty), self._event("response.in_progress", response=empty)]

    def add(self, part: Part, logprobs: Sequence[Mapping[str, Any]] = ()) -> list[Event]:
        """Adds a part: to the output item that grows if it is of the same kind, otherwise to a new one.

        Args:
            logprobs: log-probabilities of the part's tokens, if it is text.
        """
        if isinstance(part, Call):
            return self._begin_item("function_call", call_id=part.id, name=part.name, arguments="")
        if not part.text:
            return []
        if isinstance(part, Arguments):
            return [self._delta("response.function_call_arguments.delta", part.text)]
        kind = "reasoning" if isinstance(part, Reasoning) else "message"
        events: list[Event] = []
        if not self._growing or self._output[-1]["type"] != kind:
            own = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
            events = self._begin_item(kind, **own, content=[])
            events.append(self._event("response.content_part.added", **self._place, part=PARTS[kind]))
        if kind == "reasoning":
            return [*events, self._delta("response.reasoning_text.delta", part.text, content_index=0)]
        self._logprobs += logprobs
        delta = self._delta("response.output_text.delta", part.text, content_index=0, logprobs=list(logprobs))
        return [*events, delta]

    def end(self, output: RequestOutput, *, reasoning_tokens: int, more: Mapping[str, Any]) -> list[Event]:
        """Ends the response.

        Args:
            reasoning_tokens: tokens of the reasoning.
            more: further fields of the response.
        """
        cut = output.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        events = self._end_item(status)
        self.response |= {
            **more,
            "status": status,
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": usage(output, reasoning_tokens),
        }
        return [*events, self._event(f"response.{status}", response=self.response)]

    def fail(self, error: APIError) -> list[Event]:
        """Ends the response with an error."""
        events = self._end_item("incomplete")
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self.response |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return [*events, self._event("response.failed", response=self.response)]

    @property
    def _place(self) -> dict[str, Any]:
        """The content part that grows."""
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> Event:
        self._count += 1
        return {"type": kind, "sequence_number": self._count - 1, **fields}

    def _begin_item(self, kind: str, **fields: Any) -> list[Event]:
        events = self._end_item("completed")
        name = f"{PREFIXES[kind]}_{uuid.uuid4().hex}"
        self._output.append({"id": name, "type": kind, "status": "in_progress", **fields})
        self._growing = True
        # The item is changed when it ends.
        item = {**self._output[-1]}
        return [*events, self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)]

    def _delta(self, kind: str, text: str, **fields: Any) -> Event:
        self._pieces.append(text)
        index = len(self._output) - 1
        return self._event(kind, item_id=self._output[-1]["id"], output_index=index, delta=text, **fields)

    def _end_item(self, status: str) -> list[Event]:
        if not self._growing:
            return []
        item, text = self._output[-1], "".join(self._pieces)
        logprobs, self._logprobs = self._logprobs, []
        self._growing, self._pieces = False, []
        kind, index = item["type"], len(self._output) - 1
        events: list[Event] = []
        if kind == "function_call":
            place = {"item_id": item["id"], "output_index": index}
            change: dict[str, Any] = {"arguments": text}
            events = [self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=text)]
        else:
            part = {**PARTS[kind], "text": text}
            change = {"content": [part]}
            if kind == "reasoning":
                events = [self._event("response.reasoning_text.done", **self._place, text=text)]
            else:
                part["logprobs"] = logprobs
                events = [self._event("response.output_text.done", **self._place, text=text, logprobs=logprobs)]
            events.append(self._event("response.content_part.done", **self._place, part=part))
        item |= {**change, "status": status}
        return [*events, self._event("response.output_item.done", output_index=index, item=item)]


def usage(output: RequestOutput, reasoning_tokens: int) -> dict[str, Any]:
    """Returns ``usage``. Counts are tokens."""
    prompt, answer = len(output.prompt_token_ids), len(output.token_ids)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": output.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": answer,
        "output_tokens_details": {"reasoning_tokens": min(reasoning_tokens, answer)},
        "total_tokens": prompt + answer,
    }
