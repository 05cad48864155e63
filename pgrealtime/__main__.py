"""``python -m pgrealtime``: the same as the command."""

from pgrealtime.cli import main

main(prog_name="pgrealtime")
