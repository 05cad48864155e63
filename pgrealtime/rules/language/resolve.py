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
from pgrealtime.rules.language.parameters import MACROS, LiteralParameter, RequestValue
from pgrealtime.rules.language.predicate import (
    AbsentEach,
    BackRelation,
    CallerRow,
    CollectionRows,
    Comparison,
    Condition,
    Conjunction,
    Disjunction,
    EachTerm,
    EachValue,
    FieldValue,
    GeoDistance,
    JsonValue,
    Keyword,
    Modifier,
    NestedRule,
    ParameterTerm,
    Predicate,
    RowPath,
    ScopeRow,
    SecretTerm,
    Strftime,
    Term,
    ToEach,
    ToOne,
    comparisons,
)
from pgrealtime.rules.language.syntax import (
    AndNode,
    CallNode,
    ComparisonNode,
    ExpressionNode,
    IdentifierNode,
    LiteralNode,
    Op,
    OperandNode,
    OrNode,
    parse_expression,
)
from pgrealtime.spelling import nearest_name

MAX_HOPS = 6
"""PocketBase's own limit of relations in one path."""
MAX_FILTER_BYTES = 3500
"""PocketBase's own limit for lists; a topic can't carry more anyway."""
MAX_STRFTIME_ARGUMENTS = 10
"""PocketBase's own limit."""


def resolve_rule(
    text: str, collections: Collections, collection: Collection, auth_collection: Collection | None
) -> Predicate:
    """Return what the rule means for subscribers of one auth collection.

    Args:
        text: The rule, not empty.
        collections: All there are.
        collection: The one whose rows are judged.
        auth_collection: The collection of the subscriber's record; None for a guest, or if there is
            none of that name: then paths of ``@request.auth`` are NULL.

    Raises:
        RuleError: The text is not of the language, names what isn't there or asks for what can't
            be decided exactly. Paths of ``@request.auth`` are checked for this ``auth`` only.
    """
    resolver = _Resolver(collections, collection, auth_collection, is_filter=False)
    return _make_predicate(collection, resolver.resolve_condition(parse_expression(text)))


