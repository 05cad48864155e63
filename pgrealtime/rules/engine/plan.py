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
from pgrealtime.caches import Kept
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.errors import RuleError
from pgrealtime.rules.engine.formula import (
    Atom,
    Formula,
    Leaf,
    Moment,
    Part,
    all_of,
    asks_own_row,
    cut,
    leaves,
    own_columns,
    rebuilt,
    some_of,
)
from pgrealtime.rules.engine.index_paths import Kind, Path, Sources, access
from pgrealtime.rules.language.parameters import (
    AuthColumn,
    Lifted,
    Literal,
    Parameter,
    RequestValue,
    Shape,
    shape,
    static_shape,
    value,
)
from pgrealtime.rules.language.predicate import (
    Condition,
    Predicate,
    comparisons,
    lifted,
    parameters,
)
from pgrealtime.rules.language.request import Request
from pgrealtime.rules.language.resolve import filter_text, resolve_filter, resolve_rule
from pgrealtime.rules.memory.compare import Scalar
from pgrealtime.rules.sql.joins import AUTH_ID
from pgrealtime.rules.sql.reference import Nobody, auth_collection, validate

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
"""Any moment: parameters that aren't macros are the same at all of them."""
_TEXTS = 4096
_TEMPLATES = 16384
"""Without a filter: of rules, which the operator writes."""
_CHARACTERS = 256 * 1024
"""Of filters whose outlines are kept."""
_COMPARISONS = 4096
"""Of filters whose templates are kept while nobody uses them, at up to 36 KB."""


def moment(now: datetime) -> Moment:
    """Return what macros mean at a time, which has its zone."""
    return Moment(lambda macro: value(macro, Request(), now))


# --- from text to parts


@dataclass(frozen=True, slots=True)
class Component:
    """A condition with joins of its own; its literals are numbered from 0."""

    condition: Condition
    offset: int
    """Of its literals among those of the text."""


_Filter: TypeAlias = "tuple[Outline, tuple[str | float, ...]]"
"""And its literals."""

Skeleton: TypeAlias = Component | tuple[str, tuple["Skeleton", ...]]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Outline:
    """A rule or a filter that was resolved and cut, without a filter's literals."""

    skeleton: Skeleton
    parameters: tuple[Parameter, ...]
    """What classes are asked of, literals of a rule aside."""


_NOTHING = Outline(("all", ()), ())
"""Of an empty rule, or where there is no filter."""


class Lead(NamedTuple):
    """What it means to be found."""

    guards: tuple[Formula, ...]
    """What must be true of the row."""
    rest: Formula
    """What must be true of the subscriber too."""
    proves: Leaf | None
    """What is true of everybody who is found."""


class Variant:
    """What is left of a template for subscribers that agree on everything but ``picks``.

    Attributes:
        formula: What admits a row; True is everyone.
        picks: Which of the template's values tell subscribers apart.
        columns: What must be known of a row.
        paths: How a row finds its subscribers.
        leads: By what an index keeps them: what admits who is found there.
        filtered: What of it a client wrote, beyond the rule: its bounds are not the rule's.
        is_costly: Whether the filter, beyond its rule, takes a question to Postgres.
        asks_caller: Whether it asks who the subscriber is: perhaps somebody else, or gone, when
            rows are read that are later than what is judged.
    """

    __slots__ = (
        "__weakref__",
        "asks_caller",
        "collection",
        "columns",
        "filtered",
        "formula",
        "is_costly",
        "leads",
        "paths",
        "picks",
    )

    def __init__(
        self,
        collection: Collection,
        formula: Formula,
        picks: tuple[int, ...],
        columns: frozenset[str],
        sources: Sources,
        *,
        filtered: frozenset[Atom] = frozenset(),
        asks_caller: bool = False,
    ) -> None:
        self.asks_caller = asks_caller
        self.collection = collection
        self.formula = formula
        self.picks = picks
        self.filtered = filtered
        self.is_costly = any(atom.test is None for atom in filtered)
        self.columns = columns
        self.paths: tuple[Path, ...] = access(formula, sources)
        self.leads: dict[Hashable, Lead] = {}
        for path in self.paths:
            found = Lead(path.guards, path.rest, path.proves)
            if self.leads.setdefault(path.lead, found) != found:
                self.leads[path.lead] = Lead((), formula, None)

    @property
    def is_scan(self) -> bool:
        """Whether each change costs something for what a client wrote, be it found or not."""
        return bool(self.filtered) and any(
            path.kind is Kind.FREE or path.is_scan for path in self.paths
        )


@dataclass(frozen=True, slots=True)
class Bound:
    """A subscription compiled: who shares both is judged together."""

    variant: Variant
    values: tuple[Scalar, ...]


