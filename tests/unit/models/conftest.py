"""What tests of models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ssd.models.checkpoints import gguf_metadata


@pytest.fixture(scope="module")
def gguf_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what is read of GGUF files in a folder of the test's; skips without the packages that read them."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_metadata, "cache_folder", lambda: cache)
        yield
