"""The number of connections is limited by the configuration, not by the shell's soft limit."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path

from tests.conformance.http_client import EventStream
from tests.e2e.service import service
from tests.realtime import OPEN_STREAM

SOFT = 64
CONNECTIONS = 200


async def test_soft_limit_of_open_files_is_no_limit(database_url: str, tmp_path: Path) -> None:
    """Shells and systemd set 1024, which a process may raise up to the hard limit.

    If even the hard limit is less than what the configuration promises, the log reports it at the
    start.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    sections = {"realtime": {"max_connections": hard}}
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, hard))
    try:
        starting = service(database_url, tmp_path, sections=sections)
        running = await starting.__aenter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        streams = [
            await EventStream.open(OPEN_STREAM, running.address, str(number))
            for number in range(CONNECTIONS)
        ]
        first = await asyncio.gather(*(stream.wait_messages(1, 20.0) for stream in streams))
        await asyncio.gather(*(stream.close() for stream in streams))
        output = running.process.output()
    finally:
        await starting.__aexit__(None, None, None)

    assert all(b"PB_CONNECT" in messages[0] for messages in first)
    assert "files.limited" in output
