"""Where the dispatch task stands, and by which collections it judges: shared by what it drives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from pgrealtime.lsn import Cursor

if TYPE_CHECKING:
    from pgrealtime.hub.state.generation import Meaning


class Course(Struct):
    """Written by the hub alone.

    Attributes:
        head: Everything up to here was handed to the connections that are LIVE.
        target: Everything up to here is judged, or being judged, for them.
        meaning: Of the collections in force.
        edition: Counts the collections and the histories that were in use: what was read or
            judged by those of before counts no more.
        is_deciding: Whether a slice is being judged: who becomes LIVE now isn't among its groups.
    """

    head: Cursor
    target: Cursor
    meaning: Meaning
    edition: int = 0
    is_deciding: bool = False
