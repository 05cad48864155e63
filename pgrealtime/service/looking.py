"""Answers the admin port's page for a service of one process."""

from collections.abc import Mapping
from importlib.resources import files

import msgspec

from pgrealtime.inspector.answers import Overview, States, make_overview, merge
from pgrealtime.inspector.inspector import Inspector, row_limit
from pgrealtime.service.status import StatusReader, read_slot


def page_text() -> str:
    """Return the page."""
    return files("pgrealtime.inspector").joinpath("page.html").read_text(encoding="utf-8")


async def look_here(
    inspector: Inspector, status: StatusReader, view: str, query: Mapping[str, str]
) -> bytes:
    """Return a view as JSON.

    Raises:
        LookError: There is no such view, or what it asks for isn't there.
    """
    if view == "overview":
        return msgspec.json.encode(await _overview(inspector, status))
    answer = await inspector.look(view, query)
    return msgspec.json.encode(merge([answer], row_limit(query)))


async def _overview(inspector: Inspector, status: StatusReader) -> Overview:
    states = await inspector.look("states", {})
    assert isinstance(states, States)
    config = inspector.config()
    return make_overview(
        await status.read_metrics(),
        states,
        config,
        not_ready=await status.not_ready_reasons(),
        slot=await read_slot(status.pool, status.slot_name, config),
        started_at=status.started_at,
    )
