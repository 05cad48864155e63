"""The rules that warnings are about: parsed, as plain queries, and edited."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pgrealtime.auth.principal import AuthRecord, Principal
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import CollectionConfig
from pgrealtime.errors import RuleError
from pgrealtime.rules.language import syntax
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.syntax import (
    ExpressionNode,
    IdentifierNode,
    OperandNode,
)
from pgrealtime.rules.sql.reference import ReferenceQuery, reference_query

_SUBSCRIPTION_RULES = ("list_rule", "view_rule")


def parsed_rules(owner: Collection | CollectionConfig) -> Iterator[tuple[str, str, ExpressionNode]]:
    """Yield key, text and syntax tree of each list or view rule that has a text and is valid."""
    for key in _SUBSCRIPTION_RULES:
        rule = getattr(owner, key)
        if rule:
            try:
                yield key, rule, syntax.parse_expression(rule)
            except RuleError:
                continue  # an error, and reported as one


def replace_spans(text: str, replacements: Iterable[tuple[int, int, str]]) -> str:
    """Return the text with spans (start, end, new text) replaced."""
    for start, end, new in sorted(replacements, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def path_text(operand: OperandNode) -> str:
    """Return the text of an identifier; empty for any other operand."""
    return operand.text if isinstance(operand, IdentifierNode) else ""


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