def resolve_filter(
    text: str,
    collections: Collections,
    collection: Collection,
    auth_collection: Collection | None,
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
        _refuse_superuser_identifiers(text)
    resolver = _Resolver(collections, collection, auth_collection, is_filter=True)
    where = resolver.resolve_condition(parse_expression(text))
    conditions = [where, *resolver.list_rule_conditions()]
    joined = where if len(conditions) == 1 else Conjunction(tuple(conditions))
    return _make_predicate(collection, joined)


def filter_text(query: Mapping[str, str], *, is_superuser: bool) -> str:
    """Return the client's filter, empty if there is none.

    A sort means nothing here, but PocketBase looks at it wherever there is a filter.

    Raises:
        RuleNameError: The sort has a word that only superusers may use.
    """
    text = query.get("filter", "")
    if text and not is_superuser:
        _refuse_superuser_identifiers(query.get("sort", ""))
    return text


def _refuse_superuser_identifiers(text: str) -> None:
    for banned in ("@request.", "@collection."):
        if banned in text:
            start = text.index(banned)
            raise RuleNameError(
                f'"{banned}" is not for client filters', start=start, end=start + len(banned)
            )


def _make_predicate(collection: Collection, where: Condition) -> Predicate:
    """Return the predicate; one that PocketBase fails to evaluate admits nothing.

    A list of items that is made a pattern is no list any more, and that breaks all of its query.
    """
    breaks = any(
        cmp.op in {Op.LIKE, Op.NOT_LIKE} and isinstance(cmp.right, AbsentEach)
        for cmp in comparisons(where)
    )
    return Predicate(collection=collection.name, where=_ALWAYS_FALSE if breaks else where)


_ALWAYS_FALSE = Comparison(Keyword(False), Op.EQ, True, Keyword(True))


_ALLOWED_IDENTIFIER = re.compile(
    r"\w+[\w.:]*"
    r"|@request\.context|@request\.method"
    r"|@request\.(?:auth|body|query|headers)\.[\w.:]*\w+"
    r"|@collection\.\w+(?::\w+)?\.[\w.:]*\w+",
    re.ASCII,
)
_BACK_RELATION = re.compile(r"(\w+)_via_(\w+)", re.ASCII)
_MODIFIERS = {"isset", "changed", "each", "length", "lower"}
_PRINCIPAL_FIELDS = {"id", "collectionId", "collectionName", "email", "emailVisibility", "verified"}
"""Fields of ``@request.auth`` that come with the authentication, without asking the database."""
_KEYWORDS = {"null": None, "true": True, "false": False}
_MAX_SUGGESTION_LENGTH = 100
"""Longer names get no suggestion: comparing is quadratic in their length."""
_UNSUPPORTED_TYPES = {"money", "refcursor", "hstore"}


class _Resolver:
    """Resolves one scope: all of its paths begin at the row of ``collection``."""

    def __init__(
        self,
        collections: Collections,
        collection: Collection,
        auth_collection: Collection | None,
        *,
        is_filter: bool,
    ) -> None:
        self._collections = collections
        self._collection = collection
        self._auth_collection = auth_collection
        self._is_filter = is_filter
        self._aliases: dict[str, str] = {}
        self._joined_paths: dict[RowPath, None] = {}
        self._email_conditions: list[Comparison] = []
        self._current_operand: OperandNode = IdentifierNode("", 0, 0)

    # --- expressions

    def resolve_condition(self, expression: ExpressionNode) -> Condition:
        match expression:
            case ComparisonNode():
                return self._resolve_comparison(expression)
            case AndNode(parts):
                return Conjunction(tuple(self.resolve_condition(part) for part in parts))
            case OrNode(parts):
                return Disjunction(tuple(self.resolve_condition(part) for part in parts))

    def list_rule_conditions(self) -> list[Condition]:
        """What the collections joined so far demand of their rows, missing ones excepted."""
        demands: list[Condition] = []
        for place in self._joined_paths:
            collection = self._collections[place.collection]
            if not collection.list_rule:
                continue
            inner = _Resolver(self._collections, collection, self._auth_collection, is_filter=False)
            where = inner.resolve_condition(parse_expression(collection.list_rule))
            missing = Comparison(
                FieldValue(place, collection.fields_by_name["id"]),
                Op.EQ,
                True,
                ParameterTerm(LiteralParameter("")),
            )
            demands.append(Disjunction((missing, NestedRule(place, where))))
        return demands

    def _resolve_comparison(self, cmp: ComparisonNode) -> Condition:
        self._email_conditions = []
        left = self._resolve_operand(cmp.left)
        right = self._resolve_operand(cmp.right)
        leaf = Comparison(left, cmp.op, cmp.is_any, right, cmp.start, cmp.end)
        return Conjunction((leaf, *self._email_conditions)) if self._email_conditions else leaf

    def _resolve_operand(self, operand: OperandNode) -> Term:
        self._current_operand = operand
        match operand:
            case LiteralNode(value):
                return ParameterTerm(LiteralParameter(value))
            case IdentifierNode(text):
                return self._resolve_identifier(text)
            case CallNode():
                return self._resolve_call(operand)

    def _resolve_identifier(self, text: str) -> Term:
        """Macros first, then fields, and only then keywords: a field called true wins."""
        if text in MACROS:
            return ParameterTerm(MACROS[text])
        try:
            return self._resolve_path(text)
        except RuleError:
            keyword = text.lower()
            if keyword in _KEYWORDS:
                return Keyword(_KEYWORDS[keyword])
            raise

    # --- functions

    def _resolve_call(self, call: CallNode) -> Term:
        guards = len(self._email_conditions)
        match call.name:
            case "geoDistance":
                term = self._geo_distance(call)
            case "strftime":
                term = self._strftime(call)
            case _:
                return self._refuse_unknown("function", call.name, ("geoDistance", "strftime"))
        # What a function makes of an address is no address: PocketBase asks nobody.
        del self._email_conditions[guards:]
        return term

    def _geo_distance(self, call: CallNode) -> Term:
        if len(call.args) != 4:  # noqa: PLR2004 (two points of two numbers)
            self._refuse(f"geoDistance takes 4 arguments, got {len(call.args)}")
        for arg in call.args:
            if isinstance(arg, CallNode) or (
                isinstance(arg, LiteralNode) and isinstance(arg.value, str)
            ):
                self._refuse("arguments of geoDistance are identifiers or numbers")
        one, two, three, four = (self._resolve_operand(arg) for arg in call.args)
        return GeoDistance((one, two, three, four))

    def _strftime(self, call: CallNode) -> Term:
        if not 1 <= len(call.args) <= MAX_STRFTIME_ARGUMENTS:
            self._refuse(
                f"strftime takes 1 to {MAX_STRFTIME_ARGUMENTS} arguments, got {len(call.args)}"
            )
        layout, *rest = call.args
        if not isinstance(layout, LiteralNode) or not isinstance(layout.value, str):
            self._refuse("the first argument of strftime is a text, the format")
        modifiers: list[str] = []
        for arg in rest[1:]:
            if not isinstance(arg, LiteralNode) or not isinstance(arg.value, str):
                self._refuse("modifiers of strftime are texts")
            modifiers.append(arg.value)
        if rest and isinstance(rest[0], CallNode):
            self._refuse("the time of strftime is an identifier, a text or a number")
        time = self._resolve_operand(rest[0]) if rest else None
        return Strftime(layout.value, time, tuple(modifiers))

    # --- paths

    def _resolve_path(self, text: str) -> Term:
        if _ALLOWED_IDENTIFIER.fullmatch(text) is None:
            return self._refuse_unknown("field", text, [*self._collection.fields_by_name, *MACROS])
        parts = text.split(".")
        match parts:
            case ["@collection", name, *rest]:
                return self._follow_path(self._collection_rows(name), rest)
            case ["@request", "auth", *rest]:
                return self._auth_path(rest)
            case ["@request", "body", *rest]:
                return self._body_path(rest)
            case ["@request", *rest]:
                return self._request_value(rest)
            case _:
                return self._follow_path(RowPath(ScopeRow(self._collection.name)), parts)

    def _collection_rows(self, text: str) -> RowPath:
        name, _, alias = text.partition(":")
        collection = self._find_collection(name)
        if collection is None:
            self._refuse_unknown("collection", name, self._collections)
        if alias and self._aliases.setdefault(alias, collection.name) != collection.name:
            self._refuse_unsupported(f'alias "{alias}" stands for two collections')
        return self._record_joins(RowPath(CollectionRows(collection.name, alias or None)))

    def _find_collection(self, name_or_id: str) -> Collection | None:
        """The collection of that id or name; PocketBase ignores the name's case here."""
        found = self._collections.find(name_or_id)
        if found is not None:
            return found
        wanted = name_or_id.lower()
        return next((c for c in self._collections.values() if c.name.lower() == wanted), None)

    def _auth_path(self, parts: list[str]) -> Term:
        if len(parts) == 1 and parts[0] in _PRINCIPAL_FIELDS:
            return ParameterTerm(RequestValue(("auth", parts[0])))
        if self._auth_collection is None:
            return Keyword(None)
        place = self._record_joins(RowPath(CallerRow(self._auth_collection.name)))
        return self._follow_path(place, parts, is_missing_null=True)

    def _body_path(self, parts: list[str]) -> Term:
        """What a request's body holds: in realtime nothing."""
        name, modifier = self._split_modifier(parts[0])
        field = self._collection.fields_by_name.get(name)
        if field is None:
            return self._request_value(["body", *parts])
        if len(parts) > 1:
            is_relation = field.kind is FieldKind.RELATION
            return Keyword(None) if is_relation else self._request_value(["body", *parts])
        if modifier in {"each", "length"} and not _has_countable_values(field):
            self._refuse(f'field "{name}" has no values to count')
        match modifier:
            case "isset":
                return ParameterTerm(RequestValue(("body", name), is_isset=True))
            case "changed" | "length":
                return Keyword(False)
            case "lower":
                return ParameterTerm(LiteralParameter(""))
            case "each":
                return AbsentEach(field.is_multiple)
            case _:
                return Keyword(None)

    def _request_value(self, parts: list[str]) -> Term:
        """A value that is known with the subscription."""
        last, modifier = self._split_modifier(parts[-1])
        if modifier not in {"", "isset", "lower"}:
            self._refuse(f'":{modifier}" is not for "@request.{parts[0]}"')
        field = self._collection.fields_by_name.get(last)
        plain = RequestValue(
            (*parts[:-1], last),
            is_read_as_number=field is not None
            and field.kind is FieldKind.NUMBER
            and not field.is_multiple,
        )
        match modifier:
            case "isset":
                return ParameterTerm(replace(plain, is_read_as_number=False, is_isset=True))
            case "lower":
                return ParameterTerm(replace(plain, is_lower=True))
            case _:
                return ParameterTerm(plain)

    def _follow_path(
        self, start: RowPath, parts: list[str], *, is_missing_null: bool = False
    ) -> Term:
        """Follow the parts from a place to a value.

        Args:
            start: Where the path begins.
            parts: Names of relations, and last of a field with its modifier.
            is_missing_null: What isn't there is NULL and no error, as under ``@request.auth``.
        """
        for index, part in enumerate(parts[:-1]):
            collection = self._collections[start.collection]
            field = self._find_field(collection, part)
            if field is not None and field.kind in {FieldKind.JSON, FieldKind.GEO_POINT}:
                self._check_supported(field)
                return self._json_value(start, field, parts[index + 1 :])
            if index >= MAX_HOPS:
                self._refuse(f"a path takes at most {MAX_HOPS} relations")
            if field is None:
                back = self._back_relation(collection, part, is_missing_null=is_missing_null)
                if back is None:
                    return Keyword(None)
                start = self._record_joins(start.extended_by(back))
                continue
            if field.relation is None:
                self._refuse(f'field "{part}" is no relation')
            if not field.is_multiple and parts[index + 1 :] == ["id"]:
                return FieldValue(start, self._check_supported(field))
            target = self._collections[field.relation.collection].name
            if field.is_multiple:
                start = self._record_joins(start.extended_by(EachValue(field), ToEach(target)))
            else:
                start = self._record_joins(start.extended_by(ToOne(field, target)))
        return self._last_field(start, parts[-1], is_missing_null=is_missing_null)

    def _back_relation(
        self, collection: Collection, part: str, *, is_missing_null: bool
    ) -> BackRelation | None:
        """Return the step over a back relation; None if there is none and that is no error."""
        found = _BACK_RELATION.fullmatch(part)
        source = None if found is None else self._find_collection(found[1])
        field = None if found is None or source is None else self._find_field(source, found[2])
        if field is not None and (
            field.relation is None
            or (field.relation.collection != collection.name and not is_missing_null)
        ):
            self._refuse(f'"{part}" doesn\'t point to "{collection.name}"')
        if (
            source is None
            or field is None
            or field.relation is None
            or field.relation.collection != collection.name
        ):
            if is_missing_null:
                return None
            return self._refuse_unknown("field", part, _path_names(self._collections, collection))
        is_unique = (
            not field.is_multiple
            and field.column is not None
            and (field.column.name,) in source.table.unique_keys
        )
        return BackRelation(source.name, field, is_unique)

    def _json_value(self, path: RowPath, field: Field, keys: list[str]) -> Term:
        if field.is_multiple:
            self._refuse_unsupported(
                f'field "{field.name}" holds several values, which have no keys'
            )
        if field.kind is FieldKind.GEO_POINT and not field.is_stored_as_json and len(keys) != 1:
            return Keyword(None)
        return JsonValue(path, field, tuple(key.replace(":", "") for key in keys))

    def _last_field(self, path: RowPath, part: str, *, is_missing_null: bool) -> Term:
        """The field that ends a path, with its modifier."""
        name, modifier = self._split_modifier(part)
        collection = self._collections[path.collection]
        field = self._find_field(collection, name)
        if field is None:
            if collection.type == "auth" and name in {"password", "tokenKey"}:
                return self._secret_term(path, name, modifier)
            if is_missing_null:
                return Keyword(None)
            known = _path_names(self._collections, collection)
            if name in known:
                self._refuse_name(f'"{name}" needs a field', hint=f'Perhaps you meant "{name}.id".')
            self._refuse_unknown("field", name, known)
        self._check_supported(field)
        if modifier == "length" and _has_countable_values(field):
            return FieldValue(path, field, Modifier.LENGTH)
        if modifier == "each" and _has_countable_values(field):
            if field.is_multiple:
                return EachTerm(path.extended_by(EachValue(field)))
            return FieldValue(path, field, Modifier.EACH)
        if name == "email" and self._is_filter and collection.type == "auth":
            self._require_visible_email(path, collection)
        is_lower = modifier == "lower"
        if field.kind is FieldKind.JSON and not field.is_multiple:
            return JsonValue(path, field, (), is_lower=is_lower)
        return FieldValue(path, field, Modifier.LOWER if is_lower else Modifier.WHOLE)

    def _secret_term(self, path: RowPath, name: str, modifier: str) -> Term:
        if self._is_filter:
            self._refuse_name(f'field "{name}" is hidden')
        return SecretTerm(path, Modifier.LOWER if modifier == "lower" else Modifier.WHOLE)

    def _require_visible_email(self, path: RowPath, collection: Collection) -> None:
        """A filter finds an address only where its owner shows it."""
        visible = collection.fields_by_name.get("emailVisibility")
        shown: Term = Keyword(False) if visible is None else FieldValue(path, visible)
        self._email_conditions.append(Comparison(shown, Op.EQ, True, Keyword(True)))

    # --- names

    def _find_field(self, collection: Collection, name: str) -> Field | None:
        field = collection.fields_by_name.get(name)
        if field is not None and self._is_filter and (field.is_hidden or field.is_secret):
            self._refuse_name(f'field "{name}" is hidden')
        return field

    def _check_supported(self, field: Field) -> Field:
        """Refuse fields that have no meaning in the language."""
        base = field.type.base
        element = base if base.element is None else base.element.base
        if (
            field.kind in {FieldKind.BYTES, FieldKind.COMPOSITE, FieldKind.GEOMETRY}
            or element.name in _UNSUPPORTED_TYPES
            or (field.kind is FieldKind.GEO_POINT and field.is_multiple)
        ):
            self._refuse_unsupported(
                f'field "{field.name}" of type {base.name} can\'t be used in rules',
                hint="Show it as geoPoint (fields.types) to use its lon and lat."
                if field.kind is FieldKind.GEOMETRY and not field.is_multiple
                else "",
            )
        return field

    def _record_joins(self, path: RowPath) -> RowPath:
        """Note that the place's rows are read; refuse those that a filter may not reach."""
        if self._is_filter and path not in self._joined_paths:
            for joined in path.joined_rows():
                if self._collections[joined.collection].list_rule is None:
                    self._refuse_name(f'collection "{joined.collection}" can\'t be listed')
                self._joined_paths.setdefault(joined)
        return path

    def _split_modifier(self, part: str) -> tuple[str, str]:
        """Take the modifier off; with more than one colon it is all a name."""
        name, colon, modifier = part.partition(":")
        if not colon or ":" in modifier:
            return part, ""
        if modifier not in _MODIFIERS:
            self._refuse_unknown("modifier", modifier, _MODIFIERS)
        return name, modifier

    # --- errors

    def _refuse(self, message: str) -> NoReturn:
        raise RuleSyntaxError(
            message, start=self._current_operand.start, end=self._current_operand.end
        )

    def _refuse_name(self, message: str, *, hint: str = "") -> NoReturn:
        raise RuleNameError(
            message, start=self._current_operand.start, end=self._current_operand.end, hint=hint
        )

    def _refuse_unsupported(self, message: str, *, hint: str = "") -> NoReturn:
        raise RuleUnsupportedError(
            message, start=self._current_operand.start, end=self._current_operand.end, hint=hint
        )

    def _refuse_unknown(self, what: str, name: str, known: Iterable[str]) -> NoReturn:
        meant = nearest_name(name, known) if len(name) <= _MAX_SUGGESTION_LENGTH else None
        hint = "" if meant is None else f'Perhaps you meant "{meant}".'
        raise RuleNameError(
            f'there is no {what} "{name}"',
            start=self._current_operand.start,
            end=self._current_operand.end,
            hint=hint,
        )


def _has_countable_values(field: Field) -> bool:
    """Whether ``:each`` and ``:length`` apply: PocketBase's selects, relations and files."""
    return (
        field.is_multiple or field.is_select or field.kind in {FieldKind.RELATION, FieldKind.FILE}
    )


def _path_names(collections: Collections, collection: Collection) -> list[str]:
    """The names that a path may go on with from a row of the collection, for suggestions."""
    back = [
        f"{source.name}_via_{field.name}"
        for source in collections.values()
        for field in source.fields
        if field.relation is not None and field.relation.collection == collection.name
    ]
    return [field.name for field in collection.fields] + back
