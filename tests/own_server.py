"""A PostgreSQL server of a test's own, for settings and stops that other tests must not see."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.conformance.process import free_port
from tests.lacking import lacking

DECODERS = "pgoutput, test_decoding, wal2json"


@dataclass(frozen=True, slots=True)
class OwnServer:
    """A server in a folder; runs while its context is open, unless it is stopped before."""

    binaries: Path
    folder: Path
    port: int

    @property
    def url(self) -> str:
        """Return the URL of the superuser's database."""
        return self.url_of("postgres")

    def url_of(self, user: str) -> str:
        """Return the URL of the same database for another role."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/postgres"

    @property
    def allows_choosing_decoders(self) -> bool:
        """Whether this minor release has ``output_plugin_libraries``."""
        return "output_plugin_libraries" in self.run("postgres", "--describe-config")

    def configure(self, **settings: str) -> None:
        """Replace the settings of the test before, and restart."""
        lines = "".join(f"{name} = '{value}'\n" for name, value in settings.items())
        (self.folder / "test.conf").write_text(lines)
        self.control("restart", "--mode=fast", f"--log={self.folder}/log")

    def control(self, *arguments: str, timeout: float = 60.0) -> None:
        """Run pg_ctl and wait for it."""
        self.run("pg_ctl", f"--pgdata={self.folder}/data", "--silent", *arguments, timeout=timeout)

    def run(self, program: str, *arguments: str, timeout: float = 60.0) -> str:
        """Run one of the server's programs, as a user that it accepts; return its output."""
        # A file, not a pipe: the server that pg_ctl starts inherits it and would hold that open.
        with (self.folder / "output").open("w+") as output:
            done = subprocess.run(
                [*_as_server(), str(self.binaries / program), *arguments],
                check=False,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            )
            output.seek(0)
            printed = output.read()
        assert done.returncode == 0, f"{program}: {printed}"
        return printed

    @contextmanager
    def standby(self) -> Iterator[OwnServer]:
        """Start a standby of this server, and end it."""
        other = OwnServer(self.binaries, self.folder / "standby", free_port())
        self.run(
            *("pg_basebackup", f"--dbname={self.url}", f"--pgdata={other.folder}/data"),
            *("--checkpoint=fast", "--write-recovery-conf", "--no-sync"),
        )
        other.control("start", f"--log={other.folder}/log", f"--options=-p {other.port}")
        try:
            yield other
        finally:
            other.control("stop", "--mode=immediate")


def _as_server() -> list[str]:
    if os.geteuid() != 0:
        return []
    # initdb refuses to run as root.
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--"]


@contextmanager
def own_server() -> Iterator[OwnServer]:
    """Start a server that is ready for both decoders, and end it."""
    binaries = os.environ.get("PGREALTIME_TEST_PG_BIN", "")
    if not binaries:
        lacking("no PostgreSQL programs: PGREALTIME_TEST_PG_BIN isn't set")
    # Not under pytest's folders: it removes other users' access, even while another run uses them.
    with TemporaryDirectory(prefix="pgrealtime-server.") as folder:
        if os.geteuid() == 0:
            subprocess.run(["chown", "postgres:", folder], check=True)
        with _running(Path(binaries), Path(folder)) as server:
            yield server


@contextmanager
def _running(binaries: Path, folder: Path) -> Iterator[OwnServer]:
    server = OwnServer(binaries, folder, free_port())
    data = folder / "data"
    server.run(
        *("initdb", f"--pgdata={data}", "--username=postgres", "--auth=trust", "--no-sync"),
        *("--encoding=UTF8", "--locale=C.UTF-8"),
    )
    decoders = f"output_plugin_libraries = '{DECODERS}'\n"
    with (data / "postgresql.conf").open("a") as file:
        file.write(
            f"port = {server.port}\nlisten_addresses = '127.0.0.1'\n"
            "unix_socket_directories = ''\nwal_level = logical\nfsync = off\n"
            "max_prepared_transactions = 10\n"
            + (decoders if server.allows_choosing_decoders else "")
            + f"include_if_exists = '{folder}/test.conf'\n"
        )
    server.control("start", f"--log={folder}/log")
    try:
        yield server
    finally:
        if (data / "postmaster.pid").exists():
            server.control("stop", "--mode=immediate")
