"""Who is next: clients take turns, each client's requests in order."""

from __future__ import annotations

from collections import OrderedDict, deque


class FairQueue:
    """Request numbers by client. A client with a hundred requests delays another client's first
    one by at most one turn per client."""

    def __init__(self) -> None:
        self._turns: OrderedDict[str, deque[int]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._turns.values()))

    def push(self, client: str, number: int) -> None:
        self._turns.setdefault(client, deque()).append(number)

    def pop(self) -> int:
        """The next request; its client then stands at the end of the line.

        Raises: IndexError if nothing waits.
        """
        if not self._turns:
            raise IndexError("pop from an empty queue")
        client, numbers = self._turns.popitem(last=False)
        number = numbers.popleft()
        if numbers:
            self._turns[client] = numbers
        return number

    def remove(self, client: str, number: int) -> None:
        """Forget a request that waits."""
        numbers = self._turns[client]
        numbers.remove(number)
        if not numbers:
            del self._turns[client]
