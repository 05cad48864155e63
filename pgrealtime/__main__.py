"""``python -m pgrealtime``: the same as the command."""

from pgrealtime.cli.main import main

main(prog_name="pgrealtime")
