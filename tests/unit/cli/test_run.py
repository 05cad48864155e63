"""The command ``run``: what it sets for the process before it serves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from pgrealtime.cli import run as command

CONFIG = """\
version: 1
database: {url: postgresql://127.0.0.1/app}
collections: {posts: {table: public.posts}}
"""


@pytest.fixture(autouse=True)
def _switch_interval_is_restored() -> Iterator[None]:
    seconds = sys.getswitchinterval()
    yield
    sys.setswitchinterval(seconds)


def test_a_thread_that_parses_a_body_lets_the_event_loop_run_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise events wait for it, each time the loop has released the interpreter."""
    served_with: list[float] = []

    async def serve(*_: object) -> None:
        served_with.append(sys.getswitchinterval())

    monkeypatch.setattr(command, "serve", serve)
    file = tmp_path / "pgrealtime.yaml"
    file.write_text(CONFIG, encoding="utf-8")
    result = CliRunner().invoke(command.run, ["-c", str(file)], catch_exceptions=False)

    assert result.exit_code == 0
    assert served_with == [pytest.approx(0.0005)]
