"""The README's lines for a mirror, run unchanged by the official SDK, and the list they keep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from tests.e2e.sdk import Sdk, module
from tests.readme import script

_AROUND = """
import PocketBase from "pocketbase";
import { EventSource } from "eventsource";
globalThis.EventSource = EventSource;
const report = (what) => console.log(JSON.stringify(what));
const pb = new PocketBase(process.argv[1]);
pb.authStore.save(process.argv[2] ?? "", null);
"""
_THEN = """
report({ report: "subscribed" });
let last = "";
setInterval(() => {
  const now = JSON.stringify([...rows.values()]);
  if (now !== last) report({ report: "rows", rows: JSON.parse(now) });
  last = now;
}, 10);
"""
SECONDS = 20.0


@asynccontextmanager
async def readme_mirror(
    url: str, token: str = "", *, beginning: str = "const rows"
) -> AsyncIterator[Sdk]:
    """Run the README's one script that begins so, for the caller of a token, until subscribed."""
    async with module(_AROUND + script(beginning) + _THEN, url, token) as client:
        await client.wait_for(1, "subscribed")
        yield client


async def wait_for_titles(client: Sdk, titles: Iterable[str]) -> None:
    """Return once the list has the rows of these titles and no others."""
    wanted = sorted(titles)
    async with asyncio.timeout(SECONDS):
        while _titles(client) != wanted:
            await asyncio.sleep(0.01)


def _titles(client: Sdk) -> list[str]:
    reports = client.of("rows")
    return sorted(row["title"] for row in reports[-1]["rows"]) if reports else []
