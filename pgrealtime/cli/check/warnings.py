"""Warnings of ``pgrealtime check``: what is valid, but hardly what the operator means.

Each has the SQL, the rule or the setting that fixes it as its hint.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from decimal import Decimal
from ipaddress import ip_address
from itertools import chain
from urllib.parse import urlsplit

from pgrealtime.catalog.model import Column
from pgrealtime.changes import quote_identifier, quote_table_name
from pgrealtime.cli.check.absent_values import absent_value_warnings
from pgrealtime.cli.check.rules import (
    columns_read,
    identifier_text,
    parsed_rules,
    replace_spans,
    resolved_conditions,
)
from pgrealtime.collections.model import Collection, Collections, Field, FieldKind
from pgrealtime.collections.tables import alter_leaf_tables
from pgrealtime.config.model import Config
from pgrealtime.errors import ConfigProblem
from pgrealtime.rules.engine.admission import is_about_login
from pgrealtime.rules.language import predicate, syntax
from pgrealtime.rules.language.comparison import is_double
from pgrealtime.rules.language.parameters import RequestValue
from pgrealtime.rules.language.sqlite_values import exact_number
from pgrealtime.rules.language.syntax import ExpressionNode, LiteralNode, Op
from pgrealtime.spelling import did_you_mean


def config_warnings(config: Config) -> Iterator[ConfigProblem]:
    """Yield the warnings that need no database."""
    if not config.collections:
        hint = "pgrealtime init writes them from the existing tables"
        yield ConfigProblem("collections", "there are none: no subscriber receives anything", hint)
    yield from _issuer_warnings(config)
    yield from _issuer_key_warnings(config)
    if config.cluster.bus == "postgres" and config.replication.slot.durable:
        yield ConfigProblem(
            "replication.slot.durable",
            "every process of the cluster needs a durable slot of its own: the second one of a name"
            " waits until the first has ended",
            "set PGREALTIME_REPLICATION__SLOT__NAME for each, or durable: false",
        )
    for name, collection in config.collections.items():
        for key, rule, expression in parsed_rules(collection):
            yield from _match_all_warnings(f"collections.{name}.{key}", rule, expression)


def collection_warnings(collections: Collections) -> Iterator[ConfigProblem]:
    """Yield the warnings about valid rules, found from the tables' columns and keys."""
    for collection in collections.values():
        for key, rule, expression in parsed_rules(collection):
            path = f"collections.{collection.name}.{key}"
            yield from absent_value_warnings(path, rule, expression, collections, collection)
            yield from _precision_warnings(path, rule, expression, collections, collection)
        yield from _auth_rule_warnings(collection)
        if collection.is_streamed:
            yield from _id_warnings(collection)
            yield from _delete_warnings(collections, collection)
            yield from _link_warnings(collection)


# -- issuers


def _issuer_warnings(config: Config) -> Iterator[ConfigProblem]:
    auths = [name for name, collection in config.collections.items() if collection.type == "auth"]
    for n, issuer in enumerate(config.auth.issuers):
        path, name = f"auth.issuers.{n}.collection", issuer.collection
        if name in config.collections and name not in auths:
            hint = f"set type: auth of collections.{name}"
            yield ConfigProblem(path, f'collection "{name}" is not of type auth', hint)
        elif name not in auths:
            users = f"collections: {{{name}: {{table: SCHEMA.TABLE, type: auth}}}}"
            hint = did_you_mean(name, auths) or f"with a table of users: {users}"
            yield ConfigProblem(
                path,
                f'there is no collection "{name}": callers are identified by their tokens alone,'
                " also after their records are changed or deleted",
                hint,
            )


_SECRET_BYTES = 32
"""RFC 7518, section 3.2 requires an HMAC key as long as the hash's output. A shorter one can be
found offline by anyone who has one token."""


