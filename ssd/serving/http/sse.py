"""Server-sent events."""

from __future__ import annotations

import json
from typing import Any


def sse(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def typed_sse(body: dict[str, Any]) -> bytes:
    """One server-sent event, named after its ``type``."""
    return b"event: " + body["type"].encode() + b"\n" + sse(body)
