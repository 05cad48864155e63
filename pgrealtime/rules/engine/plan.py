"""What a subscription asks, compiled once for all that ask the same: templates and variants.

A template is a rule with a filter, for parameters of certain classes. Its *variant* is what is left
of it for a subscriber when everything that depends on the subscriber alone has been decided: a
formula, how to find whom a row concerns, and which values tell subscribers apart.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple, TypeAlias
from weakref import WeakValueDictionary

from pgrealtime.auth.principal import Superuser
from pgrealtime.caches import WeightedCache
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.errors import RuleError
from pgrealtime.rules.engine.formula import (
    Formula,
    MacroValues,
    SplitCondition,
    Test,
    TestCall,
    caller_columns,
    conjunction,
    disjunction,
    each_test_call,
    map_test_calls,
    reads_caller_row,
    split_condition,
)
from pgrealtime.rules.engine.index_paths import IndexPath, KeyRegistry, LookupKind, index_paths
from pgrealtime.rules.language.parameter_values import parameter_value
from pgrealtime.rules.language.parameters import (
    CallerColumn,
    LiftedLiteral,
    LiteralParameter,
    Parameter,
    ParameterClass,
    RequestValue,
    fixed_parameter_class,
    parameter_class,
)
from pgrealtime.rules.language.predicate import (
    Condition,
    DenyAll,
    Predicate,
    comparisons,
    condition_parameters,
    lift_literals,
)
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.resolve import filter_text, resolve_filter, resolve_rule
from pgrealtime.rules.language.sqlite_values import Scalar
from pgrealtime.rules.sql.joins import CALLER_ID_PARAMETER
from pgrealtime.rules.sql.reference import auth_collection_of, check_rule

_ANY_TIME = datetime(1970, 1, 1, tzinfo=UTC)
"""Any moment: parameters that aren't macros are the same at all of them."""
_MAX_CACHED_RULES = 4096
_MAX_CACHED_RULE_PLANS = 16384
"""Without a filter: of rules, which the operator writes."""
_MAX_CACHED_FILTER_CHARACTERS = 256 * 1024
"""Of filters whose outlines are kept."""
_MAX_CACHED_FILTER_COMPARISONS = 4096
"""Of filters whose templates are kept while nobody uses them, at up to 36 KB."""


def macro_values_at(now: datetime) -> MacroValues:
    """Return what macros mean at a time, which has its zone."""
    return MacroValues(lambda macro: parameter_value(macro, RuleRequest(), now))


# --- from text to parts


@dataclass(frozen=True, slots=True)
class IndependentCondition:
    """A condition with joins of its own; its literals are numbered from 0."""

    condition: Condition
    literal_offset: int
    """Of its literals among those of the text."""


_SplitFilter: TypeAlias = "tuple[SplitPredicate, tuple[str | float, ...]]"
"""And its literals."""

IndependentConditions: TypeAlias = (
    IndependentCondition | tuple[str, tuple["IndependentConditions", ...]]
)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class SplitPredicate:
    """A rule or a filter that was resolved and cut, without a filter's literals."""

    conditions: IndependentConditions
    parameters: tuple[Parameter, ...]
    """What classes are asked of, literals of a rule aside."""


_ALWAYS_TRUE = SplitPredicate(("all", ()), ())
"""Of an empty rule, or where there is no filter."""


class RecheckCondition(NamedTuple):
    """What it means to be found."""

    guards: tuple[Formula, ...]
    """What must be true of the row."""
    residual: Formula
    """What must be true of the subscriber too."""
    implied_test_call: TestCall | None
    """What is true of everybody who is found."""


