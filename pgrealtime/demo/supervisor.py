"""The process that runs the throwaway server, and ends and removes it when its input ends.

The input is a pipe of the demo's process. It ends when the demo closes it, or dies in whatever way:
a demo that is killed leaves nothing behind, and there is one way to end instead of two.
"""

import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pgrealtime.demo import os_account as accounts
from pgrealtime.demo.directory import server_directory
from pgrealtime.demo.os_account import OsAccount
from pgrealtime.demo.programs import ServerPrograms, find_programs
from pgrealtime.errors import PgRealtimeError, SetupError

_INITDB_SECONDS = 120.0
_START_SECONDS = 60.0
_POLL_SECONDS = 0.02
_WATCH_SECONDS = 0.5
_ATTEMPTS = 3
"""To start on a free port, which may be taken a moment later."""

_STOP_SECONDS = 20.0
_MAX_LOG_LINES = 5
_STATE_LINE = 7

_USER = "demo"

_SERVER_SETTINGS = (
    *("listen_addresses=127.0.0.1", "unix_socket_directories="),
    *("wal_level=logical", "max_wal_senders=10", "max_replication_slots=10"),
    # Small, and quick to make and to end: its data isn't kept.
    *("shared_buffers=32MB", "max_connections=40", "fsync=off", "autovacuum=off"),
)


def main(arguments: list[str]) -> int:
    """Run a server until the input ends; print its facts, or the error, as one JSON line."""
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        account = accounts.server_account()
        with server_directory(account) as folder:
            programs = find_programs(account, folder, embedded="--embedded" in arguments)
            with _running_server(programs, account, folder) as (server, url):
                facts = {"version": programs.version, "origin": programs.origin}
                _print_facts(url=url, directory=str(folder), **facts)
                _wait_for_end(server)
    except PgRealtimeError as error:
        _print_facts(error=[error.message, error.detail, error.hint, error.error_code])
        return 1
    return 0


def _exit_on_signal(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(0)


def _print_facts(**facts: object) -> None:
    try:
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise SystemExit(1) from None  # the demo has died


def _wait_for_end(server: subprocess.Popen[bytes]) -> None:
    """Return when the input or the server ends."""
    while server.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], _WATCH_SECONDS)
        if readable and not os.read(sys.stdin.fileno(), 1):
            return


@contextmanager
def _running_server(
    programs: ServerPrograms, account: OsAccount | None, folder: Path
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Make a cluster and run its server for the duration of the block."""
    password = secrets.token_urlsafe(12)
    _make_cluster(programs, account, folder, password)
    server, port = _start_server(programs, account, folder)
    try:
        yield server, f"postgresql://{_USER}:{password}@127.0.0.1:{port}/postgres"
    finally:
        _stop_server(server)


def _make_cluster(
    programs: ServerPrograms, account: OsAccount | None, folder: Path, password: str
) -> None:
    # In a file, because every user sees arguments. And a password at all, because other users of
    # this machine reach 127.0.0.1, too, and a superuser can run programs.
    secret = folder / "password"
    secret.touch(mode=0o600)
    secret.write_text(password)
    accounts.change_owner(secret, account)
    command = [
        *(str(programs.folder / "initdb"), f"--pgdata={folder / 'data'}", f"--username={_USER}"),
        *("--auth=scram-sha-256", f"--pwfile={secret}", "--encoding=UTF8", "--locale=C"),
        "--no-sync",
    ]
    try:
        status, output = accounts.run_program(
            command, account, folder=folder, seconds=_INITDB_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        status, output = 1, str(error)
    secret.unlink()
    if status != 0:
        raise _start_error(output)


def _start_server(
    programs: ServerPrograms, account: OsAccount | None, folder: Path
) -> tuple[subprocess.Popen[bytes], int]:
    settings = [*_SERVER_SETTINGS, *_decoder_settings(programs, account, folder)]
    for _ in range(_ATTEMPTS):
        port = _free_port()
        command = [str(programs.folder / "postgres"), f"-D{folder / 'data'}"]
        command += [f"--{setting}" for setting in (f"port={port}", *settings)]
        with (folder / "log").open("wb") as log:
            server = accounts.start_program(command, account, folder=folder, output=log.fileno())
        try:
            if _wait_until_ready(server, folder / "data"):
                return server, port
        except BaseException:
            _stop_server(server)
            raise
        _stop_server(server)
    raise _start_error((folder / "log").read_text(errors="replace"))


def _decoder_settings(
    programs: ServerPrograms, account: OsAccount | None, folder: Path
) -> tuple[str, ...]:
    """Return the setting that allows both decoders, if the server has it.

    Minor releases of 2026 refuse other decoders than those named.
    """
    command = [str(programs.folder / "postgres"), f"-D{folder / 'data'}"]
    command += ["-C", "output_plugin_libraries"]
    status, _ = accounts.run_program(command, account, folder=folder, seconds=_START_SECONDS)
    return () if status != 0 else ("output_plugin_libraries=pgoutput, wal2json",)


def _wait_until_ready(server: subprocess.Popen[bytes], data: Path) -> bool:
    """Wait until the server accepts connections; return False if it ended or took too long."""
    deadline = time.monotonic() + _START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        # The eighth line is the state, for pg_ctl to read (miscadmin.h, LOCK_FILE_LINE_PM_STATUS).
        with suppress(OSError):
            lines = (data / "postmaster.pid").read_text().split("\n")
            if len(lines) > _STATE_LINE and lines[_STATE_LINE].strip() == "ready":
                return True
        time.sleep(_POLL_SECONDS)
    return False


def _stop_server(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGQUIT)  # "immediate": there is nothing to save
    try:
        server.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _start_error(output: str) -> SetupError:
    lines = [line for line in output.splitlines() if line.strip()]
    return SetupError(
        "the demo's PostgreSQL doesn't start",
        detail="\n".join(lines[-_MAX_LOG_LINES:]),
        code="server_not_started",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
