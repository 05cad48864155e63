"""Surveys a database and writes a first configuration for its tables, all rules locked.

Called by the command ``init``. ``drafts`` decides what to write, ``render`` makes YAML of it.
"""

import asyncio
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import click
from psycopg import AsyncConnection

from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Catalog
from pgrealtime.catalog.privileges import read_privilege_errors
from pgrealtime.changes import TableName
from pgrealtime.cli.init.extend import Addition, extend_config, parse_existing
from pgrealtime.cli.init.model import SchemaSurvey, TableFault
from pgrealtime.cli.init.render import render_config
from pgrealtime.cli.options import config_option
from pgrealtime.cli.report import report_errors
from pgrealtime.errors import SetupError
from pgrealtime.postgres.connect import connect_once
from pgrealtime.spelling import did_you_mean

STDOUT = "-"
_DEFAULT_FILE = "pgrealtime.yaml"
_DEFAULT_SCHEMAS = ("public",)

_SCHEMAS_QUERY = (
    "SELECT nspname FROM pg_catalog.pg_namespace WHERE nspname !~ '^pg_' ORDER BY nspname"
)

_TABLE_FACTS_QUERY = """
SELECT n.nspname, c.relname, e.extname,
       CASE WHEN c.relkind = 'p' THEN (
         SELECT pg_catalog.sum(leaf.reltuples)
         FROM pg_catalog.pg_partition_tree(c.oid) t
         JOIN pg_catalog.pg_class leaf ON leaf.oid = t.relid
         WHERE t.isleaf AND leaf.reltuples >= 0
       ) ELSE nullif(c.reltuples, -1) END
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_depend d
  ON d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid AND d.objsubid = 0
     AND d.deptype = 'e'
LEFT JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
WHERE c.oid = ANY (%(oids)s::pg_catalog.oid[])
"""


async def write_config(
    path: str,
    url: str,
    schemas: Sequence[str],
    *,
    only: Sequence[str] = (),
    excluded: Sequence[str] = (),
) -> Addition | None:
    """Write a configuration for the tables of the schemas, and return what was added to a file.

    ``-`` is the standard output. A file that exists keeps what it has, and gets the tables that it
    doesn't name; None is returned for a new one. An empty URL uses libpq's PG* variables. Of two
    tables with one name, that of the earlier schema keeps it. ``only`` and ``excluded`` are
    patterns of table names, see ``select_tables``.

    Raises:
        DatabaseUnreachableError: The server doesn't answer, or refuses the login.
        SetupError: Code ``schema_missing``, ``table_missing``, ``file_not_written`` or
            ``file_not_extended``.
    """
    existing = None if path == STDOUT else _read_existing(path)
    parsed = None if existing is None else parse_existing(path, existing)
    if parsed is not None and not schemas:
        schemas = parsed.schemas
    async with connect_once(url) as connection:
        schema = await _survey_schemas(connection, schemas or _DEFAULT_SCHEMAS, only, excluded)
    if parsed is not None:
        addition = extend_config(parsed, schema)
        if addition.names:
            _write_file(path, addition.text, mode="w")
        return addition
    text = render_config(schema, is_url_known=bool(url))
    if path == STDOUT:
        sys.stdout.write(text)
    else:
        _write_file(path, text, mode="x")
    return None


def _next_steps_text(path: str, *, lacks_url: bool) -> str:
    """Return the next steps; ``lacks_url``: what the file refers to isn't in the environment."""
    file = "the file" if path == STDOUT else path
    option = {STDOUT: " -c FILE", _DEFAULT_FILE: ""}.get(path, f" -c {shlex.quote(path)}")
    lines = [f"1. Unlock rules in {file}: read a suggestion, change it, remove its #."]
    if lacks_url:
        lines.append("   Set DATABASE_URL to the URL; the file only refers to it.")
    lines += [f"2. pgrealtime check{option}", "   pgrealtime sql prints what the database lacks."]
    return "\n".join([*lines, f"3. pgrealtime run{option}"])


def _added_lines(path: str, addition: Addition) -> Iterator[str]:
    """Yield what was added to a file."""
    if not addition.names:
        yield f"{path} names every table; nothing was added."
    for name, fault in addition.names.items():
        yield f"added to {path}: {name}{', not served: ' + fault if fault else ''}"
    for collection, relation in addition.relations:
        yield f"not added, since {collection} is in the file: relations: {{{relation}}}"


