"""Where the dispatch task stands, and by which collections it judges: shared by what it drives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from pgrealtime.lsn import Cursor

if TYPE_CHECKING:
    from pgrealtime.hub.state.generation import Generation


class DispatchProgress(Struct):
    """Written by the hub alone.

    Attributes:
        head: Everything up to here was handed to the connections that are LIVE.
        evaluation_target: Everything up to here is judged, or being judged, for them.
        generation: Of the collections in force.
        revision: Counts the collections and the histories that were in use: what was read or
            judged by those of before counts no more.
        is_evaluating: Whether a slice is being judged: who becomes LIVE now isn't among its groups.
    """

    head: Cursor
    evaluation_target: Cursor
    generation: Generation
    revision: int = 0
    is_evaluating: bool = False
