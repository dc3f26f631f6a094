"""The playground page in a real browser, over a scripted pipeline: what it shows, and that it stops."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssd.testing.twins.served import Served

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
SOON_MS = 120_000
KEY = "a-key-of-at-least-16"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "keys").write_text(KEY)
    server = Served(f"server.api_key_file={tmp_path / 'keys'}", round_s=0.01)
    yield server
    server.close()


def opened(browser: Any, served: Served) -> tuple[Any, list[str]]:
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.set_default_timeout(SOON_MS)
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    origin = f"http://127.0.0.1:{served.port}"
    # Nothing from anywhere else: it works offline.
    page.on("request", lambda r: None if r.url.startswith((origin, "data:")) else troubles.append(r.url))
    page.goto(origin)
    return page, troubles


def until(page: Any, expression: str) -> None:
    """Playwright's own waiting evaluates text in the page, which the page's policy forbids."""
    deadline = time.monotonic() + SOON_MS / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def test_compares_with_plain_decoding(browser: Any, served: Served, tmp_path: Path) -> None:
    page, troubles = opened(browser, served)
    until(page, "document.getElementById('about').textContent.includes('API key')")
    page.fill("#key", KEY)
    page.dispatch_event("#key", "change")
    page.wait_for_selector("#method option[value=ssd]", state="attached")
    page.fill("#prompt", "a prompt")
    page.fill("#max_tokens", "90")
    page.click("#compare")
    until(page, "document.getElementById('same').textContent === 'yes'")
    until(page, "!document.getElementById('run').disabled")
    shown = page.evaluate("[...document.querySelectorAll('#text span')].map(s => [s.className, s.textContent])")
    assert shown[0] == ["given", "a prompt"]
    assert len(shown) == 91
    assert {kind for kind, _ in shown[1:]} == {"hit", "miss", "bonus", "plain"}
    assert page.inner_text("#text") == "a prompt" + served.text("a prompt", 0, 90)
    assert float(page.inner_text("#rate")) > 0 and float(page.inner_text("#plain_rate")) > 0
    assert page.inner_text("#speedup").endswith("×")
    assert page.inner_text("#acceptance").endswith("%") and float(page.inner_text("#length")) > 1
    colours = page.evaluate(
        "() => { draw(); const c = document.getElementById('lanes');"
        "const d = c.getContext('2d').getImageData(70, 0, c.width - 70, c.height).data;"
        "const seen = new Set(); for (let i = 0; i < d.length; i += 4) if (d[i + 3] === 255)"
        " seen.add(d.slice(i, i + 3).join()); return seen.size; }"
    )
    assert colours >= 3  # forwards, preparing, waiting
    page.screenshot(path=os.environ.get("PLAYGROUND_SHOT", str(tmp_path / "page.png")), full_page=True)
    assert troubles == []
    page.close()


def test_stop_frees_the_slot_and_errors_are_shown(browser: Any, served: Served) -> None:
    page, troubles = opened(browser, served)
    page.fill("#key", KEY)
    page.dispatch_event("#key", "change")
    page.wait_for_selector("#method option[value=ssd]", state="attached")
    page.fill("#max_tokens", "400")
    page.click("#run")
    page.wait_for_selector("#text span.hit")
    page.click("#stop")
    served.until(lambda: served.pipeline.busy == served.engine.running == 0)
    until(page, "!document.getElementById('run').disabled")
    assert page.inner_text("#error") == ""
    page.fill("#max_tokens", "100000")
    page.click("#run")
    until(page, "document.getElementById('error').textContent.includes('max_model_len')")
    assert troubles == []
    page.close()
