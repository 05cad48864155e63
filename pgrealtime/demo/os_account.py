"""Runs PostgreSQL's programs under another operating system account, in a clean environment.

PostgreSQL refuses to run as root, and libpq's variables would lead it to other databases.
"""

import os
import pwd
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class OsAccount:
    """An account of the operating system."""

    name: str
    uid: int
    gid: int


def server_account() -> OsAccount | None:
    """Return the account to run PostgreSQL under; None if the current one will do."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return OsAccount(nobody.pw_name, nobody.pw_uid, nobody.pw_gid)


def change_owner(path: Path, account: OsAccount | None) -> None:
    """Give a file or directory to the account; do nothing for None."""
    if account is not None:
        os.chown(path, account.uid, account.gid)


def start_program(
    command: list[str], account: OsAccount | None, *, folder: Path, output: int
) -> subprocess.Popen[bytes]:
    """Start a program as the account, or the current one; ``output`` is a file descriptor.

    The current working directory may be closed to the account, so that it gets its own.

    Raises:
        OSError: It can't be started.
    """
    return subprocess.Popen(  # noqa: S603 (PostgreSQL's own programs, found by ``programs``)
        command,
        cwd=folder,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        user=None if account is None else account.uid,
        group=None if account is None else account.gid,
        extra_groups=None if account is None else [],
    )


def run_program(
    command: list[str], account: OsAccount | None, *, folder: Path, seconds: float
) -> tuple[int, str]:
    """Run a program as the account to its end; return its exit status and what it printed.

    Raises:
        OSError: It can't be started.
        subprocess.TimeoutExpired: It took too long and was ended.
    """
    # A file, not a pipe: one that is full would stop a program that prints much.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        process = start_program(command, account, folder=folder, output=printed.fileno())
        try:
            status = process.wait(seconds)
        finally:
            process.kill()
        printed.seek(0)
        return status, printed.read()


def clean_environment() -> dict[str, str]:
    """Return the environment without libpq's and the server's variables."""
    kept = {name: value for name, value in os.environ.items() if not is_libpq_variable(name)}
    return {**kept, "LC_ALL": "C"}


def is_libpq_variable(name: str) -> bool:
    """Whether the variable is one of PGHOST, PGOPTIONS, PGDATA and so on."""
    return name.startswith("PG") and not name.startswith("PGREALTIME_")
