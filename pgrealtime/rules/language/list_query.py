"""Resolves what a list request asks for: rule, filter and sort, as one scope of joins.

Unlike in realtime, the three share joins: a filter and a sort key over one path are about one and
the same related row (PocketBase's list request). ``rules.sql.list_query`` makes one statement of
the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from pgrealtime.collections.model import Collection, Collections
from pgrealtime.errors import RuleNameError, RuleSyntaxError
from pgrealtime.rules.language.predicate import (
    Comparison,
    Condition,
    Conjunction,
    Predicate,
    Term,
    lift_literals,
)
from pgrealtime.rules.language.resolve import (
    MAX_FILTER_BYTES,
    Resolver,
    is_always_broken,
)
from pgrealtime.rules.language.syntax import parse_expression

MAX_SORT_KEYS = 8
"""PocketBase's limit."""
MAX_SORT_KEY_BYTES = 255
"""PocketBase's limit."""

_GO_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""What Go's ``strings.TrimSpace`` removes; Python's ``strip`` removes more."""


class SortOrder(Enum):
    """A sort key that names no field."""

    DEFAULT = auto()
    """``@rowid``: the collection's default order."""
    RANDOM = auto()
    """``@random``: another order each time."""


@dataclass(frozen=True, slots=True)
class SortKey:
    """One key of the option ``sort``."""

    by: Term | SortOrder
    is_descending: bool
    is_shown: Comparison | None = None
    """Of an e-mail address that may be hidden: whether it is shown. A hidden one sorts as empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListQuery:
    """What a list shows and in which order. Equal queries have the same statement."""

    collection_name: str
    where: Conjunction
    """Rule, filter and list rules of what filter and sort join; without conditions all rows."""
    sort: tuple[SortKey, ...]


Literals: TypeAlias = tuple[str | float, ...]


def resolve_list(
    collections: Collections,
    collection: Collection,
    auth_collection: Collection | None,
    *,
    rule: str,
    filter_text: str = "",
    sort_text: str = "",
    is_superuser: bool = False,
    has_body: bool = False,
) -> tuple[ListQuery, Literals]:
    """Return the query, its literals as parameters (``LiftedLiteral``), and these literals.

    Args:
        collections: All of them.
        collection: The one that is read.
        auth_collection: The caller's; None for guests, superusers and unknown collections.
        rule: The list rule, or the view rule for one record. Empty admits every record, as for
            superusers.
        filter_text: The client's filter, empty if there is none.
        sort_text: The option ``sort``, empty if there is none.
        is_superuser: The caller may read hidden fields, and joins without asking list rules.
        has_body: The request has a body.

    Raises:
        RuleError: Rule, filter or sort can't be used.
    """

    def make_resolver(*, is_filter: bool) -> Resolver:
        return Resolver(
            collections, collection, auth_collection, is_filter=is_filter, has_body=has_body
        )

    conditions: list[Condition] = []
    if rule:
        conditions.append(_usable(make_resolver(is_filter=False), rule))
    client = make_resolver(is_filter=not is_superuser)
    if filter_text:
        if len(filter_text.encode("utf-8", "replace")) > MAX_FILTER_BYTES:
            raise RuleSyntaxError(
                f"a filter takes at most {MAX_FILTER_BYTES} bytes", start=0, end=len(filter_text)
            )
        conditions.append(_usable(client, filter_text))
    sort = _resolve_sort(client, sort_text, hides_emails=collections.is_strict and not is_superuser)
    conditions += client.list_rule_conditions()
    predicate, literals = lift_literals(
        Predicate(collection_name=collection.name, where=Conjunction(tuple(conditions)))
    )
    assert isinstance(predicate.where, Conjunction)
    query = ListQuery(collection_name=collection.name, where=predicate.where, sort=sort)
    return query, literals


def reserved_word(filter_text: str, sort_text: str) -> str | None:
    """Return the first word of filter and sort that only superusers may use, or None.

    PocketBase searches the texts before it parses them, so within quotes too.
    """
    for text in (filter_text, sort_text):
        for word in ("@collection.", "@request."):
            if word in text:
                return word
    return None


def _usable(resolver: Resolver, text: str) -> Condition:
    condition = resolver.resolve_condition(parse_expression(text))
    if is_always_broken(condition):
        raise RuleSyntaxError("a value of many has no LIKE pattern", start=0, end=len(text))
    return condition


def _resolve_sort(resolver: Resolver, text: str, *, hides_emails: bool) -> tuple[SortKey, ...]:
    keys = text.split(",") if text else []
    if len(keys) > MAX_SORT_KEYS:
        raise RuleSyntaxError(
            f"a list is sorted by at most {MAX_SORT_KEYS} keys", start=0, end=len(text)
        )
    return tuple(_resolve_sort_key(resolver, key, hides_emails=hides_emails) for key in keys)


def _resolve_sort_key(resolver: Resolver, text: str, *, hides_emails: bool) -> SortKey:
    name = text.strip(_GO_SPACE)
    is_descending = name.startswith("-")
    if name[:1] in {"-", "+"}:
        name = name[1:]
    if not name or len(name.encode("utf-8", "replace")) > MAX_SORT_KEY_BYTES:
        raise RuleNameError("a sort key names a field", start=0, end=len(name))
    match name:
        case "@random":
            return SortKey(SortOrder.RANDOM, is_descending)
        case "@rowid" if resolver.collection.is_view:
            raise RuleNameError("a view has no order of insertion", start=0, end=len(name))
        case "@rowid":
            return SortKey(SortOrder.DEFAULT, is_descending)
        case _:
            term, is_shown = resolver.resolve_sort_path(name)
            return SortKey(term, is_descending, is_shown if hides_emails else None)
