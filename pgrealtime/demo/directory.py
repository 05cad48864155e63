"""Makes the directory of a throwaway server, locks it while in use, and removes it afterwards.

A demo that is killed can't clean up. So each start removes directories without a lock.
"""

import fcntl
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pgrealtime.demo.os_account import OsAccount, change_owner
from pgrealtime.errors import SetupError

PREFIX = "pgrealtime-demo."
_UNLOCKED_PREFIX = "pgrealtime-new."
"""Name of a directory until it is locked, so that no other start takes it for abandoned."""

_END_SECONDS = 10.0
_POLL_SECONDS = 0.02


@contextmanager
def server_directory(account: OsAccount | None) -> Iterator[Path]:
    """Make a directory that belongs to the account; remove abandoned ones, and this at the end.

    Raises:
        SetupError: No directory can be written to.
    """
    try:
        parent = Path(tempfile.gettempdir()).resolve()
    except FileNotFoundError as error:
        raise _unwritable_error(str(error)) from error
    owners = {os.geteuid()} | ({account.uid} if account else set())
    remove_stale_directories(parent, owners)
    try:
        unlocked = Path(tempfile.mkdtemp(prefix=_UNLOCKED_PREFIX, dir=parent))
        lock = os.open(unlocked, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _unwritable_error(str(error)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        change_owner(unlocked, account)
        path = unlocked.rename(parent / unlocked.name.replace(_UNLOCKED_PREFIX, PREFIX))
        try:
            yield path
        finally:
            remove_directory(path)
    finally:
        os.close(lock)


def _unwritable_error(detail: str) -> SetupError:
    return SetupError(
        "no directory can be written to",
        detail=detail,
        hint="Set TMPDIR to a directory with 100 MB to spare.",
        code="directory_unwritable",
    )


def remove_stale_directories(parent: Path, owners: Collection[int]) -> None:
    """Remove the directory of every demo that isn't running any more, and end its server.

    Only those of ``owners``, user ids, may be removed.
    """
    for path in (*parent.glob(f"{PREFIX}*"), *parent.glob(f"{_UNLOCKED_PREFIX}*")):
        with suppress(OSError):  # of another user, in use, or already removed
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(fd).st_uid in owners and _is_abandoned(path, fd):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_directory(path)
            finally:
                os.close(fd)


def _is_abandoned(path: Path, fd: int) -> bool:
    """Whether no demo can be about to lock it."""
    return path.name.startswith(PREFIX) or time.time() - os.fstat(fd).st_mtime > _END_SECONDS


def remove_directory(path: Path) -> None:
    """End the server of a directory and remove the directory, as far as they exist."""
    _end_server(path / "data")
    shutil.rmtree(path, ignore_errors=True)
    # Children of a server that was killed may still be writing.
    deadline = time.monotonic() + _END_SECONDS
    while path.exists() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        shutil.rmtree(path, ignore_errors=True)


def _end_server(data: Path) -> None:
    pid = _server_pid(data)
    if pid is None:
        return
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGQUIT)  # "immediate": there is nothing to save
        deadline = time.monotonic() + _END_SECONDS
        while _is_server(pid, data):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(_POLL_SECONDS)


def _server_pid(data: Path) -> int | None:
    """Return the pid of the server that runs in a data directory."""
    try:
        pid = int((data / "postmaster.pid").read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return None
    return pid if _is_server(pid, data) else None


def _is_server(pid: int, data: Path) -> bool:
    """Whether the process is the data directory's server, and not another one that got its pid.

    A server's working directory is its data directory. Without /proc it is left alone: it ends by
    itself within a minute after its postmaster.pid was removed (postmaster.c, ServerLoop).
    """
    try:
        return stat.S_ISDIR(data.stat().st_mode) and data.samefile(f"/proc/{pid}/cwd")
    except OSError:
        return False
