"""nginx, Caddy and haproxy as child processes, each with its file from ``config/proxy``."""

from __future__ import annotations

import asyncio
import getpass
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from tests.conformance.http_client import Address
from tests.conformance.process import POLL_SECONDS, ServerDiedError, ServerProcess, free_port
from tests.lacking import lacking

Program: TypeAlias = Literal["nginx", "caddy", "haproxy"]
PROGRAMS: tuple[Program, ...] = ("nginx", "caddy", "haproxy")

PREFIX = "/realtime"
"""The path prefix under which the files serve pgrealtime."""

_FILES = Path(__file__).parents[2] / "config" / "proxy"
_START_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Set:
    """A proxy's file, the replacements that fit it to the test's machine, and the rest.

    The rest is what a distribution's own files contain: paths, the user, the foreground mode.
    """

    file: str
    listen: tuple[str, str]
    """A text of the file and its replacement; ``{port}`` is the proxy's port."""
    rest: str
    """Surrounding configuration; ``{file}`` is the file, ``{dir}`` a directory to write to."""
    arguments: Sequence[str]


_SETS: Mapping[Program, Set] = {
    "nginx": Set(
        file="nginx.conf",
        listen=("listen 80;", "listen 127.0.0.1:{port};"),
        rest="""
user {user};
daemon off;
worker_processes 1;
pid {dir}/nginx.pid;
error_log stderr;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    include {file};
}}
""",
        arguments=("-e", "stderr", "-p", "{dir}", "-c", "{rest}"),
    ),
    "caddy": Set(
        file="Caddyfile",
        listen=(":80 {", ":{port} {{\n\tbind 127.0.0.1"),
        rest="""
{{
	admin off
	grace_period 1s
	servers {{
		protocols h1 h2c
	}}
}}
import {file}
""",
        arguments=("run", "--adapter", "caddyfile", "--config", "{rest}"),
    ),
    "haproxy": Set(
        file="haproxy.cfg",
        listen=("bind :80", "bind 127.0.0.1:{port}"),
        rest="",
        arguments=("-db", "-f", "{file}"),
    ),
}


class Proxy:
    """One proxy; it may be stopped and started again."""

    def __init__(self, command: Sequence[str], log: Path, address: Address) -> None:
        self._command = command
        self._log = log
        self.address = address
        self._process: ServerProcess | None = None

    @property
    def url(self) -> str:
        return f"http://{self.address.host}:{self.address.port}"

    @property
    def output(self) -> str:
        """Return what it has printed."""
        return "" if self._process is None else self._process.output()

    async def start(self) -> None:
        """Start it; return once it takes connections."""
        own = str(self._log.parent)
        home = {"XDG_DATA_HOME": own, "XDG_CONFIG_HOME": own}  # Caddy keeps something in both
        self._process = await ServerProcess.start(self._command, self._log, home)
        try:
            async with asyncio.timeout(_START_SECONDS):
                while True:
                    with suppress(OSError):
                        await self._connect()
                        return
                    await asyncio.sleep(POLL_SECONDS)  # the only sign of readiness
        except TimeoutError as error:
            await self.stop()
            raise ServerDiedError(self.output) from error

    async def _connect(self) -> None:
        _, writer = await asyncio.open_connection(self.address.host, self.address.port)
        writer.close()

    async def stop(self) -> None:
        if self._process is not None:
            await self._process.stop()


@asynccontextmanager
async def proxy(
    program: Program, to: Address, directory: Path, *, edits: Mapping[str, str] | None = None
) -> AsyncIterator[Proxy]:
    """Run the program in front of a server, with its file unchanged except for the ports.

    Args:
        program: The proxy's program.
        to: The server.
        directory: Receives what it writes.
        edits: Further texts of its file and their replacements, such as shorter times.
    """
    file = _FILES / _SETS[program].file
    changes = {"127.0.0.1:8090": f"{to.host}:{to.port}", **(edits or {})}
    async with proxy_with(program, file, directory, changes) as running:
        yield running


@asynccontextmanager
async def proxy_with(
    program: Program, source: Path, directory: Path, edits: Mapping[str, str]
) -> AsyncIterator[Proxy]:
    """Run the program with a file; all of the edits are made in it, and that of its own port."""
    executable = shutil.which(program, path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if executable is None:
        lacking(f"{program} is missing; sh tests/run.sh installs it")
    parts = _SETS[program]
    port = free_port()
    listen, listen_here = parts.listen
    text = _edited(source, {listen: listen_here.format(port=port), **edits})
    own = directory / program
    own.mkdir()
    file, rest = own / parts.file, own / "rest"
    file.write_text(text)
    rest.write_text(parts.rest.format(file=file, dir=own, user=getpass.getuser()))
    names = {"dir": own, "file": file, "rest": rest}
    command = [executable, *(argument.format(**names) for argument in parts.arguments)]
    running = Proxy(command, own / "log", Address(host="127.0.0.1", port=port))
    try:
        await running.start()
        yield running
    finally:
        await running.stop()


def _edited(source: Path, edits: Mapping[str, str]) -> str:
    text = source.read_text()
    for old, new in edits.items():
        assert old in text, f"{old!r} isn't in {source}"
        text = text.replace(old, new)
    return text
