"""Items of a conversation: as chat messages, and as the API lists them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import TypeAdapter

from .bodies import (
    FunctionCall,
    FunctionCallOutput,
    InputText,
    Item,
    Message,
    OutputText,
    ReasoningItem,
    Refusal,
    ResponsesBody,
)
from .writer import PREFIXES

ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])


def input_items(body: ResponsesBody) -> list[Item]:
    """Returns the items of a body's input."""
    return [Message(role="user", content=body.input)] if isinstance(body.input, str) else list(body.input)


def chat_messages(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Returns items as chat messages. What the assistant did in one turn (reasoning, text, calls) is one message."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] = {}
    """The assistant's turn so far; empty outside of one."""
    for item in items:
        own = isinstance(item, FunctionCall | ReasoningItem) or (isinstance(item, Message) and item.role == "assistant")
        if turn and (not own or _begins_turn(item, turn)):
            messages.append(turn)
            turn = {}
        if own:
            turn = _with_item(turn or {"role": "assistant", "content": None}, item)
        elif isinstance(item, FunctionCallOutput):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
        elif isinstance(item, Message):
            messages.append({"role": item.role, "content": _content(item.content)})
    return [*messages, turn] if turn else messages


def _begins_turn(item: Item, turn: dict[str, Any]) -> bool:
    """Whether an item of the assistant cannot belong to the turn so far."""
    if isinstance(item, FunctionCall):
        return False
    if isinstance(item, ReasoningItem):
        return len(turn) > 2 or turn["content"] is not None
    return turn["content"] is not None or "tool_calls" in turn


def _with_item(turn: dict[str, Any], item: Item) -> dict[str, Any]:
    if isinstance(item, Message):
        return {**turn, "content": _content(item.content)}
    if isinstance(item, ReasoningItem):
        thoughts = "".join(part.text for part in item.content or [])
        return {**turn, "reasoning_content": thoughts} if thoughts else turn
    assert isinstance(item, FunctionCall)
    function = {"name": item.name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": function}
    return {**turn, "tool_calls": [*turn.get("tool_calls", []), call]}


def _content(given: str | Sequence[InputText | OutputText | Refusal]) -> str | list[dict[str, str]]:
    """Returns chat content: one text as it is, several as parts."""
    if isinstance(given, str):
        return given
    if len(given) < 2:
        return given[0].text if given else ""
    return [{"type": "text", "text": part.text} for part in given]


def listed(item: Item) -> dict[str, Any]:
    """Returns an item as the API lists it: with an id and, for a message, its content as parts."""
    fields = item.model_dump(exclude_none=True)
    if isinstance(item, Message):
        part = OutputText if item.role == "assistant" else InputText
        parts = [part(text=item.content)] if isinstance(item.content, str) else item.content
        fields["content"] = [
            {**one.model_dump(), **({"annotations": []} if isinstance(one, OutputText) else {})} for one in parts
        ]
    if isinstance(item, ReasoningItem):
        fields["summary"] = []
    prefix = PREFIXES.get(item.type, "fco")
    return {"id": f"{prefix}_{uuid.uuid4().hex}", "status": "completed", **fields}
