"""``pgrealtime demo``: a throwaway PostgreSQL, an application that writes, and a page to watch."""

import click

from pgrealtime.cli.options import run_coroutine
from pgrealtime.cli.report import report_errors
from pgrealtime.demo.run import run_demo


@click.command()
@click.option(
    "--port", default=8090, show_default=True, help="Port of the page; 0 is any free one."
)
@click.option("--embedded", is_flag=True, help="Use no PostgreSQL of this machine.")
@click.option("--no-browser", is_flag=True, help="Print the page's address only.")
def demo(*, port: int, embedded: bool, no_browser: bool) -> None:
    """Run a demonstration: a throwaway PostgreSQL, an application that writes, a page to watch."""
    with report_errors():
        run_coroutine(
            run_demo(
                port=port, embedded=embedded, open_browser=not no_browser, print_line=click.echo
            )
        )
