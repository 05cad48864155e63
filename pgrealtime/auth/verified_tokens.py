"""Remembers tokens whose signature was checked, so that a caller's next request need not.

Parsing and verifying take a third of a small read. Only the signature is remembered, with the key
that made it: times, claims and the user's row are checked at each request, and a key that was
replaced is another one.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from pgrealtime.auth.token import Token, VerificationKey, check_signature, parse_token

_MAX_TOKENS: Final = 2000
_MAX_CHARACTERS: Final = 4096
"""Of a header that is remembered; both together bound the memory."""


class VerifiedTokens:
    """The tokens that were seen last. Nobody without a valid one can add to them."""

    def __init__(self, *, max_tokens: int = _MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._known: OrderedDict[str, tuple[Token, VerificationKey]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def parse(self, authorization: str | None) -> Token:
        """As ``parse_token``."""
        known = self._known.get(authorization or "")
        return parse_token(authorization) if known is None else known[0]

    def check_signature(
        self, authorization: str | None, token: Token, key: VerificationKey
    ) -> None:
        """As ``token.check_signature``, of the token that the header has.

        Raises:
            AuthError: Code ``token_signature``.
        """
        text = authorization or ""
        known = self._known.get(text)
        if known is not None and known[1] == key:
            self._known.move_to_end(text)
            return
        check_signature(token, key)
        if len(text) <= _MAX_CHARACTERS:
            self._known[text] = token, key
            self._known.move_to_end(text)
            if len(self._known) > self._max_tokens:
                self._known.popitem(last=False)
