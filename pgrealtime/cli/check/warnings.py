"""Warnings of ``pgrealtime check``: what is valid, but hardly what the operator means.

Each has the SQL, the rule or the setting that mends it as its hint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from ipaddress import ip_address
from urllib.parse import urlsplit

from pgrealtime.auth.principal import AuthRecord, Principal
from pgrealtime.catalog.model import Column
from pgrealtime.catalog.naming import quote_identifier, quote_table_name
from pgrealtime.collections.model import Collection, Collections, Field, FieldKind
from pgrealtime.config.model import CollectionConfig, Config
from pgrealtime.errors import ConfigProblem, RuleError
from pgrealtime.rules.language import predicate, syntax
from pgrealtime.rules.language.comparison import is_double
from pgrealtime.rules.language.parameters import RequestValue
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.resolve import resolve_rule
from pgrealtime.rules.language.sqlite_values import exact_number
from pgrealtime.rules.language.syntax import (
    AndNode,
    ComparisonNode,
    ExpressionNode,
    IdentifierNode,
    LiteralNode,
    Op,
    OperandNode,
    OrNode,
)
from pgrealtime.rules.sql.reference import ReferenceQuery, reference_query
from pgrealtime.spelling import did_you_mean

_SUBSCRIPTION_RULES = ("list_rule", "view_rule")


def config_warnings(config: Config) -> Iterator[ConfigProblem]:
    """Yield the warnings that need no database."""
    if not config.collections:
        mend = "pgrealtime init makes them of the tables that are there"
        yield ConfigProblem("collections", "there are none: nobody hears of anything", mend)
    yield from _issuer_warnings(config)
    yield from _issuer_key_warnings(config)
    for name, collection in config.collections.items():
        for key, rule, expression in parsed_rules(collection):
            yield from _match_all_warnings(f"collections.{name}.{key}", rule, expression)


def collection_warnings(collections: Collections) -> Iterator[ConfigProblem]:
    """Yield the warnings about valid rules that the tables' columns and keys give reason for."""
    for collection in collections.values():
        for key, rule, expression in parsed_rules(collection):
            path = f"collections.{collection.name}.{key}"
            yield from _absent_value_warnings(path, rule, expression, collections, collection)
            yield from _precision_warnings(path, rule, expression, collections, collection)
        yield from _delete_warnings(collections, collection)


def parsed_rules(owner: Collection | CollectionConfig) -> Iterator[tuple[str, str, ExpressionNode]]:
    """Yield key, text and syntax tree of each list or view rule that has a text and is valid."""
    for key in _SUBSCRIPTION_RULES:
        rule = getattr(owner, key)
        if rule:
            try:
                yield key, rule, syntax.parse_expression(rule)
            except RuleError:
                continue  # an error, and reported as one


# -- issuers


def _issuer_warnings(config: Config) -> Iterator[ConfigProblem]:
    auths = [name for name, one in config.collections.items() if one.type == "auth"]
    for n, issuer in enumerate(config.auth.issuers):
        path, name = f"auth.issuers.{n}.collection", issuer.collection
        if name in auths:
            continue
        if name in config.collections:
            hint = f"set type: auth of collections.{name}"
            yield ConfigProblem(path, f'collection "{name}" is not of type auth', hint)
            continue
        mend = did_you_mean(name, auths) or (
            f"with a table of users: collections: {{{name}: {{table: SCHEMA.TABLE, type: auth}}}}"
        )
        yield ConfigProblem(
            path,
            f'there is no collection "{name}": its users are who their tokens say, also after'
            " they were changed or deleted",
            mend,
        )


_SECRET_BYTES = 32
"""RFC 7518, section 3.2 requires an HMAC key as long as the hash's output. A shorter one can be
found offline by anyone who has one token."""


