"""Which rows of users tables satisfy their collection's ``auth_rule``, outside of a login.

A login has a request of its own (``reads.own_record``). For a token, and for the connections of a
user whose row changes, the rule is evaluated on the row alone. A rule that reads ``@request`` is
about the login and admits every row here.
"""

import re
from datetime import UTC, datetime

from pgrealtime.changes import Change, Row, Update
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.errors import RuleError
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.engine.row_evaluation import RowEvaluation
from pgrealtime.rules.language.parameters import MacroValues
from pgrealtime.rules.language.request import RuleRequest

_TEXT_OR_COMMENT = re.compile(r""" "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' | //[^\n]* """, re.VERBOSE)


class AdmissionRules:
    """The rules of some collections, by name; those that admit every row aren't among them."""

    def __init__(self, collections: Collections) -> None:
        compiler = RuleCompiler(collections)
        self._predicates: dict[str, BoundPredicate | None] = {}
        """None admits nobody."""
        for collection in collections.values():
            rule = collection.auth_rule
            if collection.type == "auth" and rule != "" and not is_about_login(rule):
                self._predicates[collection.name] = _bind(compiler, collection, rule)

    def has_rule(self, collection: Collection) -> bool:
        """Whether some of the collection's rows may not be admitted."""
        return collection.name in self._predicates

    def predicate_of(self, collection: Collection) -> BoundPredicate | None:
        """Return what a row of a collection with a rule must satisfy; None if it admits nobody."""
        return self._predicates[collection.name]

    def columns_of(self, collection: Collection) -> tuple[str, ...]:
        """Return the columns of the row that the rule reads."""
        predicate = self._predicates.get(collection.name)
        return () if predicate is None else (*sorted(predicate.specialization.column_names),)

    def verdict(self, collection: Collection, row: Row) -> bool | None:
        """Return whether a row is admitted; None if that can't be decided from the row."""
        if not self.has_rule(collection):
            return True
        predicate = self._predicates[collection.name]
        if predicate is None:
            return False
        missing = collection.column_names.difference(row)
        evaluation: RowEvaluation[BoundPredicate] = RowEvaluation(
            row, missing, MacroValues(datetime.now(UTC)), is_missing_column_unknown=True
        )
        evaluation.evaluate_members([predicate])
        if predicate in evaluation.hits:
            return True
        is_open = evaluation.has_open_tests or bool(evaluation.members_missing_columns)
        return None if is_open else False

    def is_unaffected(self, collection: Collection, change: Change) -> bool:
        """Whether a change of a row certainly leaves the columns alone that the rule reads."""
        return isinstance(change, Update) and all(
            name in change.old.row and change.old.row[name] == change.new[name]
            if name in change.new
            else name not in collection.generated_columns
            for name in self.columns_of(collection)
        )


def is_about_login(rule: str | None) -> bool:
    """Whether a rule reads the request of a login; texts and comments in it don't."""
    return "@request." in _TEXT_OR_COMMENT.sub("", rule or "")


def _bind(
    compiler: RuleCompiler, collection: Collection, rule: str | None
) -> BoundPredicate | None:
    try:
        bound = compiler.bind_caller(collection, rule, RuleRequest(), is_filtered=False)
    except RuleError:
        return None  # reported where rules are checked
    return bound if isinstance(bound, BoundPredicate) else None
