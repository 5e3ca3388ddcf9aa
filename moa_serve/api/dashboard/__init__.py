"""The dashboard: a page that shows this server at work, and the files that it is made of, which lie in page/.

The files hold nothing of this server, so they need no key; what they show comes from the API with the key that is typed into the page. The
headers let the page load and ask this server only. Not for data: there is no route here that the API does not have. Owns no state.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

ROOT = "/dashboard"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept by browsers, and asked for again by its ETag: a new version is seen at once
}

_FILE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file.", "content": {"text/css": {}, "text/javascript": {}, "image/svg+xml": {}}}
}

router = APIRouter()


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def _read() -> dict[str, _File]:
    """Every file by the path that it is served at; the page itself at ROOT."""
    found = {}
    for entry in files(__package__).joinpath("page").iterdir():
        media_type = _MEDIA_TYPES.get(PurePath(entry.name).suffix)
        if media_type is not None:
            content = entry.read_bytes()
            path = ROOT if entry.name == "index.html" else f"{ROOT}/{entry.name}"
            found[path] = _File(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


_FILES = _read()
PATHS = frozenset(_FILES)
"""All that is served here: public."""


@router.get(ROOT, response_class=HTMLResponse)
async def dashboard(request: Request) -> Response:
    """A page that shows what this server does, and a playground."""
    return _serve(request, ROOT)


@router.get(f"{ROOT}/{{name}}", response_class=Response, responses=_FILE)
async def dashboard_file(request: Request, name: str) -> Response:
    """A file of that page."""
    return _serve(request, f"{ROOT}/{name}")


def _serve(request: Request, path: str) -> Response:
    file = _FILES.get(path)
    if file is None:
        raise HTTPException(404)
    headers = {**_HEADERS, "ETag": file.etag}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
