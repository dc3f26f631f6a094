"""``benchmarks/serving/soak.py`` for half a minute: real workers, every feature, heavy requests beside."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "serving"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_heavy_requests_hold_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from pairs import uncompiled
    from server import Server
    from soak import LIGHT, SETTINGS, Soak, heavy_requests

    with Server(str(uncompiled("tiny", tmp_path, 8)), SETTINGS) as server:
        soak = Soak(server, "soaked", clients=16, minutes=0.6)
        asyncio.run(soak.run())
    assert not soak.errors
    assert soak.stalls == 0
    assert soak.answered.keys() == LIGHT.keys()
    assert len(soak.statuses) >= len(heavy_requests("soaked"))
