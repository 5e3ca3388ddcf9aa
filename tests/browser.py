"""A real browser for tests: the system's Chromium, driven by playwright, with all that it complained of and all that it asked for.

What a Content-Security-Policy forbids is among the complaints: Chromium writes it to the console as an error.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str:
    """Its path; skips the test where there is none, or nothing to drive it."""
    pytest.importorskip("playwright", reason="playwright, which drives the browser, is not installed: pip install -e '.[test]'")
    for name in _NAMES:
        if (path := shutil.which(name)) is not None:
            return path
    pytest.skip("there is no Chromium: apt-get install chromium")


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser, ended behind the block."""
    path = find_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass(eq=False)
class Visit:
    """A page in a context of its own, and what went wrong on it."""

    page: Any
    url: str
    problems: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def check(self, *expected: str) -> None:
        """Nothing was complained of but what is expected, every part of which came; and nobody else was asked for anything."""
        rest = [problem for problem in self.problems if not any(part in problem for part in expected)]
        assert not rest, rest
        assert [part for part in expected if not any(part in problem for problem in self.problems)] == []
        assert [url for url in self.asked if not url.startswith((f"{self.url}/", "data:"))] == []


@contextmanager
def visit(browser: Any, url: str, *, width: int = 1280, height: int = 900, **options: Any) -> Iterator[Visit]:
    """A new page of `browser`, as nobody ever used it; `options` are of its context."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    context.set_default_timeout(8_000)
    try:
        page = context.new_page()
        found = Visit(page, url)
        page.on("console", lambda message: found.problems.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: found.problems.append(f"uncaught: {error}"))
        page.on("request", lambda request: found.asked.append(request.url))
        yield found
    finally:
        context.close()