class Specialization:
    """What is left of a template for subscribers that agree on everything but ``picks``.

    Attributes:
        formula: What admits a row; True is everyone.
        value_positions: Which of the template's values tell subscribers apart.
        columns: What must be known of a row.
        paths: How a row finds its subscribers.
        rechecks: By what an index keeps them: what admits who is found there.
        filter_tests: What of it a client wrote, beyond the rule: its bounds are not the rule's.
        has_remote_filter: Whether the filter, beyond its rule, takes a question to Postgres.
        reads_caller: Whether it asks who the subscriber is: perhaps somebody else, or gone, when
            rows are read that are later than what is judged.
    """

    __slots__ = (
        "__weakref__",
        "collection",
        "columns",
        "filter_tests",
        "formula",
        "has_remote_filter",
        "paths",
        "reads_caller",
        "rechecks",
        "value_positions",
    )

    def __init__(
        self,
        collection: Collection,
        formula: Formula,
        value_positions: tuple[int, ...],
        columns: frozenset[str],
        registry: KeyRegistry,
        *,
        filter_tests: frozenset[Test] = frozenset(),
        reads_caller: bool = False,
    ) -> None:
        self.reads_caller = reads_caller
        self.collection = collection
        self.formula = formula
        self.value_positions = value_positions
        self.filter_tests = filter_tests
        self.has_remote_filter = any(atom.in_process is None for atom in filter_tests)
        self.columns = columns
        self.paths: tuple[IndexPath, ...] = index_paths(formula, registry)
        self.rechecks: dict[Hashable, RecheckCondition] = {}
        for path in self.paths:
            found = RecheckCondition(path.guards, path.residual, path.implied_test_call)
            if self.rechecks.setdefault(path.entries_key, found) != found:
                self.rechecks[path.entries_key] = RecheckCondition((), formula, None)

    @property
    def has_unindexed_filter(self) -> bool:
        """Whether each change costs something for what a client wrote, be it found or not."""
        return bool(self.filter_tests) and any(
            path.kind is LookupKind.ALL or path.is_scan for path in self.paths
        )


@dataclass(frozen=True, slots=True)
class BoundPredicate:
    """A subscription compiled: who shares both is judged together."""

    specialization: Specialization
    values: tuple[Scalar, ...]


class Plan:
    """A rule and a filter, for parameters of certain classes.

    Attributes:
        parameters: The parameters whose values decide, literals of the filter among them.
    """

    def __init__(
        self,
        collection: Collection,
        rule_formula: Formula,
        filter_formula: Formula,
        parameters: Sequence[Parameter | CallerColumn],
        registry: KeyRegistry,
        *,
        reads_caller: bool,
    ) -> None:
        formula = conjunction(iter((rule_formula, filter_formula)))
        self.collection = collection
        self.parameters = tuple(parameters)
        self._formula = formula
        self._filter_tests = _tests_of(filter_formula) - _tests_of(rule_formula)
        self._columns = frozenset().union(*(leaf.test.columns for leaf in each_test_call(formula)))
        self._reads_caller = reads_caller
        self._row_independent_calls = [
            leaf for leaf in each_test_call(formula) if leaf.test.is_row_independent
        ]
        self._registry = registry
        self._specializations: WeakValueDictionary[Hashable, Specialization] = WeakValueDictionary()

    def specialize(self, values: Sequence[Scalar]) -> BoundPredicate | None:
        """Return what is left for a subscriber; None if nothing can be admitted."""
        verdicts = tuple(
            [_row_independent_verdict(leaf, values) for leaf in self._row_independent_calls]
        )
        variant = self._specializations.get(verdicts)
        if variant is None:
            variant = self._make_specialization(
                dict(zip(self._row_independent_calls, verdicts, strict=True))
            )
            if variant.formula is False:
                return None
            self._specializations[verdicts] = variant
        return BoundPredicate(variant, tuple([values[at] for at in variant.value_positions]))

    def _make_specialization(self, verdicts: Mapping[TestCall, bool | None]) -> Specialization:
        def folded(leaf: TestCall) -> Formula:
            verdict = verdicts.get(leaf)
            return leaf if verdict is None else verdict

        formula = map_test_calls(self._formula, folded)
        picks = tuple(
            sorted({at for leaf in each_test_call(formula) for at in leaf.argument_positions})
        )
        places = {at: n for n, at in enumerate(picks)}
        renumbered = map_test_calls(
            formula,
            lambda leaf: TestCall(leaf.test, tuple(places[at] for at in leaf.argument_positions)),
        )
        return Specialization(
            self.collection,
            renumbered,
            picks,
            self._columns,
            self._registry,
            filter_tests=self._filter_tests & _tests_of(formula),
            reads_caller=self._reads_caller,
        )


def _tests_of(formula: Formula) -> frozenset[Test]:
    return frozenset(leaf.test for leaf in each_test_call(formula))


