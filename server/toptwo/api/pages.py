"""The console's page: a few static files, read once and served from memory.

Knows the files and the headers that keep a page of secrets to itself; must not know what the page does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

DIRECTORY = Path(__file__).parents[1] / "web"
CONSOLE = "/console"
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

# Nothing from elsewhere, no script in the page itself, no text that becomes HTML, in nobody's frame.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect")),
        *(f"{name} 'none'" for name in ("base-uri", "form-action", "frame-ancestors")),
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
PAGE_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # it is asked for anew each time, and mostly not sent again
}


@dataclass(frozen=True)
class Page:
    """A file as it is sent."""

    content: bytes
    kind: str

    @property
    def etag(self) -> str:
        """Changes whenever the content does."""
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'


def read_pages() -> dict[str, Page]:
    """All files, by the path that they are served at."""
    pages = {
        f"{CONSOLE}/{path.name}": Page(path.read_bytes(), _KINDS[path.suffix])
        for path in sorted(DIRECTORY.iterdir())
        if path.suffix in _KINDS
    }
    pages[CONSOLE] = pages.pop(f"{CONSOLE}/console.html")
    return pages


def pages_router() -> APIRouter:
    """The routes. Anybody may read them: there is nothing in them that is not in the source."""
    router = APIRouter(tags=["console"])
    for path, page in read_pages().items():
        router.add_api_route(path, partial(_show, page), methods=["GET"], include_in_schema=False)
    return router


async def _show(page: Page, request: Request) -> Response:
    headers = {**PAGE_HEADERS, "etag": page.etag}
    if request.headers.get("if-none-match") == page.etag:
        return Response(status_code=304, headers=headers)
    return Response(page.content, media_type=f"{page.kind}; charset=utf-8", headers=headers)
