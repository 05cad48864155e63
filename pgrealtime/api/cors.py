"""CORS response headers, for ``api.app`` (protocol, 1.2 and 1.3)."""

import re
from collections.abc import Sequence

Headers = list[tuple[str, str]]
"""In order; a name may occur more than once."""

_ANY_ORIGIN = "*"
_ALLOWED_METHODS = "GET,HEAD,PUT,PATCH,POST,DELETE"
_MAX_ORIGIN_CHARACTERS = 261
"""Longest origin that is matched against patterns, as in PocketBase; no real one is longer."""


class AllowedOrigins:
    """The configured origins: ``*``, exact origins, and patterns with ``*`` and ``?``."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._exact = frozenset(origins)
        quoted = (re.escape(origin) for origin in origins if origin != _ANY_ORIGIN)
        self._patterns = [
            re.compile(text.replace(r"\*", ".*").replace(r"\?", ".")) for text in quoted
        ]

    def allow_origin(self, origin: str) -> str | None:
        """Return the value of ``Access-Control-Allow-Origin``; None for no such header."""
        if _ANY_ORIGIN in self._exact:
            return _ANY_ORIGIN
        could_match = "://" in origin and len(origin) <= _MAX_ORIGIN_CHARACTERS
        patterns = self._patterns if could_match else ()
        is_allowed = origin in self._exact or any(text.fullmatch(origin) for text in patterns)
        return origin if is_allowed else None

    def response_headers(self, origin: str) -> Headers:
        """Return the headers of a response that answers no preflight request."""
        allowed = self.allow_origin(origin) if origin else None
        vary = ("Vary", "Origin")
        return [vary] if allowed is None else [vary, ("Access-Control-Allow-Origin", allowed)]

    def preflight_headers(self, origin: str, request_headers: str) -> Headers:
        """Return the headers of the response to a preflight (OPTIONS) request.

        ``Access-Control-Request-Headers`` is returned unchanged; an empty origin is none.
        """
        headers = self.response_headers(origin)
        if len(headers) == 1:
            return headers
        headers += [
            ("Vary", "Access-Control-Request-Method"),
            ("Vary", "Access-Control-Request-Headers"),
            ("Access-Control-Allow-Methods", _ALLOWED_METHODS),
        ]
        if request_headers:
            headers.append(("Access-Control-Allow-Headers", request_headers))
        return headers