def _issuer_key_warnings(config: Config) -> Iterator[ConfigProblem]:
    """Yield secrets that can be guessed, and key URLs whose answer can be replaced on the way."""
    made = "openssl rand -base64 48 makes one"
    secrets = [("auth.login.secret", config.auth.login.secret, f"{made}; it signs everybody out")]
    for n, issuer in enumerate(config.auth.issuers):
        path = f"auth.issuers.{n}"
        secrets += [
            (f"{path}.secret", issuer.secret, f"{made}; previous_secret keeps the old tokens good"),
            (f"{path}.previous_secret", issuer.previous_secret, "leave it out soon"),
        ]
        if issuer.jwks_url.startswith("http:") and not _is_local_url(issuer.jwks_url):
            yield ConfigProblem(
                f"{path}.jwks_url",
                "keys that come over plain http can be replaced on their way",
                "https",
            )
    for path, secret, hint in secrets:
        if 0 < len(secret.encode()) < _SECRET_BYTES:
            yield ConfigProblem(
                path,
                f"it is shorter than {_SECRET_BYTES} bytes: it can be found out from one token",
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
    """Yield comparisons with ``@collection`` that every row must satisfy, for want of a "?".

    ``!=`` and ``!~`` are not reported: over all rows they mean that no row is equal, which is what
    one expects.
    """
    found = [
        cmp
        for cmp in syntax.comparison_nodes(expression)
        if not cmp.is_any
        and cmp.op not in {Op.NE, Op.NOT_LIKE}
        and any(_path_text(side).startswith("@collection.") for side in (cmp.left, cmp.right))
    ]
    if found:
        first = found[0]
        side = first.left if _path_text(first.left).startswith("@collection.") else first.right
        insertions = [
            (_operator_position(rule, cmp), _operator_position(rule, cmp), "?") for cmp in found
        ]
        yield ConfigProblem(
            path,
            f'every row of "{_path_text(side).split(".")[1]}" must fit,'
            " where one is meant as a rule",
            f"write: {_replace_spans(rule, insertions)}",
        )


def _operator_position(rule: str, cmp: ComparisonNode) -> int:
    return rule.index(cmp.op.value, cmp.left.end, cmp.right.start)


def _replace_spans(text: str, replacements: Iterable[tuple[int, int, str]]) -> str:
    """Return the text with spans (start, end, new text) replaced."""
    for start, end, new in sorted(replacements, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _path_text(operand: OperandNode) -> str:
    return operand.text if isinstance(operand, IdentifierNode) else ""


# -- callers without a value


@dataclass(frozen=True, slots=True)
class _AbsentValue:
    """A value that a caller may lack: all of ``@request.auth``, or one value of the options."""

    prefix: str
    """Prefix of the paths that are empty then."""
    guard: str
    """A path that is empty only then."""
    caller_description: str
    row_field: str = ""
    """A path of the row that is empty, too."""

    def covers(self, operand: OperandNode) -> bool:
        text = _path_text(operand)
        if text == self.row_field:
            return text != ""
        return text.startswith(self.prefix) and (self.prefix.endswith(".") or text == self.prefix)


_GUEST = _AbsentValue("@request.auth.", "@request.auth.id", "a guest")
_OPTION_PREFIXES = ("@request.query.", "@request.headers.")


def _absent_value_warnings(
    path: str,
    rule: str,
    expression: ExpressionNode,
    collections: Collections,
    collection: Collection,
) -> Iterator[ConfigProblem]:
    """Yield comparisons by which a caller without a value matches rows without one.

    An empty value is equal to an empty value, as in PocketBase.
    """
    for absent in _absent_values(expression):
        found = [
            (cmp, field)
            for cmp in syntax.comparison_nodes(expression)
            if (field := _path_compared_with(cmp, absent)) is not None
            and (cmp.op is Op.NE or _may_be_empty(rule, cmp, collections, collection))
            and _may_decide(cmp, expression, _with_empty_field(absent, cmp, field))
        ]
        if found:
            cmp, field = found[0]
            what = "with" if cmp.op is Op.NE else "without"
            guarded = [
                (cmp.start, cmp.end, f'({absent.guard} != "" && {rule[cmp.start : cmp.end]})')
                for cmp, _ in found
            ]
            message = f'{absent.caller_description} may see every record {what} "{field}"'
            yield ConfigProblem(path, message, f"write: {_replace_spans(rule, guarded)}")


def _with_empty_field(absent: _AbsentValue, cmp: ComparisonNode, field: str) -> _AbsentValue:
    """Return the absent value with the field that is empty where the comparison is true."""
    return absent if cmp.op is Op.NE else replace(absent, row_field=field)


def _absent_values(expression: ExpressionNode) -> Iterator[_AbsentValue]:
    yield _GUEST
    sides = (side for cmp in syntax.comparison_nodes(expression) for side in (cmp.left, cmp.right))
    given = (_path_text(side) for side in sides if _path_text(side).startswith(_OPTION_PREFIXES))
    for text in dict.fromkeys(text for text in given if ":" not in text):
        yield _AbsentValue(text, text, f"who leaves out {text}")


def _path_compared_with(cmp: ComparisonNode, absent: _AbsentValue) -> str | None:
    """Return the row's path that is compared with the absent value; None if there is none."""
    is_equality = cmp.op is Op.EQ or (cmp.op is Op.NE and absent is _GUEST)
    for own, other in ((cmp.left, cmp.right), (cmp.right, cmp.left)):
        text = _path_text(other)
        is_of_row = text.startswith("@collection.") or text[:1] not in ("", "@")
        if is_equality and absent.covers(own) and is_of_row and text not in _KEYWORDS:
            return text
    return None


_KEYWORDS = {"null": "", "true": "True", "false": "False"}
_BOOLEAN_TEXTS = {"True", "False"}


def _may_be_empty(
    rule: str, cmp: ComparisonNode, collections: Collections, collection: Collection
) -> bool:
    """Whether the row's side can be empty or missing, by the constraints of its table."""
    resolved = resolve_rule(rule[cmp.start : cmp.end], collections, collection, None)
    terms = [
        term for term in predicate.terms(resolved.where) if predicate.row_path_of(term) is not None
    ]
    return not terms or any(not _is_never_empty(term, collections) for term in terms)


def _is_never_empty(term: predicate.Term, collections: Collections) -> bool:
    if not isinstance(term, predicate.FieldValue) or isinstance(
        term.row_path.root, predicate.CollectionRows
    ):
        return False
    row_path = term.row_path
    owners = [collections[prefix.collection] for prefix in _path_prefixes(row_path)]
    return all(
        isinstance(step, predicate.ToOne) and _is_column_never_empty(owner, step.field)
        for owner, step in zip(owners, row_path.steps, strict=True)
    ) and _is_column_never_empty(collections[row_path.collection], term.field)


def _path_prefixes(row_path: predicate.RowPath) -> Iterator[predicate.RowPath]:
    for length in range(len(row_path.steps)):
        yield predicate.RowPath(row_path.root, row_path.steps[:length])


def _is_column_never_empty(owner: Collection, field: Field) -> bool:
    column = field.column
    if column is None or not column.not_null:
        return False
    is_foreign = any(key.columns == (column.name,) for key in owner.table.foreign_keys)
    return column == owner.key or is_foreign or field.kind is not FieldKind.TEXT


def _may_decide(cmp: ComparisonNode, expression: ExpressionNode, absent: _AbsentValue) -> bool:
    """Whether some row can pass the rule by this comparison alone."""
    match expression:
        case ComparisonNode():
            return expression is cmp
        case AndNode(parts) | OrNode(parts):
            decided = isinstance(expression, OrNode)  # the verdict that makes cmp irrelevant
            own = next((part for part in parts if _may_decide(cmp, part, absent)), None)
            return own is not None and all(
                part is own or _verdict(part, absent) is not decided for part in parts
            )


def _verdict(expression: ExpressionNode, absent: _AbsentValue) -> bool | None:
    """Return the rule's verdict for a caller without the value; None if it depends on the row."""
    match expression:
        case ComparisonNode():
            return _comparison_verdict(expression, absent)
        case AndNode(parts):
            verdicts = [_verdict(part, absent) for part in parts]
            return False if False in verdicts else None if None in verdicts else True
        case OrNode(parts):
            verdicts = [_verdict(part, absent) for part in parts]
            return True if True in verdicts else None if None in verdicts else False


def _comparison_verdict(cmp: ComparisonNode, absent: _AbsentValue) -> bool | None:
    """Return the verdict of a comparison that reads no row; None if that isn't known here."""
    left, right = _static_text(cmp.left, absent), _static_text(cmp.right, absent)
    if left is None or right is None:
        return None
    match cmp.op:
        case Op.EQ | Op.NE if not (left and right) or {left, right} <= _BOOLEAN_TEXTS:
            return (left == right) is (cmp.op is Op.EQ)
        case Op.LT | Op.LE | Op.GT | Op.GE | Op.LIKE if not (left and right):
            return False
        case _:
            return None


def _static_text(operand: OperandNode, absent: _AbsentValue) -> str | None:
    """Return the operand's value as text, empty for a missing one; None if it isn't known here."""
    match operand:
        case LiteralNode(value):
            return str(value)
        case IdentifierNode(text) if text in _KEYWORDS:
            return _KEYWORDS[text]
        case IdentifierNode(text) if text == f"{absent.prefix}:isset":
            return str(False)
        case IdentifierNode() if absent.covers(operand):
            return ""
        case _:
            return None


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
                message = f"{text} has more digits than double precision, which it becomes"
                yield ConfigProblem(path, message, f'write it as a text: "{text}"')
    found: dict[tuple[str, str], ConfigProblem] = {}
    for comparison in _comparisons(rule, collections, collection):
        sides = comparison.left, comparison.right
        for one, other in (sides, sides[::-1]):
            column = _double_column(one)
            if (
                column is None
                or comparison.op in {Op.LIKE, Op.NOT_LIKE}
                or not _may_exceed_double(other)
            ):
                continue
            row_path = predicate.row_path_of(one)
            assert row_path is not None
            table = collections[row_path.collection].table.name
            message = f'"{column}" is a float: numbers beyond 2^53 that differ may be equal to it'
            type_ = "numeric[]" if isinstance(one, predicate.EachTerm) else "numeric"
            hint = (
                f"ALTER TABLE {quote_table_name(table)}"
                f" ALTER COLUMN {quote_identifier(column)} TYPE {type_};"
            )
            found[str(table), column] = ConfigProblem(path, message, hint)
    yield from found.values()


def _comparisons(
    rule: str, collections: Collections, collection: Collection
) -> Iterator[predicate.Comparison]:
    """Yield the rule's comparisons as resolved for guests and for each auth collection."""
    for auth in (None, *(one for one in collections.values() if one.type == "auth")):
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
            for name in predicate.columns
        }
        lacking = [
            column
            for column in table.columns
            if column.name in read - {*table.replica_identity_columns} and not column.is_generated
        ]
        if lacking:
            missing = _quoted_list(lacking)
            message = f'nobody hears of deletes: the old row of "{table.name}" lacks {missing}'
            if long := [column for column in lacking if column.is_toastable]:
                message += (
                    f"; updates that leave a long {_quoted_list(long)} alone may be told as gaps,"
                    " when others follow at once"
                )
            yield ConfigProblem(
                f"collections.{collection.name}.{key}",
                message,
                " ".join(
                    f"ALTER TABLE {quote_table_name(name)} REPLICA IDENTITY FULL;"
                    for name in table.leaves or [table.name]
                ),
            )
            return  # one statement mends it for both rules


def _quoted_list(columns: Iterable[Column]) -> str:
    return ", ".join(f'"{column.name}"' for column in columns)


def reference_queries(
    collections: Collections, collection: Collection, key: str
) -> Iterator[ReferenceQuery]:
    """Yield the rule's plain query for a caller of each auth collection."""
    rule = getattr(collection, key)
    for principal in _sample_principals(collections):
        predicate = reference_query(collections, collection, rule, RuleRequest(principal=principal))
        if isinstance(predicate, ReferenceQuery):
            yield predicate


def _sample_principals(collections: Collections) -> Iterator[Principal]:
    """Yield a caller of each auth collection, with an id that the type of its key allows."""
    ids = {"uuid": "00000000-0000-0000-0000-000000000001"}
    auths = [collection for collection in collections.values() if collection.type == "auth"]
    for auth in auths:
        yield AuthRecord(
            collection_id=auth.id,
            collection_name=auth.name,
            id=ids.get(auth.key.type.base.name, "1"),
            email="somebody@example.com",
        )
    if not auths:
        yield AuthRecord(collection_id="users", collection_name="users", id="1")
