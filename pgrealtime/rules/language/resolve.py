"""Syntax to meaning: every path becomes a place and a field, or a parameter. Before lower.py.

A rule may read every field; a client's filter (``Filter``) is held to what its sender could see
anyway: no hidden fields, no rows of collections that cannot be listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NoReturn

from pgrealtime.collections.model import Collection, Collections, Field, FieldKind
from pgrealtime.errors import RuleError, RuleNameError, RuleSyntaxError, RuleUnsupportedError
from pgrealtime.rules.language.parameters import MACROS, Literal, RequestValue
from pgrealtime.rules.language.predicate import (
    AllRows,
    AuthRow,
    Back,
    Comparison,
    Condition,
    Conjunction,
    Constant,
    Disjunction,
    FieldValue,
    GeoDistance,
    Here,
    Hidden,
    Item,
    Items,
    JsonValue,
    Keyword,
    Nested,
    NoItem,
    Part,
    Place,
    Predicate,
    Strftime,
    Term,
    ToItem,
    ToOne,
    comparisons,
)
from pgrealtime.rules.language.syntax import (
    And,
    Call,
    Cmp,
    Expression,
    Lit,
    Op,
    Operand,
    Or,
    Path,
    parse,
)
from pgrealtime.spelling import nearest

MAX_HOPS = 6
"""PocketBase's own limit of relations in one path."""
MAX_FILTER_BYTES = 3500
"""PocketBase's own limit for lists; a topic can't carry more anyway."""
MAX_STRFTIME_ARGUMENTS = 10
"""PocketBase's own limit."""


def resolve_rule(
    text: str, collections: Collections, collection: Collection, auth: Collection | None
) -> Predicate:
    """Return what the rule means for subscribers of one auth collection.

    Args:
        text: The rule, not empty.
        collections: All there are.
        collection: The one whose rows are judged.
        auth: The collection of the subscriber's record; None for a guest, or if there is none of
            that name: then paths of ``@request.auth`` are NULL.

    Raises:
        RuleError: The text is not of the language, names what isn't there or asks for what can't
            be decided exactly. Paths of ``@request.auth`` are checked for this ``auth`` only.
    """
    resolver = _Resolver(collections, collection, auth, is_filter=False)
    return _predicate(collection, resolver.condition(parse(text)))


def resolve_filter(
    text: str,
    collections: Collections,
    collection: Collection,
    auth: Collection | None,
    *,
    is_superuser: bool = False,
) -> Predicate:
    """Return what a client's filter means, list rules of joined collections included.

    Superusers may name ``@request`` and ``@collection``, and get no other relief: PocketBase's
    realtime gives them none.

    Raises:
        RuleError: As for rules; or the filter reads what its sender may not see.
    """
    if len(text.encode("utf-8", "replace")) > MAX_FILTER_BYTES:
        raise RuleSyntaxError(
            f"a filter takes at most {MAX_FILTER_BYTES} bytes", start=0, end=len(text)
        )
    if not is_superuser:
        _refuse_words(text)
    resolver = _Resolver(collections, collection, auth, is_filter=True)
    where = resolver.condition(parse(text))
    conditions = [where, *resolver.list_rules()]
    joined = where if len(conditions) == 1 else Conjunction(tuple(conditions))
    return _predicate(collection, joined)


def filter_text(query: Mapping[str, str], *, is_superuser: bool) -> str:
    """Return the client's filter, empty if there is none.

    A sort means nothing here, but PocketBase looks at it wherever there is a filter.

    Raises:
        RuleNameError: The sort has a word that only superusers may use.
    """
    text = query.get("filter", "")
    if text and not is_superuser:
        _refuse_words(query.get("sort", ""))
    return text


def _refuse_words(text: str) -> None:
    for banned in ("@request.", "@collection."):
        if banned in text:
            start = text.index(banned)
            raise RuleNameError(
                f'"{banned}" is not for client filters', start=start, end=start + len(banned)
            )


