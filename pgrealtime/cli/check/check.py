"""Finds everything that would keep the service from running, in one go.

Called by the command ``check``. A problem hides others only where those depend on it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import click

from pgrealtime.auth.authenticator import issuer_key_problems
from pgrealtime.cli.check.database import Findings, check_database, count_text
from pgrealtime.cli.check.warnings import config_warnings
from pgrealtime.cli.options import config_option
from pgrealtime.cli.report import report_errors
from pgrealtime.collections.names import check_names
from pgrealtime.config.load import ParsedConfig, in_file_order, read_config
from pgrealtime.config.model import Config
from pgrealtime.errors import ConfigError, PgRealtimeError, RuleTestError, describe_problem
from pgrealtime.rules.rule_set import rule_texts, syntax_problems


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What the command prints: errors, or else a summary; and warnings."""

    errors: tuple[PgRealtimeError, ...]
    summary_lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """What runs but probably not as intended, each with a fix."""


async def run_check(
    parsed: ParsedConfig,
    *,
    with_database: bool,
    report_progress: Callable[[str], None] = lambda _: None,
) -> CheckResult:
    """Check the configuration, its rules and, unless disabled, the database.

    ``report_progress`` receives a line about each thing that is waited for.
    """
    config, locations = parsed.config, parsed.locations
    if config is None:
        return CheckResult(errors=(ConfigError(parsed.problems, source_name=locations.source),))
    is_connectable = not any(path[:1] == ("database",) for path in parsed.dropped_keys)
    if with_database and is_connectable:
        findings = await check_database(config, parsed, report_progress)
    else:
        findings = Findings(summary_lines=(_summarize_config(config),))
    problems = findings.problems
    if not findings.has_catalog:
        problems += (*check_names(config.collections), *syntax_problems(config.collections))
    problems += issuer_key_problems(config)
    errors = findings.errors
    if parsed.problems or problems:
        located = locations.locate(ConfigError(problems)).problems
        in_order = in_file_order((*parsed.problems, *located))
        errors = (ConfigError(in_order, source_name=locations.source), *errors)
    if findings.failed_tests:
        failed = locations.locate(ConfigError(findings.failed_tests)).problems
        errors += (RuleTestError(failed, findings.test_decisions, source_name=locations.source),)
    warnings = locations.locate(ConfigError((*config_warnings(config), *findings.warnings)))
    texts = [describe_problem(locations.source, p) for p in in_file_order(warnings.problems)]
    return CheckResult(errors, findings.summary_lines, tuple(texts))


def _summarize_config(config: Config) -> str:
    rules = sum(1 for collection in config.collections.values() for _ in rule_texts(collection))
    return f"{count_text(len(config.collections), 'collection')}, {count_text(rules, 'rule')}"


@click.command()
@config_option
@click.option("--no-database", is_flag=True, help="Check the configuration only.")
def check(path: str, *, no_database: bool) -> None:
    """Report every problem that would keep the service from running."""
    with report_errors():
        parsed = read_config(path)
        report = partial(click.echo, err=True)
        checking = run_check(parsed, with_database=not no_database, report_progress=report)
        result = asyncio.run(checking)
        if result.errors:
            raise ExceptionGroup("the check failed", result.errors)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo("\n".join(("ok", *result.summary_lines)))
