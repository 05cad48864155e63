"""Redirects paths that aren't in canonical form (``//api/realtime``), as Go's router does."""

from __future__ import annotations

import posixpath
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import quote

from aiohttp import web

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REDIRECT_STATUS: Final = 307
"""Temporary Redirect: the client repeats method and body."""

_SAFE_IN_PATHS: Final = "%/!$&'()*+,;=:@~[]"
"""Characters that stay unescaped besides letters, digits and ``-._``; existing escapes too."""

_HTML_ESCAPES: Final = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&#34;", "'": "&#39;"}
)


def clean_path(path: str) -> str:
    """Return the still escaped path without empty and dot segments; a final slash stays.

    ``%2F`` and ``%2E`` are neither slash nor dot.
    """
    plain = posixpath.normpath("/" + path.lstrip("/"))
    return f"{plain}/" if path.endswith("/") and plain != "/" else plain


@web.middleware
async def redirect_to_clean_path(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Redirect to the canonical path, or call the handler if this is one."""
    path = request.rel_url.raw_path
    plain = clean_path(path)
    if plain == path or not path.startswith("/"):
        return await handler(request)
    query = request.rel_url.raw_query_string
    location = quote(plain, safe=_SAFE_IN_PATHS) + (f"?{query}" if query else "")
    response = web.Response(status=REDIRECT_STATUS, headers={"Location": location})
    if request.method in ("GET", "HEAD"):
        response.content_type = "text/html"
        response.charset = "utf-8"
        response.text = f'<a href="{location.translate(_HTML_ESCAPES)}">Temporary Redirect</a>.\n\n'
    return response