def _predicate(collection: Collection, where: Condition) -> Predicate:
    """Return the predicate; one that PocketBase fails to evaluate admits nothing.

    A list of items that is made a pattern is no list any more, and that breaks all of its query.
    """
    breaks = any(
        cmp.op in {Op.LIKE, Op.NOT_LIKE} and isinstance(cmp.right, NoItem)
        for cmp in comparisons(where)
    )
    return Predicate(collection=collection.name, where=_NEVER if breaks else where)


_NEVER = Comparison(Keyword(False), Op.EQ, True, Keyword(True))


_ALLOWED = re.compile(
    r"\w+[\w.:]*"
    r"|@request\.context|@request\.method"
    r"|@request\.(?:auth|body|query|headers)\.[\w.:]*\w+"
    r"|@collection\.\w+(?::\w+)?\.[\w.:]*\w+",
    re.ASCII,
)
_BACK = re.compile(r"(\w+)_via_(\w+)", re.ASCII)
_MODIFIERS = {"isset", "changed", "each", "length", "lower"}
_PLAIN = {"id", "collectionId", "collectionName", "email", "emailVisibility", "verified"}
"""Fields of ``@request.auth`` that come with the authentication, without asking the database."""
_KEYWORDS = {"null": None, "true": True, "false": False}
_MAX_GUESSED = 100
"""Longer names get no suggestion: comparing is quadratic in their length."""
_REFUSED_TYPES = {"money", "refcursor", "hstore"}


