"""From the bytes of a Responses body to a checked job, with the conversation it continues."""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...engine.async_engine import AsyncEngine
from ..http.bodies import read_body, renamed
from ..http.errors import APIError
from ..openai.jobs import Job, JobReader
from .bodies import Item, Message, ResponsesBody
from .items import ITEMS, input_items, listed
from .store import ResponseStore, Stored
from .translation import NAMES, chat_body, head

TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A Responses request, checked."""

    job: Job
    client: str
    head: Mapping[str, Any]
    """Fields of the response that are known before it begins."""
    items: Sequence[Item]
    """Of the conversation so far."""
    store: bool


class ResponsesReader:
    """Reads bodies, and keeps the responses that later bodies continue. Reading is safe from any thread."""

    def __init__(self, engine: AsyncEngine, jobs: JobReader, store: ResponseStore):
        self._jobs, self.store = jobs, store
        self._context = engine.config.engine.max_model_len

    def read(self, raw: bytes, client: str) -> Asked:
        """Reads the bytes of a body.

        Raises:
            APIError: 400; 404: the response it continues is not kept (any more).
        """
        body = read_body(ResponsesBody, raw)
        items = [*self._before(body, client), *input_items(body)]
        try:
            job = self._fitting(body, items) if body.truncation == "auto" else self._job(body, items)
        except APIError as error:
            raise renamed(error, NAMES) from None
        return Asked(
            job=job,
            client=client,
            head=head(body, job),
            items=items,
            store=body.store is not False,
        )

    def count(self, raw: bytes, client: str) -> int:
        """Reads the bytes of a body. Returns how many tokens its prompt has, also if that is too many.

        Raises:
            APIError: 400; 404: as ``read``.
        """
        body = read_body(ResponsesBody, raw)
        try:
            return len(self._jobs.chat_prompt(chat_body(body, [*self._before(body, client), *input_items(body)])))
        except APIError as error:
            raise renamed(error, NAMES) from None

    def keep(self, asked: Asked, response: Mapping[str, Any]) -> None:
        """Keeps a response that ended, if the client wants that."""
        if asked.store:
            before = [listed(item) for item in asked.items]
            stored = Stored(response=_json(response), input=_json(before), output=_json(response["output"]))
            self.store.put(asked.client, response["id"], stored)

    def _before(self, body: ResponsesBody, client: str) -> list[Item]:
        """Returns the items of the conversation that a body continues."""
        if body.previous_response_id is None:
            return []
        stored = self.store.get(client, body.previous_response_id, param="previous_response_id")
        return [item for part in (stored.input, stored.output) for item in ITEMS.validate_json(part)]

    def _job(self, body: ResponsesBody, items: Sequence[Item]) -> Job:
        return self._jobs.chat(chat_body(body, items))

    def _fitting(self, body: ResponsesBody, items: Sequence[Item]) -> Job:
        """Returns a job without as many of the oldest turns as necessary for prompt and answer to fit the context.

        What system and developer said stays.
        """
        starts = [at for at, item in enumerate(items) if isinstance(item, Message) and item.role == "user"] or [0]

        def left(start: int) -> list[Item]:
            kept = [
                item for item in items[:start] if isinstance(item, Message) and item.role in ("system", "developer")
            ]
            return [*kept, *items[start:]]

        def fits(start: int) -> bool:
            try:
                job = self._job(body, left(start))
            except APIError as error:
                if error.code == TOO_LONG:
                    return False
                raise
            return len(job.prompts[0]) + job.choices[0][1].max_tokens <= self._context

        starts[0] = 0
        # Later starts make shorter prompts. If none fits, the last one says by how much.
        index = bisect.bisect_left(starts, True, hi=len(starts) - 1, key=fits)
        return self._job(body, left(starts[index]))


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
