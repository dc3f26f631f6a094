"""Every check of every client passes, unmodified client against unmodified server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent / "scripts"
CLIENTS = sorted(path.stem.removesuffix("_client") for path in SCRIPTS.glob("*_client.py"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(6000)]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_works(client: str, failures: Callable[[str], dict[str, str]]) -> None:
    assert not failures(client)