def _row_independent_verdict(test_call: TestCall, values: Sequence[Scalar]) -> bool | None:
    """Return the verdict that doesn't depend on any row; None if only Postgres knows it."""
    test = test_call.test.in_process
    assert test is not None
    try:
        return test({}, [values[at] for at in test_call.argument_positions])
    except Exception:  # noqa: BLE001 (as where rows are decided)
        return None


def _reads_caller(predicate: SplitPredicate) -> bool:
    """Whether it asks anything of the subscriber, who may be gone or another by now."""
    return any(
        isinstance(one, RequestValue) and one.path[0] == "auth" for one in predicate.parameters
    ) or any(
        column.name
        for part in _each_condition(predicate.conditions)
        for column in caller_columns(part.condition)
    )


class RuleCompiler:
    """Compiles subscriptions. Keeps what it compiled as long as it is used, and a while longer.

    Args:
        collections: All there are.
    """

    def __init__(self, collections: Collections) -> None:
        self._collections = collections
        # In other encodings bytes have an order of their own.
        self._is_utf8 = collections.server_encoding == "UTF8"
        self._registry = KeyRegistry()
        self._tests: WeakValueDictionary[Hashable, Test] = WeakValueDictionary()
        self._filters_by_conditions: WeakValueDictionary[Hashable, SplitPredicate] = (
            WeakValueDictionary()
        )
        self._cached_rule = lru_cache(maxsize=_MAX_CACHED_RULES)(self._split_rule)
        self._filters_by_text: WeightedCache[Hashable, _SplitFilter] = WeightedCache(
            _MAX_CACHED_FILTER_CHARACTERS
        )
        self._cached_rule_plan = lru_cache(maxsize=_MAX_CACHED_RULE_PLANS)(self._make_plan)
        self._cached_filter_plans: WeightedCache[Hashable, Plan] = WeightedCache(
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
    ) -> BoundPredicate | DenyAll:
        """Return what decides which rows of the collection the subscriber may see.

        Args:
            collection: Whose rows are judged.
            rule: The collection's rule for the topic; None is for superusers only.
            request: The subscriber; a filter is ``request.query["filter"]``.
            is_filtered: Whether that narrows what the rule admits.
            caller_row: The subscriber's row of its auth collection, if there is one and it is
                known; what isn't in it Postgres is asked for.

        Raises:
            RuleError: The rule is bad for everybody.
        """
        is_superuser = isinstance(request.principal, Superuser)
        if rule is None and not is_superuser:
            return DenyAll("the rule is for superusers only")
        auth = auth_collection_of(self._collections, request)
        auth_name = None if auth is None else auth.name
        asked = "" if is_superuser or rule is None else rule
        text = request.query.get("filter", "") if is_filtered else ""
        try:
            made = self._cached_rule(collection.name, asked, auth_name)
        except RuleError as error:
            check_rule(self._collections, collection, asked)
            return DenyAll(f"the rule doesn't hold for this subscriber: {error}")
        try:
            if text:
                filter_text(request.query, is_superuser=is_superuser)
            place = (collection.name, text, auth_name, is_superuser)
            narrowed, literals = self._filters_by_text.get(
                place, lambda: (self._split_filter(*place), len(text))
            )
            return self._bind(
                collection,
                auth_name,
                (made, narrowed),
                request,
                literals=literals,
                caller_row=caller_row,
            )
        except RuleError as error:
            return DenyAll(f"the filter is refused: {error}" if text else str(error))

    def _bind(
        self,
        collection: Collection,
        auth_name: str | None,
        predicates: tuple[SplitPredicate, SplitPredicate],
        request: RuleRequest,
        *,
        literals: Sequence[str | float],
        caller_row: Row | None,
    ) -> BoundPredicate | DenyAll:
        shapes = tuple(
            [
                fixed_parameter_class(p)
                or parameter_class(parameter_value(p, request, _ANY_TIME, literals))
                for outline in predicates
                for p in outline.parameters
            ]
        )
        template = self._find_plan(
            collection.name, auth_name, predicates, shapes, caller_row is not None
        )
        if caller_row is not None and not all(
            _is_bindable(caller_row, p) for p in template.parameters
        ):
            template = self._find_plan(collection.name, auth_name, predicates, shapes, False)
        values = [_value_to_bind(p, request, literals, caller_row) for p in template.parameters]
        bound = template.specialize(values)
        return DenyAll("") if bound is None else bound

    # --- what is kept

    def _find_plan(
        self,
        collection_name: str,
        auth_name: str | None,
        predicates: tuple[SplitPredicate, SplitPredicate],
        parameter_classes: tuple[ParameterClass, ...],
        is_caller_row_bound: bool,  # noqa: FBT001 (cached)
    ) -> Plan:
        _, narrowed = predicates
        if narrowed is _ALWAYS_TRUE:
            return self._cached_rule_plan(
                collection_name, auth_name, predicates, parameter_classes, is_caller_row_bound
            )
        return self._cached_filter_plans.get(
            (collection_name, auth_name, predicates, parameter_classes, is_caller_row_bound),
            lambda: (
                self._make_plan(
                    collection_name, auth_name, predicates, parameter_classes, is_caller_row_bound
                ),
                sum(
                    1
                    for part in _each_condition(narrowed.conditions)
                    for _ in comparisons(part.condition)
                ),
            ),
        )

    def _split_rule(self, collection_name: str, text: str, auth_name: str | None) -> SplitPredicate:
        if not text:
            return _ALWAYS_TRUE
        collection = self._collections[collection_name]
        auth = None if auth_name is None else self._collections[auth_name]
        predicate = resolve_rule(text, self._collections, collection, auth)
        skeleton = _with_literals(split_condition(predicate.where))
        return SplitPredicate(skeleton, _parameters_of(skeleton))

    def _split_filter(
        self,
        collection_name: str,
        text: str,
        auth_name: str | None,
        is_superuser: bool,  # noqa: FBT001 (cached)
    ) -> tuple[SplitPredicate, tuple[str | float, ...]]:
        if not text:
            return _ALWAYS_TRUE, ()
        collection = self._collections[collection_name]
        auth = None if auth_name is None else self._collections[auth_name]
        predicate = resolve_filter(
            text, self._collections, collection, auth, is_superuser=is_superuser
        )
        literals: list[str | float] = []
        skeleton = _lift_literals(split_condition(predicate.where), collection_name, literals)
        outline = self._filters_by_conditions.get(skeleton)
        if outline is None:
            outline = self._filters_by_conditions[skeleton] = SplitPredicate(
                skeleton, _parameters_of(skeleton)
            )
        return outline, tuple(literals)

    def _make_plan(
        self,
        collection_name: str,
        auth_name: str | None,
        predicates: tuple[SplitPredicate, SplitPredicate],
        parameter_classes: tuple[ParameterClass, ...],
        is_caller_row_bound: bool,  # noqa: FBT001 (cached)
    ) -> Plan:
        collection = self._collections[collection_name]
        auth = None if auth_name is None else self._collections[auth_name]
        places: dict[Parameter | CallerColumn, int] = {}
        rest = iter(parameter_classes)

        def build(
            part: IndependentConditions, known: Mapping[Parameter, ParameterClass]
        ) -> Formula:
            match part:
                case IndependentCondition():
                    return self._make_test_call(
                        collection,
                        auth,
                        part,
                        known,
                        places,
                        is_caller_row_bound=is_caller_row_bound,
                    )
                case (join, parts):
                    made = (build(one, known) for one in parts)
                    return conjunction(made) if join == "all" else disjunction(made)

        rule, filter_ = (
            build(outline.conditions, dict(zip(outline.parameters, rest, strict=False)))
            for outline in predicates
        )
        asks_caller = auth is not None and any(map(_reads_caller, predicates))
        return Plan(
            collection, rule, filter_, tuple(places), self._registry, reads_caller=asks_caller
        )

    def _make_test_call(
        self,
        collection: Collection,
        auth_collection: Collection | None,
        independent: IndependentCondition,
        classes: Mapping[Parameter, ParameterClass],
        positions: dict[Parameter | CallerColumn, int],
        *,
        is_caller_row_bound: bool,
    ) -> Formula:
        shapes = {
            p: parameter_class(p.value)
            if isinstance(p, LiteralParameter)
            else classes[_with_literal_offset(p, independent.literal_offset)]
            for p in condition_parameters(independent.condition)
        }
        atom = self._intern_test(
            collection,
            auth_collection,
            independent.condition,
            shapes,
            is_caller_row_bound=is_caller_row_bound,
        )
        picks = tuple(
            positions.setdefault(
                p
                if isinstance(p, CallerColumn)
                else _with_literal_offset(p, independent.literal_offset),
                len(positions),
            )
            for p in atom.caller_parameters
        )
        return TestCall(atom, picks)

    def _intern_test(
        self,
        collection: Collection,
        auth_collection: Collection | None,
        condition: Condition,
        parameter_classes: Mapping[Parameter, ParameterClass],
        *,
        is_caller_row_bound: bool,
    ) -> Test:
        asks_own = reads_caller_row(condition)
        is_caller_row_bound = is_caller_row_bound and asks_own
        if not asks_own and CALLER_ID_PARAMETER not in parameter_classes:
            auth_collection = None  # it is about no caller: the same for those of every collection
        # 0.0 and -0.0 are equal, and not the same text.
        literals = tuple(str(p.value) for p in parameter_classes if isinstance(p, LiteralParameter))
        auth_name = None if auth_collection is None else auth_collection.name
        classes = tuple(parameter_classes.values())
        identity = (collection.name, auth_name, condition, classes, literals, is_caller_row_bound)
        atom = self._tests.get(identity)
        if atom is None:
            atom = self._tests[identity] = Test(
                self._collections,
                collection,
                condition,
                parameter_classes,
                auth_collection=auth_collection,
                is_caller_row_bound=is_caller_row_bound,
                is_utf8=self._is_utf8,
            )
        return atom


