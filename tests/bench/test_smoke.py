"""The benchmarks still run; their figures on a busy machine don't matter here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

# These contain all that the others consist of.
SMALL = {
    "fanout": "--connections 5 --writes 20 --their-writes 20 --rounds 1",
    "expand": "--connections 5 --writes 20 --rounds 1 --least 0",
    "matching": "--connections 1000 --changes 300 --single 20 --their-changes 2 --rounds 1",
    "subscribing": "--connections 50 --rounds 1",
    "workers": "--connections 5 --writes 5 --changes 300 --calls 20 --rounds 1",
    "reads": "--notes 20000 --rounds 1 --seconds 0.2 --writes 20",
}


@pytest.mark.parametrize(("name", "arguments"), SMALL.items(), ids=list(SMALL))
async def test_benchmark_comes_to_its_end(name: str, arguments: str, database_url: str) -> None:
    """Everything that it waits for arrives, from both servers."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"tests.bench.{name}", database_url, *arguments.split()),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = await process.communicate()
    finally:
        # Interrupted, it would leave the servers running that it measures.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    assert process.returncode == 0, output.decode()
    assert name == "workers" or b"pgrealtime" in output
    assert b"PocketBase" in output