class Template:
    """A rule and a filter, for parameters of certain classes.

    Attributes:
        needs: The parameters whose values decide, literals of the filter among them.
    """

    def __init__(
        self,
        collection: Collection,
        rule: Formula,
        filter_: Formula,
        needs: Sequence[Parameter | AuthColumn],
        sources: Sources,
        *,
        asks_caller: bool,
    ) -> None:
        formula = all_of(iter((rule, filter_)))
        self.collection = collection
        self.needs = tuple(needs)
        self._formula = formula
        self._filtered = _atoms(filter_) - _atoms(rule)
        self._columns = frozenset().union(*(leaf.atom.columns for leaf in leaves(formula)))
        self._asks_caller = asks_caller
        self._constants = [leaf for leaf in leaves(formula) if leaf.atom.is_constant]
        self._sources = sources
        self._variants: WeakValueDictionary[Hashable, Variant] = WeakValueDictionary()

    def bind(self, values: Sequence[Scalar]) -> Bound | None:
        """Return what is left for a subscriber; None if nothing can be admitted."""
        verdicts = tuple([_constant(leaf, values) for leaf in self._constants])
        variant = self._variants.get(verdicts)
        if variant is None:
            variant = self._variant(dict(zip(self._constants, verdicts, strict=True)))
            if variant.formula is False:
                return None
            self._variants[verdicts] = variant
        return Bound(variant, tuple([values[at] for at in variant.picks]))

    def _variant(self, verdicts: Mapping[Leaf, bool | None]) -> Variant:
        def folded(leaf: Leaf) -> Formula:
            verdict = verdicts.get(leaf)
            return leaf if verdict is None else verdict

        formula = rebuilt(self._formula, folded)
        picks = tuple(sorted({at for leaf in leaves(formula) for at in leaf.picks}))
        places = {at: n for n, at in enumerate(picks)}
        renumbered = rebuilt(
            formula, lambda leaf: Leaf(leaf.atom, tuple(places[at] for at in leaf.picks))
        )
        return Variant(
            self.collection,
            renumbered,
            picks,
            self._columns,
            self._sources,
            filtered=self._filtered & _atoms(formula),
            asks_caller=self._asks_caller,
        )


def _atoms(formula: Formula) -> frozenset[Atom]:
    return frozenset(leaf.atom for leaf in leaves(formula))


def _constant(leaf: Leaf, values: Sequence[Scalar]) -> bool | None:
    """Return the verdict that doesn't depend on any row; None if only Postgres knows it."""
    test = leaf.atom.test
    assert test is not None
    try:
        return test({}, [values[at] for at in leaf.picks])
    except Exception:  # noqa: BLE001 (as where rows are decided)
        return None


def _asks_caller(outline: Outline) -> bool:
    """Whether it asks anything of the subscriber, who may be gone or another by now."""
    return any(
        isinstance(one, RequestValue) and one.path[0] == "auth" for one in outline.parameters
    ) or any(
        column.name
        for part in _components(outline.skeleton)
        for column in own_columns(part.condition)
    )


