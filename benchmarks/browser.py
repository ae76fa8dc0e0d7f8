"""A headless Chromium for the tests and the benchmark of the report page: the machine's own, or Playwright's.

    with open_browser() as browser:
        page = browser.new_page()

``make browser`` installs one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
NO_BROWSER = f"no browser: none of {', '.join(_NAMES)} is on the PATH, nor has Playwright one (make browser)"


class NoBrowserError(Exception):
    """There is no Chromium on this machine, or Playwright is not installed."""


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start a headless Chromium, and close it at the end.

    Raises:
        NoBrowserError: there is none.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise NoBrowserError(f"no browser: {error}") from error
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, _NAMES)), own if Path(own).exists() else None)
        if path is None:
            raise NoBrowserError(NO_BROWSER)
        # A page of a report needs no network, and no accelerator draws better than the processor on a canvas.
        browser = playwright.chromium.launch(executable_path=path, args=["--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


if __name__ == "__main__":
    try:
        with open_browser() as found:
            print(f"browser: {found.browser_type.name} {found.version}")
    except NoBrowserError as missing:
        raise SystemExit(str(missing)) from None