def caller_columns_read_by_rules(collections: Collections) -> Mapping[str, tuple[str, ...]]:
    """Return the columns of people's own rows that rules read, by auth collection.

    Whoever has them with a subscriber asks as of its place in the stream, spares Postgres the
    look-up for each change and the index a subscriber that would be tried each time. Rules that
    don't hold are left out.
    """
    asked: dict[str, set[str]] = {}
    for collection in collections.values():
        for auth in (one for one in collections.values() if one.type == "auth"):
            for rule in set(_rules_of(collection)) - {None, ""}:
                try:
                    where = resolve_rule(rule or "", collections, collection, auth).where
                except RuleError:
                    continue
                names = {column.name for column in caller_columns(where)} - {""}
                asked.setdefault(auth.name, set()).update(names)
    return {name: tuple(sorted(columns)) for name, columns in asked.items() if columns}


def _rules_of(collection: Collection) -> tuple[str | None, ...]:
    return (
        collection.list_rule,
        collection.view_rule,
        collection.manage_rule,
        collection.auth_rule,
    )


def _is_bindable(caller_row: Row, parameter: Parameter | CallerColumn) -> bool:
    return not isinstance(parameter, CallerColumn) or parameter.name in {"", *caller_row}


def _value_to_bind(
    parameter: Parameter | CallerColumn,
    request: RuleRequest,
    literals: Sequence[str | float],
    caller_row: Row | None,
) -> Scalar:
    if isinstance(parameter, CallerColumn):
        assert caller_row is not None
        return caller_row.get(parameter.name) if parameter.name else "there"
    return parameter_value(parameter, request, _ANY_TIME, literals)


