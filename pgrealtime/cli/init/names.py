"""Derives names of collections and fields from those of tables and columns, for ``init``. Pure."""

import re
import unicodedata
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import count

from pgrealtime.catalog.model import Column, Table
from pgrealtime.changes import TableName, quote_identifier
from pgrealtime.cli.init.accounts import EMAIL_COLUMNS, text_column
from pgrealtime.cli.init.model import CollectionDraft
from pgrealtime.collections.field_kinds import AUTH_FIELD_KINDS, RESERVED_MEMBERS, field_kind_of
from pgrealtime.collections.names import name_problem

_INVALID_CHARACTERS = re.compile(r"[^A-Za-z0-9]+")
_VIA_PATTERN = re.compile("_via_", re.IGNORECASE)
"""PocketBase's mark of a back relation: no name may contain it."""


def valid_name(name: str, fallback: str) -> str:
    """Return the name if it is valid in a rule; else without accents and invalid characters."""
    if name_problem(name) is None:
        return name
    letters = (c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    valid = _INVALID_CHARACTERS.sub("_", "".join(letters)).strip("_")
    while _VIA_PATTERN.search(valid):
        valid = _VIA_PATTERN.sub("_by_", valid)
    return valid or fallback


def unused_name(name: str, taken: Container[str]) -> str:
    """Return the name, with a number appended if it is taken."""
    if name not in taken:
        return name
    return next(tried for n in count(2) if (tried := f"{name}_{n}") not in taken)


def name_collections(
    tables: Iterable[Table], given: Mapping[TableName, str]
) -> Iterator[tuple[str, Table]]:
    """Yield each table with its collection's name: the given one, if it has one.

    Names are unique without regard to case, because ``@collection.NAME`` ignores case.
    """
    taken = {"_superusers", *(name.casefold() for name in given.values())}  # PocketBase's own
    for table in tables:
        if table.name in given:
            yield given[table.name], table
            continue
        name = valid_name(table.name.name, "table")
        if name.casefold() in taken:
            name = valid_name(f"{table.name.schema}_{table.name.name}", "table")
        if name.casefold() in taken:
            name = next(n for k in count(2) if (n := f"{name}_{k}").casefold() not in taken)
        taken.add(name.casefold())
        yield name, table


def field_renames(table: Table, key_name: str, *, is_auth: bool) -> dict[str, str]:
    """Return the field names of the columns whose field doesn't have its default name.

    If two columns compete for a name, the column that has this name keeps it.
    """
    others = [column for column in table.columns if column.name != key_name]
    email = text_column(table, EMAIL_COLUMNS) if is_auth else None
    taken = {"id", *RESERVED_MEMBERS}
    renames: dict[str, str] = {}
    needing_names: list[Column] = []
    for column in others:
        default_name = _default_field_name(column, table, is_auth=is_auth)
        if (
            default_name not in taken
            and name_problem(default_name) is None
            and _fits_auth_kind(default_name, column, is_auth=is_auth)
        ):
            taken.add(default_name)
        else:
            needing_names.append(column)
    if email in others and email.name != "email" and "email" not in taken:
        needing_names = [column for column in needing_names if column != email]
        renames[email.name] = "email"
        taken.add("email")
    # Not a name that has a meaning in an auth collection, such as "verified".
    taken |= AUTH_FIELD_KINDS.keys() if is_auth else set()
    for column in needing_names:
        renames[column.name] = unused_name(valid_name(column.name, "column"), taken)
        taken.add(renames[column.name])
    return renames


def _default_field_name(column: Column, table: Table, *, is_auth: bool) -> str:
    """Return the field name of a column that the configuration doesn't rename."""
    has_own_column = table.find_column("emailVisibility") is not None
    is_visibility = is_auth and column.name == "email_visibility" and not has_own_column
    return "emailVisibility" if is_visibility else column.name


def _fits_auth_kind(name: str, column: Column, *, is_auth: bool) -> bool:
    """Whether the column has the kind that an auth collection's field of that name must have."""
    wanted = AUTH_FIELD_KINDS.get(name) if is_auth else None
    return wanted is None or field_kind_of(column.type) == (wanted, False)


def field_name(draft: CollectionDraft, column: Column) -> str:
    """Return the name of a column's field in a draft."""
    if column.name == draft.key_name:
        return "id"
    default_name = _default_field_name(column, draft.table, is_auth=draft.config.type == "auth")
    return draft.config.fields.rename.get(column.name, default_name)


def config_table_name(name: TableName) -> str:
    """Return the table's name as the configuration writes it."""
    return ".".join(p if re.fullmatch(r"\w+", p) else quote_identifier(p) for p in name)
