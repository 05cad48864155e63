"""``pgrealtime live`` says whether the configured service answers, as a health check does."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.e2e.service import service
from tests.program import Outcome, run_program


async def live(folder: Path, **environ: str) -> Outcome:
    return await asyncio.to_thread(lambda: run_program("live", cwd=folder, **environ))


@pytest.mark.parametrize("base_path", ["", "/realtime-service"])
async def test_a_service_that_answers_is_live_and_one_that_does_not_is_not(
    base_path: str, database_url: str, tmp_path: Path
) -> None:
    """Whatever proxy the environment names; one that hangs is not waited for."""
    nowhere = {"http_proxy": "http://127.0.0.1:9"}
    server = {"server": {"base_path": base_path}}
    async with service(database_url, tmp_path, sections=server) as running:
        assert await live(tmp_path, **nowhere) == (0, "", "")
        os.kill(running.process.pid, signal.SIGSTOP)
        try:
            outcome = await live(tmp_path)
        finally:
            os.kill(running.process.pid, signal.SIGCONT)
        assert (outcome.code, outcome.out) == (1, "")
        assert "timed out" in outcome.err
    outcome = await live(tmp_path)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith(f'service_unreachable: no service answers at "{running.url}"')