class Planner:
    """Compiles subscriptions. Keeps what it compiled as long as it is used, and a while longer.

    Args:
        collections: All there are.
    """

    def __init__(self, collections: Collections) -> None:
        self._collections = collections
        # In other encodings bytes have an order of their own.
        self._is_utf8 = collections.encoding == "UTF8"
        self._sources = Sources()
        self._atoms: WeakValueDictionary[Hashable, Atom] = WeakValueDictionary()
        self._filters: WeakValueDictionary[Hashable, Outline] = WeakValueDictionary()
        self._rule = lru_cache(maxsize=_TEXTS)(self._make_rule)
        self._filters_of_texts: Kept[Hashable, _Filter] = Kept(_CHARACTERS)
        self._template = lru_cache(maxsize=_TEMPLATES)(self._make_template)
        self._narrowed: Kept[Hashable, Template] = Kept(_COMPARISONS)

    def bind(
        self,
        collection: Collection,
        rule: str | None,
        request: Request,
        own: Row | None = None,
        *,
        is_filtered: bool = True,
    ) -> Bound | Nobody:
        """Return what decides which rows of the collection the subscriber may see.

        Args:
            collection: Whose rows are judged.
            rule: The collection's rule for the topic; None is for superusers only.
            request: The subscriber; a filter is ``request.query["filter"]``.
            is_filtered: Whether that narrows what the rule admits.
            own: The subscriber's row of its auth collection, if there is one and it is known; what
                isn't in it Postgres is asked for.

        Raises:
            RuleError: The rule is bad for everybody.
        """
        is_superuser = isinstance(request.principal, Superuser)
        if rule is None and not is_superuser:
            return Nobody("the rule is for superusers only")
        auth = auth_collection(self._collections, request)
        auth_name = None if auth is None else auth.name
        asked = "" if is_superuser or rule is None else rule
        text = request.query.get("filter", "") if is_filtered else ""
        try:
            made = self._rule(collection.name, asked, auth_name)
        except RuleError as error:
            validate(self._collections, collection, asked)
            return Nobody(f"the rule doesn't hold for this subscriber: {error}")
        try:
            if text:
                filter_text(request.query, is_superuser=is_superuser)
            place = (collection.name, text, auth_name, is_superuser)
            narrowed, literals = self._filters_of_texts.get(
                place, lambda: (self._make_filter(*place), len(text))
            )
            return self._bound(
                collection, auth_name, (made, narrowed), request, literals=literals, own=own
            )
        except RuleError as error:
            return Nobody(f"the filter is refused: {error}" if text else str(error))

    def _bound(
        self,
        collection: Collection,
        auth_name: str | None,
        outlines: tuple[Outline, Outline],
        request: Request,
        *,
        literals: Sequence[str | float],
        own: Row | None,
    ) -> Bound | Nobody:
        shapes = tuple(
            [
                static_shape(p) or shape(value(p, request, _EPOCH, literals))
                for outline in outlines
                for p in outline.parameters
            ]
        )
        template = self._found(collection.name, auth_name, outlines, shapes, own is not None)
        if own is not None and not all(_is_in(own, p) for p in template.needs):
            template = self._found(collection.name, auth_name, outlines, shapes, False)
        values = [_value(p, request, literals, own) for p in template.needs]
        bound = template.bind(values)
        return Nobody("") if bound is None else bound

    # --- what is kept

    def _found(
        self,
        name: str,
        auth_name: str | None,
        outlines: tuple[Outline, Outline],
        shapes: tuple[Shape, ...],
        is_own_known: bool,  # noqa: FBT001 (cached)
    ) -> Template:
        _, narrowed = outlines
        if narrowed is _NOTHING:
            return self._template(name, auth_name, outlines, shapes, is_own_known)
        return self._narrowed.get(
            (name, auth_name, outlines, shapes, is_own_known),
            lambda: (
                self._make_template(name, auth_name, outlines, shapes, is_own_known),
                sum(
                    1
                    for part in _components(narrowed.skeleton)
                    for _ in comparisons(part.condition)
                ),
            ),
        )

    def _make_rule(self, name: str, text: str, auth_name: str | None) -> Outline:
        if not text:
            return _NOTHING
        collection = self._collections[name]
        auth = None if auth_name is None else self._collections[auth_name]
        predicate = resolve_rule(text, self._collections, collection, auth)
        skeleton = _kept(cut(predicate.where))
        return Outline(skeleton, _parameters_of(skeleton))

    def _make_filter(
        self,
        name: str,
        text: str,
        auth_name: str | None,
        is_superuser: bool,  # noqa: FBT001 (cached)
    ) -> tuple[Outline, tuple[str | float, ...]]:
        if not text:
            return _NOTHING, ()
        collection = self._collections[name]
        auth = None if auth_name is None else self._collections[auth_name]
        predicate = resolve_filter(
            text, self._collections, collection, auth, is_superuser=is_superuser
        )
        literals: list[str | float] = []
        skeleton = _without_literals(cut(predicate.where), name, literals)
        outline = self._filters.get(skeleton)
        if outline is None:
            outline = self._filters[skeleton] = Outline(skeleton, _parameters_of(skeleton))
        return outline, tuple(literals)

    def _make_template(
        self,
        name: str,
        auth_name: str | None,
        outlines: tuple[Outline, Outline],
        shapes: tuple[Shape, ...],
        is_own_known: bool,  # noqa: FBT001 (cached)
    ) -> Template:
        collection = self._collections[name]
        auth = None if auth_name is None else self._collections[auth_name]
        places: dict[Parameter | AuthColumn, int] = {}
        rest = iter(shapes)

        def build(part: Skeleton, known: Mapping[Parameter, Shape]) -> Formula:
            match part:
                case Component():
                    return self._leaf(
                        collection, auth, part, known, places, is_own_known=is_own_known
                    )
                case (join, parts):
                    made = (build(one, known) for one in parts)
                    return all_of(made) if join == "all" else some_of(made)

        rule, filter_ = (
            build(outline.skeleton, dict(zip(outline.parameters, rest, strict=False)))
            for outline in outlines
        )
        asks_caller = auth is not None and any(map(_asks_caller, outlines))
        return Template(
            collection, rule, filter_, tuple(places), self._sources, asks_caller=asks_caller
        )

    def _leaf(
        self,
        collection: Collection,
        auth: Collection | None,
        part: Component,
        known: Mapping[Parameter, Shape],
        places: dict[Parameter | AuthColumn, int],
        *,
        is_own_known: bool,
    ) -> Formula:
        shapes = {
            p: shape(p.value) if isinstance(p, Literal) else known[_shifted(p, part.offset)]
            for p in parameters(part.condition)
        }
        atom = self._atom(collection, auth, part.condition, shapes, is_own_known=is_own_known)
        picks = tuple(
            places.setdefault(
                p if isinstance(p, AuthColumn) else _shifted(p, part.offset), len(places)
            )
            for p in atom.free
        )
        return Leaf(atom, picks)

    def _atom(
        self,
        collection: Collection,
        auth: Collection | None,
        condition: Condition,
        shapes: Mapping[Parameter, Shape],
        *,
        is_own_known: bool,
    ) -> Atom:
        asks_own = asks_own_row(condition)
        is_own_known = is_own_known and asks_own
        if not asks_own and AUTH_ID not in shapes:
            auth = None  # it is about no caller: the same for those of every collection
        # 0.0 and -0.0 are equal, and not the same text.
        literals = tuple(str(p.value) for p in shapes if isinstance(p, Literal))
        auth_name = None if auth is None else auth.name
        classes = tuple(shapes.values())
        identity = (collection.name, auth_name, condition, classes, literals, is_own_known)
        atom = self._atoms.get(identity)
        if atom is None:
            atom = self._atoms[identity] = Atom(
                self._collections,
                collection,
                condition,
                shapes,
                auth=auth,
                is_own_known=is_own_known,
                is_utf8=self._is_utf8,
            )
        return atom


