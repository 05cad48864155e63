"""Prints the SQL for what a database lacks of what a configuration needs. The command ``sql``."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import click
from psycopg import AsyncConnection

from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Catalog, ReplicaIdentity, Table, TableKind
from pgrealtime.cli.options import config_option
from pgrealtime.cli.report import report_errors
from pgrealtime.cli.sql.steps import (
    Step,
    grant_steps,
    guarded,
    identity_steps,
    index_steps,
    publication_steps,
    role_exists,
    role_steps,
    tables_to_log_whole,
)
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collections
from pgrealtime.collections.names import configured_table_names
from pgrealtime.collections.streamed_tables import reachable_tables, streamed_tables
from pgrealtime.config.load import read_config
from pgrealtime.config.model import Config
from pgrealtime.errors import ConfigError
from pgrealtime.postgres.connect import connect_once
from pgrealtime.postgres.url import parse_database_url
from pgrealtime.rules.rule_set import rule_problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is lacking, in the order in which it is to be run."""

    database_name: str
    sections: Sequence[tuple[str, Sequence[Step]]]
    """Titles and steps; none is empty."""


async def make_plan(config: Config, url: str) -> Plan:
    """Compare the database at the URL with the configuration.

    Raises:
        ConfigError: The collections don't fit their tables, even with other replica identities.
        DatabaseUnreachableError: The server doesn't answer, or refuses the login.
    """
    database = config.database
    async with connect_once(url or database.query_url or database.url) as connection:
        names = configured_table_names(config.collections, database.schemas)
        catalog = await read_catalog(connection, schemas=database.schemas, names=names)
        collections = _build_collections(config, catalog)
        stream_role = _role_of(database.url, "pgrealtime")
        query_role = (
            _role_of(database.query_url, "pgrealtime_query") if database.query_url else stream_role
        )
        reachable = reachable_tables(collections)
        tables = reachable.values()
        sections = {
            "Logins": [s async for s in role_steps(connection, stream_role, query_role)],
            "Grants": [s async for s in grant_steps(connection, tables, query_role)],
            "Replica identities": [
                s
                async for s in identity_steps(connection, tables_to_log_whole(catalog, collections))
            ],
            "Publication": await _plan_publication(connection, config, collections),
            "Indexes": [
                s
                async for s in index_steps(
                    connection, collections, reachable, with_lists=config.reads.enabled
                )
            ],
        }
        return Plan(
            database_name=_one_line(connection.info.dbname),
            sections=[(title, steps) for title, steps in sections.items() if steps],
        )


def _build_collections(config: Config, catalog: Catalog) -> Collections:
    """Return the collections, as if every table logged whole old rows already."""
    tables = {name: _logging_whole_rows(table) for name, table in catalog.tables.items()}
    collections = build_collections(
        config.collections,
        replace(catalog, tables=tables),
        config.auth.claim_names,
        is_strict=config.records.hidden == "strict",
    )
    if problems := tuple(rule_problems(collections)):
        raise ConfigError(problems)
    return collections


def _logging_whole_rows(table: Table) -> Table:
    if table.kind not in (TableKind.TABLE, TableKind.PARTITIONED):
        return table
    return replace(
        table,
        replica_identity=ReplicaIdentity.FULL,
        replica_identity_columns=tuple(column.name for column in table.columns),
    )


def _role_of(url: str, default: str) -> str:
    return str(parse_database_url(url).get("user") or os.environ.get("PGUSER") or default)


async def _plan_publication(
    connection: AsyncConnection[Any], config: Config, collections: Collections
) -> list[Step]:
    if config.replication.plugin != "pgoutput":
        return []
    name, tables = config.replication.publication, list(streamed_tables(collections).values())
    return [s async for s in publication_steps(connection, name, tables)]


# -- text

_APPLY_HEAD = """\
-- What the configuration needs of database "{database}", and the database lacks.
-- Run it there as a superuser, or as an owner of the tables who may create roles:
--   psql -v ON_ERROR_STOP=1 -d {database} -f FILE
-- Safe to run again. What undoes it is at the end.
"""
_NOTHING = """\
-- Database "{database}" lacks nothing of what the configuration needs.
"""
_UNDO_HEAD = """\
-- Undoes what "pgrealtime sql" prints for database "{database}" as long as that wasn't run.
"""
_LOCK_TIMEOUT = """\
-- ALTER TABLE waits for the table's readers and writers, and makes all later ones wait behind it.
SET lock_timeout = '5s';
"""


def apply_text(plan: Plan) -> str:
    """Return the script, with its undo as comments at the end."""
    if not plan.sections:
        return (
            f'-- Database "{plan.database_name}" lacks nothing of what the configuration needs.\n'
        )
    parts = [_APPLY_HEAD.format(database=plan.database_name)]
    for title, steps in plan.sections:
        parts.append(f"\n-- {title}\n")
        is_locking = title == "Replica identities"
        parts.append(_LOCK_TIMEOUT if is_locking else "")
        parts += [f"-- {_one_line(step.reason)}\n{step.apply}\n" for step in steps]
        parts.append("RESET lock_timeout;\n" if is_locking else "")
    commented = "".join(f"-- {line}\n" for line in _undo_lines(plan))
    return "".join((*parts, "\n-- Undo\n", commented))


def undo_text(plan: Plan) -> str:
    """Return the script that undoes ``apply_text``."""
    return _UNDO_HEAD.format(database=plan.database_name) + "".join(
        f"{line}\n" for line in _undo_lines(plan)
    )


def _undo_lines(plan: Plan) -> Sequence[str]:
    steps = [step for _, steps in plan.sections for step in steps]
    texts = []
    for role, group in groupby(reversed(steps), lambda step: step.undo_role):
        undone = [
            step.undo or f"-- not undone, since it was another one before: {_one_line(step.reason)}"
            for step in group
        ]
        texts += [guarded(role_exists(role), *undone)] if role else undone
    return [line for text in texts for line in text.splitlines()]


def _one_line(text: str) -> str:
    """Return the text as a comment has it: names in it may have line breaks."""
    return " ".join(text.split())


@click.command()
@config_option
@click.option(
    "--url",
    default="",
    help="Where the catalogue is read, if the logins of the configuration don't exist yet: an"
    " administrator's URL of the same database.",
)
@click.option("--undo", is_flag=True, help="Print what undoes it; before it is run.")
def sql(path: str, url: str, *, undo: bool) -> None:
    """Print the SQL for what the database lacks: logins, grants, identities, indexes."""
    with report_errors():
        parsed = read_config(path)
    with report_errors(parsed.locations):
        plan = asyncio.run(make_plan(parsed.require_valid(), url))
    click.echo(undo_text(plan) if undo else apply_text(plan), nl=False)
