"""``pgrealtime files``: the folder of what is installed beside the program."""

from pathlib import Path

import click

import pgrealtime


@click.command()
def files() -> None:
    """Print the folder that has sql/roles.sql, sql/tables.sql and config/pgrealtime.yaml."""
    click.echo(str(files_folder()))


def files_folder() -> Path:
    """Return the folder in the installed package; without it, the repository's root."""
    package = Path(pgrealtime.__file__).parent
    installed = package / "files"
    return installed if installed.is_dir() else package.parent
