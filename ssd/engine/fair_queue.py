"""The order of waiting requests: lowest priority value first. Clients of equal priority take turns."""

from __future__ import annotations

from collections import OrderedDict, deque


class FairQueue:
    """Request numbers by priority and client. Requests of one client and priority keep their order. A client with a
    hundred requests delays another client's first request of the same priority by at most one turn per client."""

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[str, deque[int]]] = {}

    def __len__(self) -> int:
        return sum(len(numbers) for turns in self._levels.values() for numbers in turns.values())

    def push(self, client: str, number: int, priority: int = 0) -> None:
        """Adds a request at the end of its client's line."""
        self._levels.setdefault(priority, OrderedDict()).setdefault(client, deque()).append(number)

    def pop(self) -> int:
        """Removes and returns the next request. Its client goes to the end of its priority's line.

        Raises: IndexError: Nothing waits.
        """
        if not self._levels:
            raise IndexError("pop from an empty queue")
        priority = min(self._levels)
        turns = self._levels[priority]
        client, numbers = turns.popitem(last=False)
        number = numbers.popleft()
        if numbers:
            turns[client] = numbers
        elif not turns:
            del self._levels[priority]
        return number

    def remove(self, client: str, number: int, priority: int = 0) -> None:
        """Removes a request that waits."""
        turns = self._levels[priority]
        turns[client].remove(number)
        if not turns[client]:
            del turns[client]
        if not turns:
            del self._levels[priority]