class _Resolver:
    """Resolves one scope: all of its paths begin at the row of ``collection``."""

    def __init__(
        self,
        collections: Collections,
        collection: Collection,
        auth: Collection | None,
        *,
        is_filter: bool,
    ) -> None:
        self._collections = collections
        self._collection = collection
        self._auth = auth
        self._is_filter = is_filter
        self._aliases: dict[str, str] = {}
        self._joined: dict[Place, None] = {}
        self._guards: list[Comparison] = []
        self._at: Operand = Path("", 0, 0)

    # --- expressions

    def condition(self, expression: Expression) -> Condition:
        match expression:
            case Cmp():
                return self._comparison(expression)
            case And(parts):
                return Conjunction(tuple(self.condition(part) for part in parts))
            case Or(parts):
                return Disjunction(tuple(self.condition(part) for part in parts))

    def list_rules(self) -> list[Condition]:
        """What the collections joined so far demand of their rows, missing ones excepted."""
        demands: list[Condition] = []
        for place in self._joined:
            collection = self._collections[place.collection]
            if not collection.list_rule:
                continue
            inner = _Resolver(self._collections, collection, self._auth, is_filter=False)
            where = inner.condition(parse(collection.list_rule))
            missing = Comparison(
                FieldValue(place, collection.by_name["id"]), Op.EQ, True, Constant(Literal(""))
            )
            demands.append(Disjunction((missing, Nested(place, where))))
        return demands

    def _comparison(self, cmp: Cmp) -> Condition:
        self._guards = []
        left = self._operand(cmp.left)
        right = self._operand(cmp.right)
        leaf = Comparison(left, cmp.op, cmp.is_any, right, cmp.start, cmp.end)
        return Conjunction((leaf, *self._guards)) if self._guards else leaf

    def _operand(self, operand: Operand) -> Term:
        self._at = operand
        match operand:
            case Lit(value):
                return Constant(Literal(value))
            case Path(text):
                return self._identifier(text)
            case Call():
                return self._call(operand)

    def _identifier(self, text: str) -> Term:
        """Macros first, then fields, and only then keywords: a field called true wins."""
        if text in MACROS:
            return Constant(MACROS[text])
        try:
            return self._path(text)
        except RuleError:
            keyword = text.lower()
            if keyword in _KEYWORDS:
                return Keyword(_KEYWORDS[keyword])
            raise

    # --- functions

    def _call(self, call: Call) -> Term:
        guards = len(self._guards)
        match call.name:
            case "geoDistance":
                term = self._geo_distance(call)
            case "strftime":
                term = self._strftime(call)
            case _:
                return self._unknown("function", call.name, ("geoDistance", "strftime"))
        # What a function makes of an address is no address: PocketBase asks nobody.
        del self._guards[guards:]
        return term

    def _geo_distance(self, call: Call) -> Term:
        if len(call.args) != 4:  # noqa: PLR2004 (two points of two numbers)
            self._refuse(f"geoDistance takes 4 arguments, got {len(call.args)}")
        for arg in call.args:
            if isinstance(arg, Call) or (isinstance(arg, Lit) and isinstance(arg.value, str)):
                self._refuse("arguments of geoDistance are identifiers or numbers")
        one, two, three, four = (self._operand(arg) for arg in call.args)
        return GeoDistance((one, two, three, four))

    def _strftime(self, call: Call) -> Term:
        if not 1 <= len(call.args) <= MAX_STRFTIME_ARGUMENTS:
            self._refuse(
                f"strftime takes 1 to {MAX_STRFTIME_ARGUMENTS} arguments, got {len(call.args)}"
            )
        layout, *rest = call.args
        if not isinstance(layout, Lit) or not isinstance(layout.value, str):
            self._refuse("the first argument of strftime is a text, the format")
        modifiers: list[str] = []
        for arg in rest[1:]:
            if not isinstance(arg, Lit) or not isinstance(arg.value, str):
                self._refuse("modifiers of strftime are texts")
            modifiers.append(arg.value)
        if rest and isinstance(rest[0], Call):
            self._refuse("the time of strftime is an identifier, a text or a number")
        time = self._operand(rest[0]) if rest else None
        return Strftime(layout.value, time, tuple(modifiers))

    # --- paths

    def _path(self, text: str) -> Term:
        if _ALLOWED.fullmatch(text) is None:
            return self._unknown("field", text, [*self._collection.by_name, *MACROS])
        parts = text.split(".")
        match parts:
            case ["@collection", name, *rest]:
                return self._walk(self._all_rows(name), rest)
            case ["@request", "auth", *rest]:
                return self._auth_path(rest)
            case ["@request", "body", *rest]:
                return self._body_path(rest)
            case ["@request", *rest]:
                return self._request_value(rest)
            case _:
                return self._walk(Place(Here(self._collection.name)), parts)

    def _all_rows(self, text: str) -> Place:
        name, _, alias = text.partition(":")
        collection = self._named(name)
        if collection is None:
            self._unknown("collection", name, self._collections)
        if alias and self._aliases.setdefault(alias, collection.name) != collection.name:
            self._unsupported(f'alias "{alias}" stands for two collections')
        return self._join(Place(AllRows(collection.name, alias or None)))

    def _named(self, name_or_id: str) -> Collection | None:
        """The collection of that id or name; PocketBase ignores the name's case here."""
        found = self._collections.find(name_or_id)
        if found is not None:
            return found
        wanted = name_or_id.lower()
        return next((c for c in self._collections.values() if c.name.lower() == wanted), None)

    def _auth_path(self, parts: list[str]) -> Term:
        if len(parts) == 1 and parts[0] in _PLAIN:
            return Constant(RequestValue(("auth", parts[0])))
        if self._auth is None:
            return Keyword(None)
        place = self._join(Place(AuthRow(self._auth.name)))
        return self._walk(place, parts, nullify=True)

    def _body_path(self, parts: list[str]) -> Term:
        """What a request's body holds: in realtime nothing."""
        name, modifier = self._split(parts[0])
        field = self._collection.by_name.get(name)
        if field is None:
            return self._request_value(["body", *parts])
        if len(parts) > 1:
            is_relation = field.kind is FieldKind.RELATION
            return Keyword(None) if is_relation else self._request_value(["body", *parts])
        if modifier in {"each", "length"} and not _holds_values(field):
            self._refuse(f'field "{name}" has no values to count')
        match modifier:
            case "isset":
                return Constant(RequestValue(("body", name), is_set=True))
            case "changed" | "length":
                return Keyword(False)
            case "lower":
                return Constant(Literal(""))
            case "each":
                return NoItem(field.is_multiple)
            case _:
                return Keyword(None)

    def _request_value(self, parts: list[str]) -> Term:
        """A value that is known with the subscription."""
        last, modifier = self._split(parts[-1])
        if modifier not in {"", "isset", "lower"}:
            self._refuse(f'":{modifier}" is not for "@request.{parts[0]}"')
        field = self._collection.by_name.get(last)
        plain = RequestValue(
            (*parts[:-1], last),
            as_number=field is not None
            and field.kind is FieldKind.NUMBER
            and not field.is_multiple,
        )
        match modifier:
            case "isset":
                return Constant(replace(plain, as_number=False, is_set=True))
            case "lower":
                return Constant(replace(plain, is_lower=True))
            case _:
                return Constant(plain)

    def _walk(self, place: Place, parts: list[str], *, nullify: bool = False) -> Term:
        """Follow the parts from a place to a value.

        Args:
            place: Where the path begins.
            parts: Names of relations, and last of a field with its modifier.
            nullify: What isn't there is NULL and no error, as under ``@request.auth``.
        """
        for index, part in enumerate(parts[:-1]):
            collection = self._collections[place.collection]
            field = self._field(collection, part)
            if field is not None and field.kind in {FieldKind.JSON, FieldKind.GEO}:
                self._check(field)
                return self._json(place, field, parts[index + 1 :])
            if index >= MAX_HOPS:
                self._refuse(f"a path takes at most {MAX_HOPS} relations")
            if field is None:
                back = self._back(collection, part, nullify=nullify)
                if back is None:
                    return Keyword(None)
                place = self._join(place.to(back))
                continue
            if field.relation is None:
                self._refuse(f'field "{part}" is no relation')
            if not field.is_multiple and parts[index + 1 :] == ["id"]:
                return FieldValue(place, self._check(field))
            target = self._collections[field.relation.collection].name
            if field.is_multiple:
                place = self._join(place.to(Items(field), ToItem(target)))
            else:
                place = self._join(place.to(ToOne(field, target)))
        return self._last(place, parts[-1], nullify=nullify)

    def _back(self, collection: Collection, part: str, *, nullify: bool) -> Back | None:
        """Return the step over a back relation; None if there is none and that is no error."""
        found = _BACK.fullmatch(part)
        source = None if found is None else self._named(found[1])
        field = None if found is None or source is None else self._field(source, found[2])
        if field is not None and (
            field.relation is None or (field.relation.collection != collection.name and not nullify)
        ):
            self._refuse(f'"{part}" doesn\'t point to "{collection.name}"')
        if (
            source is None
            or field is None
            or field.relation is None
            or field.relation.collection != collection.name
        ):
            if nullify:
                return None
            return self._unknown("field", part, _paths(self._collections, collection))
        is_unique = (
            not field.is_multiple
            and field.column is not None
            and (field.column.name,) in source.table.unique
        )
        return Back(source.name, field, is_unique)

    def _json(self, place: Place, field: Field, keys: list[str]) -> Term:
        if field.is_multiple:
            self._unsupported(f'field "{field.name}" holds several values, which have no keys')
        if field.kind is FieldKind.GEO and not field.is_stored_as_json and len(keys) != 1:
            return Keyword(None)
        return JsonValue(place, field, tuple(key.replace(":", "") for key in keys))

    def _last(self, place: Place, part: str, *, nullify: bool) -> Term:
        """The field that ends a path, with its modifier."""
        name, modifier = self._split(part)
        collection = self._collections[place.collection]
        field = self._field(collection, name)
        if field is None:
            if collection.type == "auth" and name in {"password", "tokenKey"}:
                return self._secret(place, name, modifier)
            if nullify:
                return Keyword(None)
            known = _paths(self._collections, collection)
            if name in known:
                self._refuse_name(f'"{name}" needs a field', hint=f'Perhaps you meant "{name}.id".')
            self._unknown("field", name, known)
        self._check(field)
        if modifier == "length" and _holds_values(field):
            return FieldValue(place, field, Part.LENGTH)
        if modifier == "each" and _holds_values(field):
            if field.is_multiple:
                return Item(place.to(Items(field)))
            return FieldValue(place, field, Part.EACH)
        if name == "email" and self._is_filter and collection.type == "auth":
            self._guard_email(place, collection)
        is_lower = modifier == "lower"
        if field.kind is FieldKind.JSON and not field.is_multiple:
            return JsonValue(place, field, (), is_lower=is_lower)
        return FieldValue(place, field, Part.LOWER if is_lower else Part.WHOLE)

    def _secret(self, place: Place, name: str, modifier: str) -> Term:
        if self._is_filter:
            self._refuse_name(f'field "{name}" is hidden')
        return Hidden(place, Part.LOWER if modifier == "lower" else Part.WHOLE)

    def _guard_email(self, place: Place, collection: Collection) -> None:
        """A filter finds an address only where its owner shows it."""
        visible = collection.by_name.get("emailVisibility")
        shown: Term = Keyword(False) if visible is None else FieldValue(place, visible)
        self._guards.append(Comparison(shown, Op.EQ, True, Keyword(True)))

    # --- names

    def _field(self, collection: Collection, name: str) -> Field | None:
        field = collection.by_name.get(name)
        if field is not None and self._is_filter and (field.is_hidden or field.is_secret):
            self._refuse_name(f'field "{name}" is hidden')
        return field

    def _check(self, field: Field) -> Field:
        """Refuse fields that have no meaning in the language."""
        base = field.type.base
        element = base if base.element is None else base.element.base
        if (
            field.kind in {FieldKind.BYTES, FieldKind.COMPOSITE, FieldKind.GEOMETRY}
            or element.name in _REFUSED_TYPES
            or (field.kind is FieldKind.GEO and field.is_multiple)
        ):
            self._unsupported(
                f'field "{field.name}" of type {base.name} can\'t be used in rules',
                hint="Show it as geoPoint (fields.types) to use its lon and lat."
                if field.kind is FieldKind.GEOMETRY and not field.is_multiple
                else "",
            )
        return field

    def _join(self, place: Place) -> Place:
        """Note that the place's rows are read; refuse those that a filter may not reach."""
        if self._is_filter and place not in self._joined:
            for joined in place.joined():
                if self._collections[joined.collection].list_rule is None:
                    self._refuse_name(f'collection "{joined.collection}" can\'t be listed')
                self._joined.setdefault(joined)
        return place

    def _split(self, part: str) -> tuple[str, str]:
        """Take the modifier off; with more than one colon it is all a name."""
        name, colon, modifier = part.partition(":")
        if not colon or ":" in modifier:
            return part, ""
        if modifier not in _MODIFIERS:
            self._unknown("modifier", modifier, _MODIFIERS)
        return name, modifier

    # --- errors

    def _refuse(self, message: str) -> NoReturn:
        raise RuleSyntaxError(message, start=self._at.start, end=self._at.end)

    def _refuse_name(self, message: str, *, hint: str = "") -> NoReturn:
        raise RuleNameError(message, start=self._at.start, end=self._at.end, hint=hint)

    def _unsupported(self, message: str, *, hint: str = "") -> NoReturn:
        raise RuleUnsupportedError(message, start=self._at.start, end=self._at.end, hint=hint)

    def _unknown(self, what: str, name: str, known: Iterable[str]) -> NoReturn:
        meant = nearest(name, known) if len(name) <= _MAX_GUESSED else None
        hint = "" if meant is None else f'Perhaps you meant "{meant}".'
        raise RuleNameError(
            f'there is no {what} "{name}"', start=self._at.start, end=self._at.end, hint=hint
        )


def _holds_values(field: Field) -> bool:
    """Whether ``:each`` and ``:length`` mean something: PocketBase's selects, relations, files."""
    return (
        field.is_multiple or field.is_select or field.kind in {FieldKind.RELATION, FieldKind.FILE}
    )


def _paths(collections: Collections, collection: Collection) -> list[str]:
    """The names that a path may go on with from a row of the collection, for suggestions."""
    back = [
        f"{source.name}_via_{field.name}"
        for source in collections.values()
        for field in source.fields
        if field.relation is not None and field.relation.collection == collection.name
    ]
    return [field.name for field in collection.fields] + back