def _issuer_key_warnings(config: Config) -> Iterator[ConfigProblem]:
    """Yield secrets that can be guessed, and key URLs whose response can be replaced in transit."""
    made = "openssl rand -base64 48 generates one"
    secrets = [("login.secret", config.auth.login.secret, f"{made}; all tokens become invalid")]
    for n, issuer in enumerate(config.auth.issuers):
        path = f"issuers.{n}"
        expired = "remove it once the old tokens have expired"
        secrets += [
            (f"{path}.secret", issuer.secret, f"{made}; previous_secret keeps old tokens valid"),
            (f"{path}.previous_secret", issuer.previous_secret, expired),
        ]
        if issuer.jwks_url.startswith("http:") and not _is_local_url(issuer.jwks_url):
            message = "keys fetched over plain http can be replaced in transit"
            yield ConfigProblem(f"auth.{path}.jwks_url", message, "https")
    for path, secret, hint in secrets:
        if 0 < len(secret.encode()) < _SECRET_BYTES:
            message = f"it is shorter than {_SECRET_BYTES} bytes: it can be guessed from one token"
            yield ConfigProblem(f"auth.{path}", message, hint)


def _is_local_url(url: str) -> bool:
    with suppress(ValueError):  # neither a host nor an address
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ip_address(host).is_loopback
    return False


def _auth_rule_warnings(collection: Collection) -> Iterator[ConfigProblem]:
    if is_about_login(collection.auth_rule):
        message = "a rule that reads @request is about logins: it makes no token invalid"
        hint = "write a rule of the row's columns, such as: is_active = true"
        yield ConfigProblem(f"collections.{collection.name}.auth_rule", message, hint)


# -- @collection without "?"


def _match_all_warnings(
    path: str, rule: str, expression: ExpressionNode
) -> Iterator[ConfigProblem]:
    """Yield comparisons with ``@collection`` that every row must satisfy, because "?" is missing.

    ``!=`` and ``!~`` are not reported: over all rows they mean that no row is equal, which is what
    one expects.
    """
    comparisons = [
        cmp
        for cmp in syntax.comparison_nodes(expression)
        if not cmp.is_any
        and cmp.op not in {Op.NE, Op.NOT_LIKE}
        and any(identifier_text(side).startswith("@collection.") for side in (cmp.left, cmp.right))
    ]
    if comparisons:
        texts = map(identifier_text, (comparisons[0].left, comparisons[0].right))
        name = next(text for text in texts if text.startswith("@collection.")).split(".")[1]
        positions = [rule.index(c.op.value, c.left.end, c.right.start) for c in comparisons]
        fixed = replace_spans(rule, [(position, position, "?") for position in positions])
        message = f'every row of "{name}" must match; usually one matching row is meant'
        yield ConfigProblem(path, message, f"write: {fixed}")


# -- numbers beyond double precision


def _precision_warnings(
    path: str,
    rule: str,
    expression: ExpressionNode,
    collections: Collections,
    collection: Collection,
) -> Iterator[ConfigProblem]:
    """Yield comparisons of numbers that double precision can't hold exactly."""
    compared = syntax.comparison_nodes(expression)
    for operand in (side for cmp in compared for side in (cmp.left, cmp.right)):
        if isinstance(operand, LiteralNode) and not isinstance(operand.value, str):
            text = rule[operand.start : operand.end]
            if exact_number(operand.value) != Decimal(text):
                message = f"{text} has more digits than double precision can hold"
                yield ConfigProblem(path, message, f'write it as text: "{text}"')
    problems: dict[tuple[str, str], ConfigProblem] = {}
    conditions = resolved_conditions(rule, collections, collection)
    for comparison in chain.from_iterable(map(predicate.comparisons, conditions)):
        sides = comparison.left, comparison.right
        for term, other_term in (sides, sides[::-1]):
            column, row_path = _double_column(term), predicate.row_path_of(term)
            is_text_match = comparison.op in {Op.LIKE, Op.NOT_LIKE}
            if column is None or is_text_match or not _may_exceed_double(other_term):
                continue
            assert row_path is not None
            table = collections[row_path.collection_name].table.name
            message = f'"{column}" is a float: different numbers beyond 2^53 may equal it'
            type_ = "numeric[]" if isinstance(term, predicate.EachTerm) else "numeric"
            change = f"ALTER COLUMN {quote_identifier(column)} TYPE {type_};"
            hint = f"ALTER TABLE {quote_table_name(table)} {change}"
            problems[str(table), column] = ConfigProblem(path, message, hint)
    yield from problems.values()


