"""Compiles the rule and filter of a topic for a caller; caches what callers have in common.

The matcher, the renderer's managers, ``expand`` and ``reads`` call ``bind_caller``. A text is
resolved into a ``Predicate``, cached by the text; split into tests that make a ``Plan``, cached by
the classes of its parameters' values; specialized for the caller. What is in use is shared however
small the caches are: tests, index keys and specializations are held weakly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakValueDictionary

from pgrealtime.auth.principal import Superuser
from pgrealtime.caches import WeightedCache
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.errors import RuleError
from pgrealtime.rules.engine.formula import Formula, Test, TestCall, conjunction, disjunction
from pgrealtime.rules.engine.index_keys import KeyRegistry
from pgrealtime.rules.engine.plan import BoundPredicate, Plan
from pgrealtime.rules.language import predicate
from pgrealtime.rules.language.parameters import (
    CALLER_ID_PARAMETER,
    CallerColumn,
    LiteralParameter,
    Parameter,
    ParameterClass,
    RequestValue,
    fixed_parameter_class,
    parameter_class,
    parameter_value,
)
from pgrealtime.rules.language.predicate import (
    Condition,
    Conjunction,
    DenyAll,
    Predicate,
    RowPath,
)
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.resolve import filter_text, resolve_filter, resolve_rule
from pgrealtime.rules.language.sqlite_values import Scalar
from pgrealtime.rules.sql.reference import auth_collection_of, check_rule

_ANY_TIME = datetime(1970, 1, 1, tzinfo=UTC)
"""Parameters other than macros have the same value at any time."""
_MAX_CACHED_RULES = 4096
_MAX_CACHED_RULE_PLANS = 16384
"""Plans without a filter: of rules, which the operator writes."""
_MAX_CACHED_FILTER_CHARACTERS = 256 * 1024
"""Length together of the filters that are cached resolved."""
_MAX_CACHED_FILTER_COMPARISONS = 4096
"""Comparisons together of the filters whose plans are cached unused, at up to 36 KB each."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _SharedPredicate:
    """A resolved rule or filter, compared by identity; equal filters are the same object."""

    where: Condition
    """With its literals, if it is a rule; a filter's are lifted out of it."""
    parameters: tuple[Parameter, ...]
    """Without literals."""
    many_joins: frozenset[RowPath] = frozenset()
    """Its joins that may lead to several rows or values."""

    @classmethod
    def of_condition(cls, where: Condition) -> _SharedPredicate:
        """Return a condition with what is derived of it."""
        many_joins = frozenset(filter(lambda join: join.is_multiple, predicate.joins(where)))
        return cls(where, _parameters_of(where), many_joins)

    @property
    def reads_caller(self) -> bool:
        """Whether it reads anything of the caller's record but that there is one."""
        return any(
            isinstance(parameter, RequestValue) and parameter.path[0] == "auth"
            for parameter in self.parameters
        ) or bool(predicate.caller_columns(self.where))


_ALWAYS_TRUE = _SharedPredicate(Conjunction(()), ())
"""An empty rule, or no filter."""


class _PlanKey(NamedTuple):
    """All that a plan depends on."""

    collection_name: str
    auth_name: str | None
    """The collection of the caller's record, if there is one."""
    rule: _SharedPredicate
    filter: _SharedPredicate
    parameter_classes: tuple[ParameterClass, ...]
    """Of the parameters of rule and filter, in this order."""
    is_caller_row_bound: bool
    """Whether columns of the caller's row are parameters; else PostgreSQL reads them."""
    is_joined: bool
    """Whether rule and filter are about the same related rows."""