def _read_existing(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "It isn't UTF-8"
        raise SetupError(
            f'"{path}" can\'t be read',
            detail=f"{reason}.",
            hint="Name another file with --config.",
            code="file_not_extended",
        ) from error


def _write_file(path: str, text: str, *, mode: Literal["w", "x"]) -> None:
    try:
        with Path(path).open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise SetupError(
            f'"{path}" can\'t be written',
            detail=f"{error.strerror}.",
            hint="Name another file with --config.",
            code="file_not_written",
        ) from error


async def _survey_schemas(
    connection: AsyncConnection[Any],
    schemas: Sequence[str],
    only: Sequence[str],
    excluded: Sequence[str],
) -> SchemaSurvey:
    known = [name for (name,) in await (await connection.execute(_SCHEMAS_QUERY)).fetchall()]
    missing = [name for name in schemas if name not in known]
    if missing:
        hint = did_you_mean(missing[0], known) or f"there are {', '.join(known)}"
        raise SetupError(
            f'there is no schema "{missing[0]}"',
            hint=f"{hint[:1].upper()}{hint[1:]}.",
            code="schema_missing",
        )
    catalog = await read_catalog(connection, schemas=schemas)
    catalog = select_tables(catalog, only, excluded)
    oids = [table.oid for table in catalog.tables.values()]
    facts = await (await connection.execute(_TABLE_FACTS_QUERY, {"oids": oids})).fetchall()
    refused = await read_privilege_errors(connection, catalog.tables.values())
    return SchemaSurvey(
        catalog=catalog,
        extensions={TableName(s, name): extension for s, name, extension, _ in facts if extension},
        row_estimates={TableName(s, t): int(rows) for s, t, _, rows in facts if rows is not None},
        unreadable={name: TableFault(error.message, error.hint) for name, error in refused.items()},
    )


def select_tables(catalog: Catalog, only: Sequence[str], excluded: Sequence[str]) -> Catalog:
    """Return the tables that match one of ``only``, if there are any, and none of ``excluded``.

    Patterns are those of a shell, for the name with or without its schema. A partition is there or
    not with its root.

    Raises:
        SetupError: Code ``table_missing``: no table matches a pattern.
    """
    roots = {table.partition_of or name: None for name, table in catalog.tables.items()}
    for pattern in (*only, *excluded):
        if not any(_matches(root, pattern) for root in roots):
            known = [str(root) if "." in pattern else root.name for root in roots]
            hint = did_you_mean(pattern, known)
            raise SetupError(
                f'no table matches "{pattern}"',
                hint=f"{hint[:1].upper()}{hint[1:]}." if hint else "",
                code="table_missing",
            )
    chosen = {
        root
        for root in roots
        if (not only or any(_matches(root, pattern) for pattern in only))
        and not any(_matches(root, pattern) for pattern in excluded)
    }
    tables = {n: t for n, t in catalog.tables.items() if (t.partition_of or n) in chosen}
    return replace(catalog, tables=tables)


def _matches(name: TableName, pattern: str) -> bool:
    return fnmatchcase(name.name, pattern) or fnmatchcase(str(name), pattern)


@click.command()
@config_option
@click.option(
    "--url",
    envvar=["PGREALTIME_DATABASE__QUERY_URL", "DATABASE_URL"],
    default="",
    help="URL of the database, with the role that evaluates rules; also read from"
    " PGREALTIME_DATABASE__QUERY_URL or DATABASE_URL. Without it libpq's PG* variables apply.",
)
@click.option(
    "--schema",
    "schemas",
    multiple=True,
    help="Schema whose tables are served; may be repeated. By default public; or the file's.",
)
@click.option(
    "--table",
    "only",
    multiple=True,
    metavar="PATTERN",
    help="Only tables of this name, such as posts, 'app_*' or public.posts; may be repeated.",
)
@click.option(
    "--exclude",
    "excluded",
    multiple=True,
    metavar="PATTERN",
    help="No tables of this name; may be repeated.",
)
def init(
    path: str,
    url: str,
    schemas: tuple[str, ...],
    only: tuple[str, ...],
    excluded: tuple[str, ...],
) -> None:
    """Write a configuration for the existing tables, with all rules locked.

    A file that exists keeps what it has, and gets the tables that it doesn't name.
    """
    with report_errors():
        named = tuple(dict.fromkeys(schemas))
        addition = asyncio.run(write_config(path, url, named, only=only, excluded=excluded))
    if addition is not None:
        click.echo("\n".join(_added_lines(path, addition)))
        return
    lacks_url = bool(url) and not os.environ.get("DATABASE_URL")
    click.echo(_next_steps_text(path, lacks_url=lacks_url), err=path == STDOUT)
