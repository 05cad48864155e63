"""The program's commands, as an operator runs them in a shell."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Outcome(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str


def run_program(
    *arguments: str, cwd: Path | None = None, given: str = "", **environ: str
) -> Outcome:
    """Run a command to its end, in a clean environment with these variables; it doesn't crash."""
    done = subprocess.run(
        [sys.executable, "-m", "pgrealtime", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        input=given,
        env=clean_environ() | environ,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Outcome(done.returncode, done.stdout, done.stderr)


def clean_environ() -> dict[str, str]:
    """Return the environment without variables that could configure the program."""
    unwanted = ("PG", "PORT", "DATABASE_URL")
    return {name: text for name, text in os.environ.items() if not name.startswith(unwanted)}
