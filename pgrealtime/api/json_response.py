"""JSON answers: the query parameter ``fields`` trims every one that isn't an error."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from aiohttp import web

from pgrealtime.api.error_responses import BAD_REQUEST, RequestRefusedError
from pgrealtime.protocol.query_string import parse_query_string
from pgrealtime.records.fields import compile_projections, parse_fields
from pgrealtime.records.values import Json


def respond_json(request: web.Request, members: Mapping[str, Json]) -> web.Response:
    """Return a 200 whose object has the members in this order.

    Raises:
        RequestRefusedError: ``fields`` can't be read.
    """
    fields = parse_fields(query_values(request).get("fields", ""))
    if fields is None:
        raise RequestRefusedError(BAD_REQUEST)
    pick_of = compile_projections(fields)
    picks = ((name, value, pick_of(name)) for name, value in members.items())
    picked = {name: pick(value) for name, value, pick in picks if pick is not None}
    return web.Response(body=msgspec.json.encode(picked), content_type="application/json")


def query_values(request: web.Request) -> dict[str, str]:
    """Return the values of the URL's query, the first of each name, as PocketBase reads them."""
    values: dict[str, str] = {}
    for name, value in parse_query_string(request.rel_url.raw_query_string.encode()).pairs:
        values.setdefault(name.decode(errors="replace"), value.decode(errors="replace"))
    return values