def _with_literal_offset(parameter: Parameter, offset: int) -> Parameter:
    return (
        LiftedLiteral(parameter.index + offset)
        if isinstance(parameter, LiftedLiteral)
        else parameter
    )


def _with_literals(condition: SplitCondition) -> IndependentConditions:
    match condition:
        case (str(join), tuple(parts)):
            return (join, tuple(_with_literals(one) for one in parts))
        case _:
            return IndependentCondition(condition, 0)


def _lift_literals(
    condition: SplitCondition, collection_name: str, literals: list[str | float]
) -> IndependentConditions:
    match condition:
        case (str(join), tuple(parts)):
            return (join, tuple(_lift_literals(one, collection_name, literals) for one in parts))
        case _:
            predicate, found = lift_literals(Predicate(collection=collection_name, where=condition))
            component = IndependentCondition(predicate.where, len(literals))
            literals.extend(found)
            return component


def _each_condition(conditions: IndependentConditions) -> Iterator[IndependentCondition]:
    match conditions:
        case IndependentCondition():
            yield conditions
        case (_, parts):
            for part in parts:
                yield from _each_condition(part)


def _parameters_of(conditions: IndependentConditions) -> tuple[Parameter, ...]:
    found = (
        _with_literal_offset(p, part.literal_offset)
        for part in _each_condition(conditions)
        for p in condition_parameters(part.condition)
        if not isinstance(p, LiteralParameter)
    )
    return tuple(dict.fromkeys(found))
