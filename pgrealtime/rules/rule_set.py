"""Checks the rules of all collections, and lists which of the caller's columns they read.

Called at the start, by a reload, and by the commands ``check`` and ``explain``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TypeVar

from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import CollectionConfig
from pgrealtime.errors import ConfigProblem, RuleError, underline_span
from pgrealtime.rules.language.predicate import caller_columns
from pgrealtime.rules.language.resolve import resolve_rule
from pgrealtime.rules.language.syntax import parse_expression
from pgrealtime.rules.sql.reference import check_rule

_Owner = TypeVar("_Owner", Collection, CollectionConfig)
_RULE_KEYS = ("list_rule", "view_rule", "manage_rule", "auth_rule")


def rule_texts(owner: Collection | CollectionConfig) -> Iterator[tuple[str, str]]:
    """Yield key and text of each rule that has one: neither locked (None) nor open to all ("")."""
    for key in _RULE_KEYS:
        rule = getattr(owner, key)
        if rule:
            yield key, rule


def syntax_problems(configured: Mapping[str, CollectionConfig]) -> Iterator[ConfigProblem]:
    """Yield a problem for each rule that can't be parsed. Needs no database."""
    return _problems(configured, lambda _, rule: parse_expression(rule))


def rule_problems(collections: Collections) -> Iterator[ConfigProblem]:
    """Yield a problem for each rule that can't be evaluated, with the span of its text marked."""
    return _problems(collections, partial(check_rule, collections))


def _problems(
    owners: Mapping[str, _Owner], check: Callable[[_Owner, str], object]
) -> Iterator[ConfigProblem]:
    for name, owner in owners.items():
        for key, rule in rule_texts(owner):
            try:
                check(owner, rule)
            except RuleError as error:
                hint = (error.hint[:1].lower() + error.hint[1:]).removesuffix(".")
                marked_text = underline_span(rule, error.start, error.end)
                path = f"collections.{name}.{key}"
                yield ConfigProblem(path, error.message, hint, marked_text=marked_text)


def caller_columns_read_by_rules(collections: Collections) -> Mapping[str, tuple[str, ...]]:
    """Return the columns of the caller's own row that rules read, by auth collection.

    Their values are kept with each connection, as of its position in the stream: PostgreSQL then
    needs no look-up of the caller for each change, and the index can select by them. Invalid rules
    are skipped.
    """
    read: dict[str, set[str]] = {}
    for collection in collections.values():
        for auth in (each for each in collections.values() if each.type == "auth"):
            for rule in {text for _, text in rule_texts(collection)}:
                try:
                    where = resolve_rule(rule, collections, collection, auth).where
                except RuleError:
                    continue
                names = {column.name for column in caller_columns(where)} - {""}
                read.setdefault(auth.name, set()).update(names)
    return {name: tuple(sorted(columns)) for name, columns in read.items() if columns}