def _double_column(term: predicate.Term) -> str | None:
    if not is_double(term):
        return None
    match term:
        case predicate.FieldValue(field=Field(column=column)) if column is not None:
            return column.name
        case predicate.EachTerm(
            predicate.RowPath(steps=(*_, predicate.EachValue(Field(column=column))))
        ) if column is not None:
            return column.name
        case _:
            return None


def _may_exceed_double(term: predicate.Term) -> bool:
    """Whether its values may be numbers that no double is equal to."""
    match term:
        case predicate.ParameterTerm(RequestValue(path=("auth", "id"))):
            return True
        case predicate.FieldValue(
            field=field, modifier=predicate.Modifier.WHOLE | predicate.Modifier.EACH
        ):
            return field.kind is FieldKind.NUMBER and field.type.base.name in _WIDE_TYPES
        case predicate.EachTerm(predicate.RowPath(steps=(*_, predicate.EachValue(field)))):
            element = field.type.base.element
            return element is not None and element.base.name in _WIDE_TYPES
        case _:
            return False


_WIDE_TYPES = {"int8", "numeric"}


# -- ids


def _id_warnings(collection: Collection) -> Iterator[ConfigProblem]:
    """Yield ids that nothing but the application keeps unique, and tables that have none."""
    table, key = collection.table, collection.key
    path, name = f"collections.{collection.name}.id", quote_table_name(collection.table.name)
    if collection.sends_creates_only:
        message = f'"{table.name}" has no key: only creates are sent, no updates and deletes'
        yield ConfigProblem(path, message, alter_leaf_tables(table, "REPLICA IDENTITY FULL"))
    elif not key.id_sources and not collection.has_unique_key:
        column = quote_identifier(key.name)
        others = ", ".join(f'"{c}"' for c in table.partition_columns)
        yield ConfigProblem(
            path,
            f'"{key.name}" is unique only together with {others}, as PostgreSQL demands of a'
            " partitioned table: rows with the same id would be one record",
            f"to find such: SELECT {column} FROM {name} GROUP BY {column} HAVING count(*) > 1;",  # noqa: S608
        )


# -- deletes


def _delete_warnings(collections: Collections, collection: Collection) -> Iterator[ConfigProblem]:
    """Yield rules that read columns which the WAL of a DELETE lacks under the replica identity."""
    table = collection.table
    if collection.sends_creates_only:
        return
    for key, _, _ in parsed_rules(collection):
        read = columns_read(collections, collection, key)
        unlogged = read - {*table.replica_identity_columns}
        lacking = [c for c in table.columns if c.name in unlogged]
        if lacking:
            missing = _quoted_list(lacking)
            message = (
                f'no subscriber receives deletes: the old row of "{table.name}" lacks {missing}'
            )
            if long := [column for column in lacking if column.is_toastable]:
                message += (
                    f"; an update that leaves a long {_quoted_list(long)} unchanged may be reported"
                    " as a gap if other changes follow at once"
                )
            hint = alter_leaf_tables(table, "REPLICA IDENTITY FULL")
            yield ConfigProblem(f"collections.{collection.name}.{key}", message, hint)
            return  # one statement fixes it for both rules


# -- links


def _link_warnings(collection: Collection) -> Iterator[ConfigProblem]:
    """Yield relations through junction tables whose changes don't say which record they concern."""
    for field in collection.fields:
        junction = None if field.relation is None else field.relation.junction
        if junction is None or not junction.updates:
            continue
        table, source = junction.table, junction.source_column
        hint = alter_leaf_tables(table, "REPLICA IDENTITY FULL")
        if table.is_unlogged:
            message = f'"{table.name}" is unlogged'
            hint = f"ALTER TABLE {quote_table_name(table.name)} SET LOGGED;"
        elif not table.replica_identity_columns:
            message = f'"{table.name}" has no replica identity'
        elif source not in table.replica_identity_columns:
            message = f'the old row of "{table.name}" lacks "{source}"'
        else:
            continue
        is_deaf = table.is_unlogged or not table.replica_identity_columns
        path = f"collections.{collection.name}.relations.{field.name}"
        ids = "come or go" if is_deaf else "go"
        message = f"no subscriber hears of ids that {ids}: {message}"
        yield ConfigProblem(path, message, f"{hint} or updates: false")


def _quoted_list(columns: Iterable[Column]) -> str:
    return ", ".join(f'"{column.name}"' for column in columns)
