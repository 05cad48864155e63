"""JSON responses of the routes other than the stream, reduced by the query parameter ``fields``."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

import msgspec
from aiohttp import web

from pgrealtime.api.error_responses import BAD_REQUEST, RequestRefusedError
from pgrealtime.protocol.query_string import parse_query_string
from pgrealtime.protocol.topic import snake_case
from pgrealtime.records.fields import apply_projections, compile_projections, parse_fields
from pgrealtime.records.values import Json

_MAX_NAMES: Final = 1024
_USUAL_CHARACTERS: Final = 64
"""Of a header's name that is cached, so that few bytes are."""


def respond_json(request: web.Request, members: Mapping[str, Json]) -> web.Response:
    """Return a 200 with an object of the members that ``fields`` selects, in this order.

    Raises:
        RequestRefusedError: ``fields`` can't be parsed.
    """
    fields = parse_fields(query_values(request).get("fields", ""))
    if fields is None:
        raise RequestRefusedError(BAD_REQUEST)
    selected = apply_projections({**members}, compile_projections(fields))
    return web.Response(body=msgspec.json.encode(selected), content_type="application/json")


def query_values(request: web.Request) -> dict[str, str]:
    """Return the first value of each name in the URL's query, parsed as PocketBase does."""
    values: dict[str, str] = {}
    for name, value in parse_query_string(request.rel_url.raw_query_string.encode()).pairs:
        values.setdefault(name.decode(errors="replace"), value.decode(errors="replace"))
    return values


def headers_for_rules(request: web.Request) -> dict[str, str]:
    """Return the first value of each header but ``Host``, which Go keeps apart from headers."""
    headers: dict[str, str] = {}
    for name, value in request.headers.items():
        headers.setdefault(_name_in_rules(name), value)
    headers.pop("host", None)
    return headers


def _name_in_rules(name: str) -> str:
    return _usual_name_in_rules(name) if len(name) <= _USUAL_CHARACTERS else snake_case(name)


_usual_name_in_rules = lru_cache(_MAX_NAMES)(snake_case)
