"""The record that somebody who signs in is answered with: made of a row as an event's record is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.changes import Row
from pgrealtime.collections import Collection, Collections
from pgrealtime.hub.expand import Expander, Readings
from pgrealtime.hub.expansion import Node, Viewers
from pgrealtime.records.encode import View, encoder
from pgrealtime.rules.plan import Planner
from pgrealtime.rules.request import Request

_PLANS = 64
"""Kept texts of ``expand``: in an URL they can be long."""


class OwnRecords:
    """Makes people's own records, with the related ones they ask for and may see.

    Args:
        readings: Where to ask.
        collections: What there is.
        nulls: How NULL is shown.
    """

    def __init__(
        self, readings: Readings, collections: Collections, *, nulls: Literal["null", "zero"]
    ) -> None:
        self._readings = readings
        self._nulls: Literal["null", "zero"] = nulls
        self.use(collections)

    def use(self, collections: Collections) -> None:
        """Take other collections."""
        self._collections = collections
        self._viewers = Viewers(collections, Planner(collections), plans=_PLANS)
        self._expander = Expander(self._readings, collections, self._show)

    async def record(
        self,
        collection: Collection,
        row: Row,
        owner: AuthRecord,
        *,
        query: Mapping[str, str],
        headers: Mapping[str, str],
    ) -> bytes:
        """Return the JSON of somebody's record, the e-mail address in it whatever its visibility.

        Unlike in PocketBase the body of the login isn't there for rules to see.

        Args:
            collection: Of the record.
            row: The whole row.
            owner: Whose it is, and who looks at what ``query["expand"]`` asks for.
            query: Of the request's URL.
            headers: Of the request, their names in snake case.
        """
        view = View(sees_email=True)
        if self._collections.get(collection.name) is not collection:
            # Other collections came while the password was checked.
            return encoder(collection, nulls=self._nulls, view=view)(row)
        request = Request(principal=owner, query=query, headers=headers, method="POST")
        viewer = self._viewers.viewer(collection, request) if "expand" in query else None
        related, expand = await self._expander.beside(collection, row, viewer)
        return encoder(collection, nulls=self._nulls, view=view)(row, related, expand)

    def _show(self, node: Node, view: View, expand: bytes | None) -> bytes:
        show = encoder(node.collection, nulls=self._nulls, view=view)
        return show(node.row, node.related, expand)
