"""Checks the fields and the login of a configured collection against its table.

Called by ``build`` for each collection, once its fields are known.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from pgrealtime.collections.field_kinds import (
    AUTH_FIELD_KINDS,
    RESERVED_MEMBERS,
)
from pgrealtime.collections.model import Collection, Field
from pgrealtime.collections.names import name_problem
from pgrealtime.collections.tables import ResolvedTable, unknown_column_problem
from pgrealtime.errors import ConfigProblem
from pgrealtime.spelling import did_you_mean


def configured_name_problems(
    resolved: ResolvedTable, field_names: set[str]
) -> Iterator[ConfigProblem]:
    """Yield each column and field that ``fields`` names and that the table doesn't have."""
    fields, table = resolved.config.fields, resolved.table
    path = f"collections.{resolved.name}.fields"
    for name in fields.include:
        if name != "*" and table.find_column(name) is None:
            yield unknown_column_problem(f"{path}.include", table, name)
    for name, field_name in fields.rename.items():
        if table.find_column(name) is None:
            yield unknown_column_problem(f"{path}.rename.{name}", table, name)
        elif name == resolved.key.name and field_name not in {"id", *field_names}:
            # A key that is a relation has a name as such.
            yield resolved.problem(f"fields.rename.{name}", 'the key is always shown as "id"')
    for name in set(fields.types) - field_names:
        yield unknown_field_problem(resolved, f"fields.types.{name}", name, field_names)
    relations = resolved.config.relations
    junctions = {name for name, relation in relations.items() if relation.through}
    for name in fields.hide:
        if name == "id":
            yield resolved.problem("fields.hide", "the id can't be hidden")
        elif name not in field_names | junctions:
            yield unknown_field_problem(resolved, "fields.hide", name, field_names)


def unknown_field_problem(
    resolved: ResolvedTable, key: str, name: str, field_names: Iterable[str]
) -> ConfigProblem:
    """Return the problem that there is no such field, with a hint at what was meant."""
    column = resolved.table.find_column(name)
    if column is None:
        hint = did_you_mean(name, field_names)
    elif resolved.is_included(column):
        hint = f'the column is shown as "{resolved.field_name(column)}"'
    else:
        hint = "fields.include leaves the column out"
    return resolved.problem(key, f'there is no field "{name}"', hint)


def login_problems(resolved: ResolvedTable, field_names: set[str]) -> Iterator[ConfigProblem]:
    """Yield what is wrong with ``login``, ``manage_rule`` and ``auth_rule``."""
    config, login = resolved.config, resolved.config.login
    if not resolved.is_auth:
        hint = "set type: auth"
        if login.secret_columns:
            yield resolved.problem("login", "nobody logs in to a base collection", hint)
        if config.manage_rule is not None:
            message = "a base collection has no e-mail addresses to show"
            yield resolved.problem("manage_rule", message, hint)
        if config.auth_rule != "":
            yield resolved.problem("auth_rule", "nobody logs in to a base collection", hint)
    for key in ("password_hash", "token_key"):
        name = getattr(login, key)
        if name and resolved.table.find_column(name) is None:
            path = f"collections.{resolved.name}.login.{key}"
            yield unknown_column_problem(path, resolved.table, name)
    if login.password_hash:
        for name in set(login.identity) - field_names:
            yield unknown_field_problem(resolved, "login.identity", name, field_names)


def claim_problems(
    claim_names: Iterable[str], collections: Iterable[Collection]
) -> Iterator[ConfigProblem]:
    """Yield each name of a claim that a rule would already read as a field of the caller."""
    auth_fields = {
        name: collection.name
        for collection in collections
        if collection.type == "auth"
        for name in collection.fields_by_name
    }
    for name in sorted(claim_names):
        if name in {"id", *RESERVED_MEMBERS, *AUTH_FIELD_KINDS}:
            message = f'"@request.auth.{name}" is always the caller\'s own'
        elif name in auth_fields:
            message = f'collection "{auth_fields[name]}" has a field "{name}"'
        else:
            continue
        yield ConfigProblem(f"auth.issuers.claims.{name}", message, "give the claim another name")


def field_problems(resolved: ResolvedTable, fields: Sequence[Field]) -> Iterator[ConfigProblem]:
    """Yield fields of the same name, of a name that can't be used, or of the wrong kind."""
    for name, count in Counter(field.name for field in fields).items():
        if count > 1 and name == "id" and resolved.key.id_sources:
            message = (
                "two fields are named \"id\": the record's, of the key's columns, and a column's"
            )
            hint = "rename the column, as fields.rename: {id: number}"
            yield resolved.problem("fields", message, hint)
        elif count > 1:
            message = f'two fields are named "{name}"'
            yield resolved.problem("fields", message, "rename one of them")
    for field in fields:
        is_reserved = field.name in RESERVED_MEMBERS
        reason = "every record has that member" if is_reserved else name_problem(field.name)
        if reason is not None:
            message = f'a field can\'t be named "{field.name}": {reason}'
            yield resolved.problem("fields", message, "rename it")
        kind = AUTH_FIELD_KINDS.get(field.name) if resolved.is_auth else None
        if kind is not None and (field.kind is not kind or field.is_multiple):
            message = f'"{field.name}" of an auth collection must be a {kind.value} column'
            yield resolved.problem("fields", message, "rename it, or leave it out")
