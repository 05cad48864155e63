"""Warnings of ``pgrealtime check``: what is valid, but hardly what the operator means.

Each has the SQL, the rule or the setting that fixes it as its hint.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from decimal import Decimal
from ipaddress import ip_address
from urllib.parse import urlsplit

from pgrealtime.catalog.model import Column
from pgrealtime.catalog.naming import quote_identifier, quote_table_name
from pgrealtime.cli.check.absent_values import absent_value_warnings
from pgrealtime.cli.check.rules import (
    identifier_text,
    parsed_rules,
    reference_queries,
    replace_spans,
)
from pgrealtime.collections.model import Collection, Collections, Field, FieldKind
from pgrealtime.config.model import Config
from pgrealtime.errors import ConfigProblem, RuleError
from pgrealtime.rules.language import predicate, syntax
from pgrealtime.rules.language.comparison import is_double
from pgrealtime.rules.language.parameters import RequestValue
from pgrealtime.rules.language.resolve import resolve_rule
from pgrealtime.rules.language.sqlite_values import exact_number
from pgrealtime.rules.language.syntax import ComparisonNode, ExpressionNode, LiteralNode, Op
from pgrealtime.spelling import did_you_mean


def config_warnings(config: Config) -> Iterator[ConfigProblem]:
    """Yield the warnings that need no database."""
    if not config.collections:
        hint = "pgrealtime init writes them from the existing tables"
        yield ConfigProblem("collections", "there are none: no subscriber receives anything", hint)
    yield from _issuer_warnings(config)
    yield from _issuer_key_warnings(config)
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
        yield from _delete_warnings(collections, collection)


# -- issuers


def _issuer_warnings(config: Config) -> Iterator[ConfigProblem]:
    auths = [name for name, collection in config.collections.items() if collection.type == "auth"]
    for n, issuer in enumerate(config.auth.issuers):
        path, name = f"auth.issuers.{n}.collection", issuer.collection
        if name in auths:
            continue
        if name in config.collections:
            hint = f"set type: auth of collections.{name}"
            yield ConfigProblem(path, f'collection "{name}" is not of type auth', hint)
            continue
        hint = did_you_mean(name, auths) or (
            f"with a table of users: collections: {{{name}: {{table: SCHEMA.TABLE, type: auth}}}}"
        )
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
    secrets = [
        ("auth.login.secret", config.auth.login.secret, f"{made}; all tokens become invalid")
    ]
    for n, issuer in enumerate(config.auth.issuers):
        path = f"auth.issuers.{n}"
        secrets += [
            (f"{path}.secret", issuer.secret, f"{made}; previous_secret keeps old tokens valid"),
            (
                f"{path}.previous_secret",
                issuer.previous_secret,
                "remove it once the old tokens have expired",
            ),
        ]
        if issuer.jwks_url.startswith("http:") and not _is_local_url(issuer.jwks_url):
            yield ConfigProblem(
                f"{path}.jwks_url",
                "keys fetched over plain http can be replaced in transit",
                "https",
            )
    for path, secret, hint in secrets:
        if 0 < len(secret.encode()) < _SECRET_BYTES:
            yield ConfigProblem(
                path,
                f"it is shorter than {_SECRET_BYTES} bytes: it can be guessed from one token",
                hint,
            )


def _is_local_url(url: str) -> bool:
    with suppress(ValueError):  # neither a host nor an address
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ip_address(host).is_loopback
    return False


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
        first = comparisons[0]
        side = first.left if identifier_text(first.left).startswith("@collection.") else first.right
        insertions = [
            (_operator_position(rule, cmp), _operator_position(rule, cmp), "?")
            for cmp in comparisons
        ]
        yield ConfigProblem(
            path,
            f'every row of "{identifier_text(side).split(".")[1]}" must match;'
            " usually one matching row is meant",
            f"write: {replace_spans(rule, insertions)}",
        )


def _operator_position(rule: str, cmp: ComparisonNode) -> int:
    return rule.index(cmp.op.value, cmp.left.end, cmp.right.start)


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
    for comparison in _comparisons(rule, collections, collection):
        sides = comparison.left, comparison.right
        for term, other_term in (sides, sides[::-1]):
            column = _double_column(term)
            if (
                column is None
                or comparison.op in {Op.LIKE, Op.NOT_LIKE}
                or not _may_exceed_double(other_term)
            ):
                continue
            row_path = predicate.row_path_of(term)
            assert row_path is not None
            table = collections[row_path.collection_name].table.name
            message = f'"{column}" is a float: different numbers beyond 2^53 may equal it'
            type_ = "numeric[]" if isinstance(term, predicate.EachTerm) else "numeric"
            hint = (
                f"ALTER TABLE {quote_table_name(table)}"
                f" ALTER COLUMN {quote_identifier(column)} TYPE {type_};"
            )
            problems[str(table), column] = ConfigProblem(path, message, hint)
    yield from problems.values()


def _comparisons(
    rule: str, collections: Collections, collection: Collection
) -> Iterator[predicate.Comparison]:
    """Yield the rule's comparisons as resolved for guests and for each auth collection."""
    for auth in (None, *(each for each in collections.values() if each.type == "auth")):
        try:
            yield from predicate.comparisons(
                resolve_rule(rule, collections, collection, auth).where
            )
        except RuleError:
            continue  # it denies these callers


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


# -- deletes


def _delete_warnings(collections: Collections, collection: Collection) -> Iterator[ConfigProblem]:
    """Yield rules that read columns which the WAL of a DELETE lacks under the replica identity."""
    table = collection.table
    for key, _, _ in parsed_rules(collection):
        read = {
            name
            for predicate in reference_queries(collections, collection, key)
            for name in predicate.column_names
        }
        lacking = [
            column
            for column in table.columns
            if column.name in read - {*table.replica_identity_columns} and not column.is_generated
        ]
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
            yield ConfigProblem(
                f"collections.{collection.name}.{key}",
                message,
                " ".join(
                    f"ALTER TABLE {quote_table_name(name)} REPLICA IDENTITY FULL;"
                    for name in table.leaves or [table.name]
                ),
            )
            return  # one statement fixes it for both rules


def _quoted_list(columns: Iterable[Column]) -> str:
    return ", ".join(f'"{column.name}"' for column in columns)
