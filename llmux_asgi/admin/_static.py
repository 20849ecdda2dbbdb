"""The page's files. They are read once, so that a path of a client's never is a path of this machine's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

__all__ = ["PAGE_HEADERS", "StaticFiles"]

_FOLDER = Path(__file__).parent / "static"
_INDEX = "index.html"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
"""No script but the page's own files, nobody else's frame."""


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    media_type: str
    etag: str


class StaticFiles:
    """All files of the page by their path below `folder`. Files whose kind is not known here are left out."""

    def __init__(self, folder: Path = _FOLDER) -> None:
        self._files: dict[str, _File] = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and (kind := _TYPES.get(path.suffix)) is not None:
                body = path.read_bytes()
                etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
                self._files[path.relative_to(folder).as_posix()] = _File(body, kind, etag)

    def answer(self, name: str, request: Request) -> Response | None:
        """Answer with the file `name`, the page itself if that is empty; `None`: there is none."""
        if (file := self._files.get(name or _INDEX)) is None:
            return None
        # Browsers ask each time whether it has changed: after an update of the gateway page and script fit together.
        headers = {**PAGE_HEADERS, "etag": file.etag, "cache-control": "no-cache"}
        asked = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
        if file.etag in asked or "*" in asked:
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers=headers, media_type=file.media_type)
