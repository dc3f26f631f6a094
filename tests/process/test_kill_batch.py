"""``benchmarks/serving/kill_batch.py`` on a small file: real workers, real kills."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "serving"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_batch_is_complete_unique_and_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from kill_batch import check
    from pairs import uncompiled

    result = check(200, 2, uncompiled("tiny", tmp_path, 8), tmp_path, seed=1)
    assert result["complete"] and result["unique"] and result["equal"]
    assert result["left_behind"] == []
    assert all(0 < kill["on_disk"] < 200 and kill["workers_left"] == 0 for kill in result["kills"])
