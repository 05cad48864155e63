"""Reads page, perPage and skipTotal of a list request, as PocketBase does. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pgrealtime.errors import ReadError

DEFAULT_PER_PAGE: Final = 30
MAX_PER_PAGE: Final = 1000

_INTEGER = re.compile(r"([+-]?)([0-9]+)", re.ASCII)
_INT64: Final = range(-(1 << 63), 1 << 63)
_MAX_DIGITS: Final = 19
"""Of an integer of 64 bits."""
_FLAGS: Final = dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True) | dict.fromkeys(
    ("0", "f", "F", "false", "FALSE", "False"), False
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListParameters:
    """Which page of a list is asked for; the numbers are those in force, within their limits."""

    page: int = 1
    per_page: int = DEFAULT_PER_PAGE
    skips_total: bool = False

    @property
    def offset(self) -> int | None:
        """How many rows are before the page; None if there can't be so many."""
        offset = (self.page - 1) * self.per_page
        return offset if offset in _INT64 else None


def parse_list_parameters(query: Mapping[str, str]) -> ListParameters:
    """Return the page that a query string asks for.

    Raises:
        ReadError: A parameter can't be read.
    """
    page = _parse_integer(query.get("page", ""))
    per_page = _parse_integer(query.get("perPage", ""))
    skips_total = query.get("skipTotal", "")
    if skips_total and skips_total not in _FLAGS:
        raise ReadError("skipTotal is no boolean")
    return ListParameters(
        page=page if page > 0 else 1,
        per_page=min(per_page, MAX_PER_PAGE) if per_page > 0 else DEFAULT_PER_PAGE,
        skips_total=_FLAGS.get(skips_total, False),
    )


def _parse_integer(text: str) -> int:
    """Return the 64-bit integer; 0 if there is none."""
    if not text:
        return 0
    written = _INTEGER.fullmatch(text)
    if written is None:
        raise ReadError("a page parameter is no integer")
    sign, digits = written.groups()
    # Without them, and only if few are left: Python refuses to convert thousands of digits.
    digits = digits.lstrip("0") or "0"
    number = int(sign + digits) if len(digits) <= _MAX_DIGITS else 1 << 64
    if number not in _INT64:
        raise ReadError("a page parameter is beyond 64 bits")
    return number
