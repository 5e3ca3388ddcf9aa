"""What the page is made of, and how it is served."""

import asyncio
import fnmatch
import re
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from moa_serve.api import dashboard
from moa_serve.api.guard import Guard
from moa_serve.settings import load_settings

ROOT = Path(__file__).parents[4]
PAGE = ROOT / "moa_serve/api/dashboard/page"
SOURCES = sorted(path for path in PAGE.iterdir() if path.suffix in (".js", ".html", ".css"))


def ask(path: str, *, method: str = "GET", base: str = "http://localhost", headers: dict[str, str] | None = None, **limits: Any) -> Any:
    app = FastAPI()
    app.include_router(dashboard.router)
    guard = Guard(app, load_settings({"api_key": ["the-api-key-1"], **limits}))

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url=base) as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(run())


def test_every_file_is_served_without_a_key_and_with_strict_headers() -> None:
    assert {path.name for path in PAGE.iterdir()} == {"index.html"} | {path.rpartition("/")[2] for path in dashboard.PATHS if "." in path}
    for path in dashboard.PATHS:
        response = ask(path)
        assert response.status_code == 200
        assert response.headers["content-security-policy"].split("; ") == [
            "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self' data:", "base-uri 'none'",
            "form-action 'none'", "frame-ancestors 'none'",
        ]  # fmt: skip
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-cache"
    assert ask("/dashboard").headers["content-type"] == "text/html; charset=utf-8"
    assert ask("/dashboard/main.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert ask("/dashboard", method="HEAD").content == b""


def test_nothing_else_is_there_and_nothing_can_be_changed() -> None:
    """A path that is made up is no way around the key."""
    for path in ("/dashboard/nothing.js", "/dashboard/__init__.py", "/dashboard/index.html/x", "/dashboardx"):
        assert ask(path).status_code == 401
    for path in ("/dashboard/%2e%2e/__init__.py", "/dashboard/..%2f__init__.py", "/dashboard/index.html"):
        assert ask(path, headers={"Authorization": "Bearer the-api-key-1"}).status_code == 404
    assert ask("/dashboard", method="POST").status_code == 401


def test_a_page_that_did_not_change_is_not_sent_again() -> None:
    tag = ask("/dashboard/main.js").headers["etag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        response = ask("/dashboard/main.js", headers={"If-None-Match": known})
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", tag)
    assert ask("/dashboard/main.js", headers={"If-None-Match": '"other"'}).status_code == 200


def test_the_page_answers_to_the_servers_names_only() -> None:
    """Probes may come by address; a page that another site's name leads to would be in that site's hands."""
    assert ask("/dashboard", base="http://evil.example").status_code == 421
    shared: dict[str, Any] = {"host": "0.0.0.0", "allowed_hosts": ["moa.example"]}
    assert ask("/dashboard", base="http://10.0.0.1", **shared).status_code == 421
    assert ask("/dashboard", base="http://moa.example", **shared).status_code == 200


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_file_makes_markup_of_text_or_leaves_the_server(path: Path) -> None:
    """One innerHTML is enough for an adapter's name to become a script."""
    text = path.read_text()
    forbidden = (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        'setAttribute("style',
        "javascript:",
        "srcdoc",
    )
    assert not [word for word in forbidden if word in text]
    assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}
    if path.suffix == ".html":
        assert not re.findall(r"\sstyle=|\son\w+=|<style|<script(?![^>]*\ssrc=)", text)
        named = set(re.findall(r"(?:src|href)=\"(dashboard/[^\"]+)\"", text))
        assert {f"/{name}" for name in named} <= dashboard.PATHS
    for name in re.findall(r"from \"\./([^\"]+)\"", text):
        assert (PAGE / name).is_file()


def test_every_id_that_is_asked_for_is_in_the_page() -> None:
    page = (PAGE / "index.html").read_text()
    ids = re.findall(r"\sid=\"([^\"]+)\"", page)
    assert len(ids) == len(set(ids))
    code = "".join(path.read_text() for path in SOURCES if path.suffix == ".js")
    assert set(re.findall(r"byId\(\"([^\"]+)\"\)", code)) <= set(ids)


def test_the_wheel_has_every_file() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["moa_serve"]
    for path in PAGE.iterdir():
        assert any(fnmatch.fnmatch(path.relative_to(ROOT / "moa_serve").as_posix(), pattern) for pattern in patterns), path
