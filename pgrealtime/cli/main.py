"""The command line: the group ``pgrealtime``, whose commands have a module each."""

from importlib import import_module

import click

from pgrealtime import __version__

_COMMANDS = {
    "check": "pgrealtime.cli.check.check",
    "demo": "pgrealtime.cli.demo",
    "explain": "pgrealtime.cli.explain",
    "explain-error": "pgrealtime.cli.explain_error",
    "files": "pgrealtime.cli.files",
    "init": "pgrealtime.cli.init.init",
    "listen": "pgrealtime.cli.listen",
    "live": "pgrealtime.cli.live",
    "run": "pgrealtime.cli.run",
    "slot": "pgrealtime.cli.slot",
    "sql": "pgrealtime.cli.sql.sql",
    "token": "pgrealtime.cli.token",
    "worker": "pgrealtime.cli.worker",
}


class _LazyGroup(click.Group):
    """Imports a command's module when the command is used: ``listen`` needs no SQL parser.

    Source: click's documentation, "Lazily Loading Subcommands".
    """

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's)
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 (click's)
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(
            import_module(_COMMANDS[cmd_name]), cmd_name.replace("-", "_")
        )
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pgrealtime", message="%(prog)s %(version)s")
def main() -> None:
    """PocketBase's realtime API for the PostgreSQL database you already have."""