def columns_asked(collections: Collections) -> Mapping[str, tuple[str, ...]]:
    """Return the columns of people's own rows that rules read, by auth collection.

    Whoever has them with a subscriber asks as of its place in the stream, spares Postgres the
    look-up for each change and the index a subscriber that would be tried each time. Rules that
    don't hold are left out.
    """
    asked: dict[str, set[str]] = {}
    for collection in collections.values():
        for auth in (one for one in collections.values() if one.type == "auth"):
            for rule in set(_rules(collection)) - {None, ""}:
                try:
                    where = resolve_rule(rule or "", collections, collection, auth).where
                except RuleError:
                    continue
                names = {column.name for column in own_columns(where)} - {""}
                asked.setdefault(auth.name, set()).update(names)
    return {name: tuple(sorted(columns)) for name, columns in asked.items() if columns}


def _rules(collection: Collection) -> tuple[str | None, ...]:
    return (
        collection.list_rule,
        collection.view_rule,
        collection.manage_rule,
        collection.auth_rule,
    )


def _is_in(own: Row, parameter: Parameter | AuthColumn) -> bool:
    return not isinstance(parameter, AuthColumn) or parameter.name in {"", *own}


def _value(
    parameter: Parameter | AuthColumn,
    request: Request,
    literals: Sequence[str | float],
    own: Row | None,
) -> Scalar:
    if isinstance(parameter, AuthColumn):
        assert own is not None
        return own.get(parameter.name) if parameter.name else "there"
    return value(parameter, request, _EPOCH, literals)


def _shifted(parameter: Parameter, offset: int) -> Parameter:
    return Lifted(parameter.index + offset) if isinstance(parameter, Lifted) else parameter


def _kept(part: Part) -> Skeleton:
    match part:
        case (str(join), tuple(parts)):
            return (join, tuple(_kept(one) for one in parts))
        case _:
            return Component(part, 0)


def _without_literals(part: Part, name: str, literals: list[str | float]) -> Skeleton:
    match part:
        case (str(join), tuple(parts)):
            return (join, tuple(_without_literals(one, name, literals) for one in parts))
        case _:
            predicate, found = lifted(Predicate(collection=name, where=part))
            component = Component(predicate.where, len(literals))
            literals.extend(found)
            return component


def _components(skeleton: Skeleton) -> Iterator[Component]:
    match skeleton:
        case Component():
            yield skeleton
        case (_, parts):
            for part in parts:
                yield from _components(part)


def _parameters_of(skeleton: Skeleton) -> tuple[Parameter, ...]:
    found = (
        _shifted(p, part.offset)
        for part in _components(skeleton)
        for p in parameters(part.condition)
        if not isinstance(p, Literal)
    )
    return tuple(dict.fromkeys(found))
