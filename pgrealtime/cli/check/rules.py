"""Parses list and view rules, edits their text and builds queries, for warnings of ``check``."""

from collections.abc import Iterable, Iterator

from pgrealtime.auth.principal import AuthRecord, Principal
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import CollectionConfig
from pgrealtime.errors import RuleError
from pgrealtime.rules.language import syntax
from pgrealtime.rules.language.predicate import Condition
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.resolve import resolve_rule
from pgrealtime.rules.language.syntax import ExpressionNode, IdentifierNode, OperandNode
from pgrealtime.rules.sql.reference import ReferenceQuery, reference_query

_SUBSCRIPTION_RULES = ("list_rule", "view_rule")


def parsed_rules(owner: Collection | CollectionConfig) -> Iterator[tuple[str, str, ExpressionNode]]:
    """Yield key, text and syntax tree of each list or view rule that is not empty and parses."""
    for key in _SUBSCRIPTION_RULES:
        rule = getattr(owner, key)
        if rule:
            try:
                yield key, rule, syntax.parse_expression(rule)
            except RuleError:
                continue  # ``syntax_problems`` reports it


def replace_spans(text: str, replacements: Iterable[tuple[int, int, str]]) -> str:
    """Return the text with spans (start, end, new text) replaced; spans must not overlap."""
    for start, end, new in sorted(replacements, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def identifier_text(operand: OperandNode) -> str:
    """Return the text of an identifier; empty for any other operand."""
    return operand.text if isinstance(operand, IdentifierNode) else ""


def resolved_conditions(
    rule: str, collections: Collections, collection: Collection
) -> Iterator[Condition]:
    """Yield the rule's condition as resolved for each auth collection and for guests."""
    for auth in (*_auth_collections(collections), None):
        try:
            yield resolve_rule(rule, collections, collection, auth).where
        except RuleError:
            continue  # denies these callers


def _auth_collections(collections: Collections) -> list[Collection]:
    return [collection for collection in collections.values() if collection.type == "auth"]


def reference_queries(
    collections: Collections, collection: Collection, key: str
) -> Iterator[ReferenceQuery]:
    """Yield the reference query of a rule, valid and not empty, for a caller of each kind."""
    rule = getattr(collection, key)
    for principal in sample_principals(collections):
        query = reference_query(collections, collection, rule, RuleRequest(principal=principal))
        if isinstance(query, ReferenceQuery):
            yield query


def sample_principals(collections: Collections) -> Iterator[Principal]:
    """Yield a caller of each auth collection, or of a fictitious one where there is none."""
    ids = {"uuid": "00000000-0000-0000-0000-000000000001"}
    auths = _auth_collections(collections)
    for auth in auths:
        yield AuthRecord(
            collection_id=auth.id,
            collection_name=auth.name,
            id=ids.get(auth.key.type.base.name, "1"),
            email="somebody@example.com",
        )
    if not auths:
        yield AuthRecord(collection_id="users", collection_name="users", id="1")


def columns_read(collections: Collections, collection: Collection, key: str) -> set[str]:
    """Return the columns of the collection's own row that a list or view rule reads.

    They are those of a deleted row too. Without generated columns, which are computed.
    """
    queries = reference_queries(collections, collection, key)
    names = {name for query in queries for name in query.column_names}
    return {c.name for c in collection.table.columns if c.name in names and not c.is_generated}
