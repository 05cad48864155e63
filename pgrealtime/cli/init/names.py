"""Names collections and fields after tables and columns."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Iterable, Iterator
from itertools import count

from pgrealtime.catalog.model import Column, Table
from pgrealtime.catalog.naming import quote_identifier
from pgrealtime.changes import TableName
from pgrealtime.cli.init.accounts import (
    EMAIL_COLUMNS,
    text_column,
)
from pgrealtime.cli.init.model import CollectionDraft
from pgrealtime.collections.field_kinds import (
    AUTH_FIELD_KINDS,
    RESERVED_MEMBERS,
    field_kind_of,
)
from pgrealtime.collections.names import name_problem

_INVALID_CHARACTERS = re.compile(r"[^A-Za-z0-9]+")


_VIA_PATTERN = re.compile("_via_", re.IGNORECASE)


def valid_name(name: str, fallback: str) -> str:
    """Return the name itself if rules can contain it, or else the most similar one."""
    if name_problem(name) is None:
        return name
    letters = unicodedata.normalize("NFKD", name)
    fit = _INVALID_CHARACTERS.sub(
        "_", "".join(c for c in letters if not unicodedata.combining(c))
    ).strip("_")
    while _VIA_PATTERN.search(fit):
        fit = _VIA_PATTERN.sub("_by_", fit)
    return fit or fallback


def unused_name(name: str, taken: Container[str]) -> str:
    """Return the name, with a number appended if it is taken."""
    if name not in taken:
        return name
    return next(tried for n in count(2) if (tried := f"{name}_{n}") not in taken)


def name_collections(tables: Iterable[Table]) -> Iterator[tuple[str, Table]]:
    """Yield each table with its collection's name.

    Names differ by more than case, which ``@collection`` ignores.
    """
    taken = {"_superusers"}  # PocketBase's own
    for table in tables:
        name = valid_name(table.name.name, "table")
        if name.casefold() in taken:
            name = valid_name(f"{table.name.schema}_{table.name.name}", "table")
        if name.casefold() in taken:
            name = next(n for k in count(2) if (n := f"{name}_{k}").casefold() not in taken)
        taken.add(name.casefold())
        yield name, table


def field_renames(table: Table, key_name: str, *, is_auth: bool) -> dict[str, str]:
    """Return the field names of the columns that can't be shown under their own.

    A name that two columns could have goes to the column of that name.
    """
    others = [column for column in table.columns if column.name != key_name]
    email = text_column(table, EMAIL_COLUMNS) if is_auth else None
    taken = {"id", *RESERVED_MEMBERS}
    renames: dict[str, str] = {}
    unnamed: list[Column] = []
    for column in others:
        usual = _default_field_name(column, table, is_auth=is_auth)
        if (
            usual not in taken
            and name_problem(usual) is None
            and _fits_auth_kind(usual, column, is_auth=is_auth)
        ):
            taken.add(usual)
        else:
            unnamed.append(column)
    if email in others and email.name != "email" and "email" not in taken:
        unnamed = [column for column in unnamed if column != email]
        renames[email.name] = "email"
        taken.add("email")
    for column in unnamed:
        # Not a name that the server itself reads.
        name = unused_name(
            valid_name(column.name, "column"),
            taken | (AUTH_FIELD_KINDS.keys() if is_auth else set()),
        )
        renames[column.name] = name
        taken.add(name)
    return renames


def _default_field_name(column: Column, table: Table, *, is_auth: bool) -> str:
    if (
        is_auth
        and column.name == "email_visibility"
        and table.find_column("emailVisibility") is None
    ):
        return "emailVisibility"
    return column.name


def _fits_auth_kind(name: str, column: Column, *, is_auth: bool) -> bool:
    """Whether the column has the kind that an auth collection's field of that name must have."""
    wanted = AUTH_FIELD_KINDS.get(name) if is_auth else None
    return wanted is None or field_kind_of(column.type) == (wanted, False)


def field_name(draft: CollectionDraft, column: Column) -> str:
    """Return the name of a column's field in a draft."""
    usual = _default_field_name(column, draft.table, is_auth=draft.config.type == "auth")
    return (
        "id"
        if column.name == draft.key_name
        else draft.config.fields.rename.get(column.name, usual)
    )


def config_table_name(name: TableName) -> str:
    """Return the table's name as the configuration writes it."""
    return ".".join(p if re.fullmatch(r"\w+", p) else quote_identifier(p) for p in name)
