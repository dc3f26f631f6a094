"""The store of responses: bounded, by client, safe between threads."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from ssd.serving.http.errors import APIError
from ssd.serving.responses.store import ResponseStore, Stored


def stored(size: int) -> Stored:
    return Stored(response=b"r" * (size - 2), input=b"i", output=b"o")


def test_the_least_recently_used_response_is_dropped() -> None:
    store = ResponseStore(100)
    for name in "abc":
        store.put("me", name, stored(30))
    assert store.get("me", "a").size == 30
    store.put("me", "d", stored(30))
    assert store.size == 90
    assert [name for name in "abcd" if kept(store, "me", name)] == ["a", "c", "d"]
    store.put("me", "large", stored(101))
    assert store.size == 90 and not kept(store, "me", "large")
    store.put("me", "full", stored(100))
    assert store.size == 100 and kept(store, "me", "full")
    store.drop("me", "full")
    assert store.size == 0
    with pytest.raises(APIError):
        store.drop("me", "full")


def kept(store: ResponseStore, client: str, name: str) -> bool:
    try:
        store.get(client, name)
    except APIError as error:
        assert error.status == 404 and "responses_bytes" in error.message
        return False
    return True


def test_clients_do_not_see_each_other() -> None:
    store = ResponseStore(100)
    store.put("key 1", "a", stored(10))
    assert kept(store, "key 1", "a") and not kept(store, "key 2", "a")


def test_a_store_used_by_threads() -> None:
    store = ResponseStore(100)

    def use(worker: int) -> None:
        for turn in range(300):
            store.put("me", f"{worker}-{turn}", stored(30))
            for other in range(4):
                if kept(store, "me", f"{other}-{turn}") and other == worker:
                    with contextlib.suppress(APIError):
                        store.drop("me", f"{other}-{turn}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    assert 0 <= store.size <= 100 and store.size % 30 == 0


def test_a_store_without_memory() -> None:
    store = ResponseStore(0)
    store.put("me", "a", stored(10))
    assert store.size == 0 and not kept(store, "me", "a")
