"""Pages of a list of items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..http.errors import APIError, shown


class Page(BaseModel):
    """Query parameters. Which items of a list to return."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    """Id of the last item of the page before."""
    limit: Annotated[int, Field(ge=1, le=100)] = 20


def page_of(items: Sequence[dict[str, Any]], page: Page) -> dict[str, Any]:
    """Returns a page of a conversation.

    Args:
        items: of the conversation, oldest first.

    Raises:
        APIError: 404: there is no item ``after``.
    """
    ordered = list(items) if page.order == "asc" else list(reversed(items))
    ids = [item["id"] for item in ordered]
    if page.after is not None and page.after not in ids:
        raise APIError(404, f"there is no item '{shown(page.after)}'", param="after", code="not_found")
    start = 0 if page.after is None else ids.index(page.after) + 1
    end = start + page.limit
    return {
        "object": "list",
        "data": ordered[start:end],
        "first_id": ids[start] if ids[start:] else "",
        "last_id": ids[start:end][-1] if ids[start:] else "",
        "has_more": end < len(ordered),
    }
