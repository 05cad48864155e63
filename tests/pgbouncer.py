"""PgBouncer as a child process, with default settings except for those that a test needs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit, urlunsplit

from tests.conformance.process import free_port
from tests.lacking import lacking

_START_SECONDS = 10.0

_FILE = """
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {own_port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = {sessions}
max_prepared_statements = {prepared}
"""


@contextmanager
def pgbouncer(url: str, *roles: str, sessions: int = 2, prepared: int = 200) -> Iterator[str]:
    """Start a pooler in transaction mode in front of a database; yield the URL through it.

    Args:
        url: URL of the database.
        roles: Roles that may log in besides the URL's user.
        sessions: Server sessions of the pooler, for each role.
        prepared: Prepared statements that it keeps for its clients; versions before 1.21 none.
    """
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        lacking("no pgbouncer")
    parts = urlsplit(url)
    port = free_port()
    with TemporaryDirectory(prefix="pgrealtime-pgbouncer.") as name:
        folder = Path(name)
        folder.chmod(0o755)
        users = "".join(f'"{role}" ""\n' for role in (parts.username, *roles))
        (folder / "users").write_text(users)
        (folder / "pgbouncer.ini").write_text(
            _FILE.format(
                host=parts.hostname,
                port=parts.port,
                own_port=port,
                folder=folder,
                sessions=sessions,
                prepared=prepared,
            )
        )
        # It refuses to run as root.
        account = {"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [program, "--quiet", str(folder / "pgbouncer.ini")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **account,  # type: ignore[call-overload]  # of two types
            )
        try:
            _await(process, port, folder / "log")
            netloc = f"{parts.username}@127.0.0.1:{port}"
            yield urlunsplit(parts._replace(netloc=netloc))
        finally:
            process.kill()
            process.wait()


def _await(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        else:
            return
