"""Takes a picture of the playground of a running server, after a comparison with plain decoding.

python scripts/playground_shot.py http://127.0.0.1:8000 docs/playground.png
"""

from __future__ import annotations

import shutil
import sys
import time

from playwright.sync_api import Page, sync_playwright

LONG_S = 150.0


def until(page: Page, expression: str) -> None:
    """Waits for an expression. Playwright's own waiting evaluates text, which the page's policy forbids."""
    deadline = time.monotonic() + LONG_S
    while not page.evaluate(expression):
        if time.monotonic() > deadline:
            raise SystemExit(f"not in {LONG_S:g} s: {expression}; {page.inner_text('#error')}")
        page.wait_for_timeout(200)


def main() -> None:
    url, out = sys.argv[1:]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 860}, color_scheme="light")
        page.goto(url)
        until(page, "document.querySelectorAll('#method option').length > 0")
        page.click("#compare")
        until(page, "!document.getElementById('run').disabled")
        page.screenshot(path=out, full_page=True)
        print(page.inner_text(".figures").replace("\n", " "), page.inner_text("#error"))
        browser.close()


if __name__ == "__main__":
    main()