class RuleCompiler:
    """Compiles rules and filters for callers."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections
        # In other encodings PostgreSQL's order of bytes is not that of code points.
        self._is_utf8 = collections.server_encoding == "UTF8"
        self._registry = KeyRegistry()
        self._tests: WeakValueDictionary[Hashable, Test] = WeakValueDictionary()
        self._shared_filters: WeakValueDictionary[Predicate, _SharedPredicate] = (
            WeakValueDictionary()
        )
        self._cached_rule = lru_cache(maxsize=_MAX_CACHED_RULES)(self._resolve_rule)
        self._filters_by_text: WeightedCache[
            Hashable, tuple[_SharedPredicate, tuple[str | float, ...]]
        ] = WeightedCache(_MAX_CACHED_FILTER_CHARACTERS)
        self._cached_rule_plan = lru_cache(maxsize=_MAX_CACHED_RULE_PLANS)(self._make_plan)
        self._cached_filter_plans: WeightedCache[_PlanKey, Plan] = WeightedCache(
            _MAX_CACHED_FILTER_COMPARISONS
        )

    def bind_caller(
        self,
        collection: Collection,
        rule: str | None,
        request: RuleRequest,
        caller_row: Row | None = None,
        *,
        is_filtered: bool = True,
        is_listed: bool = False,
    ) -> BoundPredicate | DenyAll:
        """Return what a row of the collection must satisfy for the caller to see it.

        The rule is the collection's for the topic; None is for superusers only. ``caller_row`` has
        columns of the caller's own row, if there is one and it is known; PostgreSQL reads the row
        if a column is missing that the rule reads. With ``is_filtered`` the request's filter must
        be true too: by itself, as PocketBase's realtime has it, or ``is_listed``, by the same
        related rows as the rule, as its lists have it.

        Raises:
            RuleError: The rule can't be used for any caller. Where it can't be used for this one
                only, or the filter can't, no row matches.
        """
        is_superuser = isinstance(request.principal, Superuser)
        if rule is None and not is_superuser:
            return DenyAll("the rule is for superusers only")
        auth = auth_collection_of(self._collections, request)
        auth_name = None if auth is None else auth.name
        rule_text = "" if is_superuser or rule is None else rule
        try:
            shared_rule = self._cached_rule(collection.name, rule_text, auth_name)
        except RuleError as error:
            check_rule(self._collections, collection, rule_text)
            return DenyAll(f"the rule can't be evaluated for this caller: {error}")
        text = request.query.get("filter", "") if is_filtered else ""
        try:
            if text:
                filter_text(request.query, is_superuser=is_superuser)
            shared_filter, literals = self._find_filter(
                collection.name, text, auth_name, is_superuser=is_superuser
            )
            names = (collection.name, auth_name)
            is_joined = is_listed and not shared_rule.many_joins.isdisjoint(
                shared_filter.many_joins
            )
            predicates = shared_rule, shared_filter
            return self._bind(names, predicates, request, literals, caller_row, is_joined=is_joined)
        except RuleError as error:
            return DenyAll(f"the filter is refused: {error}" if text else str(error))

    def _bind(
        self,
        names: tuple[str, str | None],
        predicates: tuple[_SharedPredicate, _SharedPredicate],
        request: RuleRequest,
        literals: Sequence[str | float],
        caller_row: Row | None,
        *,
        is_joined: bool,
    ) -> BoundPredicate | DenyAll:
        def value_of(parameter: Parameter | CallerColumn) -> Scalar:
            if isinstance(parameter, CallerColumn):
                assert caller_row is not None
                # Without a name it stands for whether there is a row: any text but NULL.
                return caller_row.get(parameter.name) if parameter.name else "there"
            return parameter_value(parameter, request, _ANY_TIME, literals)

        own = [parameter for one in predicates for parameter in one.parameters]
        classes = tuple([fixed_parameter_class(p) or parameter_class(value_of(p)) for p in own])
        key = _PlanKey(*names, *predicates, classes, caller_row is not None, is_joined)
        plan = self._find_plan(key)
        if caller_row is not None and not all(_is_in(caller_row, p) for p in plan.parameters):
            plan = self._find_plan(key._replace(is_caller_row_bound=False))
        bound = plan.specialize([value_of(parameter) for parameter in plan.parameters])
        return DenyAll("") if bound is None else bound

    # --- resolving

    def _resolve_rule(
        self, collection_name: str, text: str, auth_name: str | None
    ) -> _SharedPredicate:
        if not text:
            return _ALWAYS_TRUE
        collection, auth = self._collection_and_auth(collection_name, auth_name)
        where = resolve_rule(text, self._collections, collection, auth).where
        return _SharedPredicate.of_condition(where)

    def _find_filter(
        self, collection_name: str, text: str, auth_name: str | None, *, is_superuser: bool
    ) -> tuple[_SharedPredicate, tuple[str | float, ...]]:
        """Return a filter without its literals, and these."""
        if not text:
            return _ALWAYS_TRUE, ()

        def make() -> tuple[tuple[_SharedPredicate, tuple[str | float, ...]], int]:
            collection, auth = self._collection_and_auth(collection_name, auth_name)
            resolved, literals = predicate.lift_literals(
                resolve_filter(text, self._collections, collection, auth, is_superuser=is_superuser)
            )
            shared = self._shared_filters.get(resolved)
            if shared is None:
                shared = _SharedPredicate.of_condition(resolved.where)
                self._shared_filters[resolved] = shared
            return (shared, literals), len(text)

        return self._filters_by_text.get((collection_name, text, auth_name, is_superuser), make)

    def _collection_and_auth(
        self, collection_name: str, auth_name: str | None
    ) -> tuple[Collection, Collection | None]:
        auth = None if auth_name is None else self._collections[auth_name]
        return self._collections[collection_name], auth

    # --- planning

    def _find_plan(self, key: _PlanKey) -> Plan:
        if key.filter is _ALWAYS_TRUE:
            return self._cached_rule_plan(key)
        return self._cached_filter_plans.get(
            key, lambda: (self._make_plan(key), len(predicate.comparisons(key.filter.where)))
        )

    def _make_plan(self, key: _PlanKey) -> Plan:
        collection, auth = self._collection_and_auth(key.collection_name, key.auth_name)
        parameters = (*key.rule.parameters, *key.filter.parameters)
        classes = dict(zip(parameters, key.parameter_classes, strict=True))
        # Where the plan's values are; those that a test adds are put last.
        positions: dict[Parameter | CallerColumn, int] = {}

        def compile_part(part: Condition) -> TestCall:
            condition, original = predicate.number_literals_from_zero(part)
            part_classes = {
                parameter: parameter_class(parameter.value)
                if isinstance(parameter, LiteralParameter)
                else classes[original.get(parameter, parameter)]
                for parameter in predicate.condition_parameters(condition)
            }
            test = self._find_test(
                collection, auth, condition, part_classes, is_row_bound=key.is_caller_row_bound
            )
            argument_positions = [
                positions.setdefault(original.get(parameter, parameter), len(positions))
                for parameter in test.caller_parameters
            ]
            return TestCall(test, tuple(argument_positions))

        filter_where = key.filter.where
        if key.is_joined:
            # It implies the rule, which is kept: rules are evaluated first, and without a budget.
            filter_where = Conjunction((key.rule.where, filter_where))
        rule, filter_ = (_split(one, compile_part) for one in (key.rule.where, filter_where))
        return Plan(
            collection,
            rule,
            filter_,
            tuple(positions),
            self._registry,
            reads_caller=auth is not None and (key.rule.reads_caller or key.filter.reads_caller),
        )

    def _find_test(
        self,
        collection: Collection,
        auth: Collection | None,
        condition: Condition,
        parameter_classes: Mapping[Parameter, ParameterClass],
        *,
        is_row_bound: bool,
    ) -> Test:
        """Return the one test of a condition, for parameters of those classes."""
        reads_row = predicate.reads_caller_row(condition)
        if not reads_row and CALLER_ID_PARAMETER not in parameter_classes:
            auth = None  # the same test for callers of every auth collection
        is_caller_row_bound = is_row_bound and reads_row
        auth_name = None if auth is None else auth.name
        # 0.0 and -0.0 are equal, but not the same text.
        literals = tuple(str(p.value) for p in parameter_classes if isinstance(p, LiteralParameter))
        classes = tuple(parameter_classes.values())
        identity = (collection.name, auth_name, condition, classes, literals, is_caller_row_bound)
        test = self._tests.get(identity)
        if test is None:
            test = self._tests[identity] = Test(
                collections=self._collections,
                collection=collection,
                condition=condition,
                parameter_classes=parameter_classes,
                auth_collection=auth,
                is_caller_row_bound=is_caller_row_bound,
                is_utf8=self._is_utf8,
            )
        return test


def _split(condition: Condition, compile_part: Callable[[Condition], Formula]) -> Formula:
    """Return the condition as a formula over parts that share no join, each compiled once."""
    match condition:
        case predicate.Comparison() | predicate.NestedRule():
            return compile_part(condition)
        case predicate.Disjunction(parts):
            return disjunction(_split(part, compile_part) for part in parts)
        case Conjunction():
            independent = predicate.independent_parts(condition)
            return conjunction(
                compile_part(part) if isinstance(part, Conjunction) else _split(part, compile_part)
                for part in independent
            )


def _parameters_of(where: Condition) -> tuple[Parameter, ...]:
    parameters = predicate.condition_parameters(where)
    return tuple(p for p in parameters if not isinstance(p, LiteralParameter))


def _is_in(caller_row: Row, parameter: Parameter | CallerColumn) -> bool:
    return not isinstance(parameter, CallerColumn) or parameter.name in {"", *caller_row}
