"""Resolves the names of a rule or filter against the collections: from syntax to a predicate.

A rule may read every field. A client's filter may read only what its sender can see anyway: no
hidden fields, and rows of other collections only as their list rules admit them. What isn't
supported is refused here, with its place in the text.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NoReturn

from pgrealtime.collections.model import Collection, Collections, Field, FieldKind
from pgrealtime.errors import RuleError, RuleNameError, RuleSyntaxError, RuleUnsupportedError
from pgrealtime.rules.language import syntax
from pgrealtime.rules.language.parameters import (
    MACROS,
    PRINCIPAL_FIELDS,
    LiteralParameter,
    RequestValue,
)
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
    row_path_of,
)
from pgrealtime.spelling import nearest_name

MAX_HOPS = 6
"""PocketBase's limit of relations in one path."""
MAX_FILTER_BYTES = 3500
"""PocketBase's limit for lists; a topic can't be longer anyway."""
MAX_STRFTIME_ARGUMENTS = 10
"""PocketBase's limit."""


def resolve_rule(
    text: str, collections: Collections, collection: Collection, auth_collection: Collection | None
) -> Predicate:
    """Return the rule, which is not empty, resolved for callers of one auth collection.

    That is None for a guest, and for a record of an unknown collection: then paths of
    ``@request.auth`` are NULL.

    Raises:
        RuleError: The text is not of the language, names something unknown, or can't be evaluated
            exactly. Paths of ``@request.auth`` are checked for this ``auth_collection`` only.
    """
    resolver = Resolver(collections, collection, auth_collection)
    return _make_predicate(collection, resolver.resolve_condition(syntax.parse_expression(text)))


def resolve_filter(
    text: str,
    collections: Collections,
    collection: Collection,
    auth_collection: Collection | None,
    *,
    is_superuser: bool = False,
) -> Predicate:
    """Return a client's filter resolved, with the list rules of the collections that it joins.

    Superusers may name ``@request`` and ``@collection``; nothing else is different for them, as in
    PocketBase's realtime.

    Raises:
        RuleError: As for rules; or the filter reads what its sender may not see.
    """
    if len(text.encode("utf-8", "replace")) > MAX_FILTER_BYTES:
        message = f"a filter takes at most {MAX_FILTER_BYTES} bytes"
        raise RuleSyntaxError(message, start=0, end=len(text))
    if not is_superuser:
        _refuse_superuser_identifiers(text)
    resolver = Resolver(
        collections, collection, auth_collection, is_filter=True, is_superuser=is_superuser
    )
    where = resolver.resolve_condition(syntax.parse_expression(text))
    if list_rules := resolver.list_rule_conditions():
        where = Conjunction((where, *list_rules))
    return _make_predicate(collection, where)


def filter_text(query: Mapping[str, str], *, is_superuser: bool) -> str:
    """Return the client's filter, empty if there is none.

    A sort key has no meaning in realtime, but PocketBase checks it wherever there is a filter.

    Raises:
        RuleNameError: The sort has a word that only superusers may use.
    """
    text = query.get("filter", "")
    if text and not is_superuser:
        _refuse_superuser_identifiers(query.get("sort", ""))
    return text


def _refuse_superuser_identifiers(text: str) -> None:
    # Within quotes and comments too, as in PocketBase: it searches the text before parsing it.
    for banned in ("@request.", "@collection."):
        if banned in text:
            start = text.index(banned)
            message = f'"{banned}" can\'t be used in client filters'
            raise RuleNameError(message, start=start, end=start + len(banned))


def _make_predicate(collection: Collection, where: Condition) -> Predicate:
    """Return the predicate; one whose query fails in PocketBase admits nothing.

    PocketBase makes a LIKE pattern of the JSON array of ``:each``, which is no array any more.
    """
    is_broken = is_always_broken(where)
    return Predicate(collection_name=collection.name, where=_ALWAYS_FALSE if is_broken else where)


def is_always_broken(condition: Condition) -> bool:
    """Whether PocketBase's query for the condition fails, whatever the rows."""
    return any(
        comparison.op in {syntax.Op.LIKE, syntax.Op.NOT_LIKE}
        and isinstance(comparison.right, AbsentEach)
        for comparison in comparisons(condition)
    )


_ALWAYS_FALSE = Comparison(Keyword(False), syntax.Op.EQ, True, Keyword(True))


_ALLOWED_IDENTIFIER = re.compile(
    r"\w+[\w.:]*"
    r"|@request\.context|@request\.method"
    r"|@request\.(?:auth|body|query|headers)\.[\w.:]*\w+"
    r"|@collection\.\w+(?::\w+)?\.[\w.:]*\w+",
    re.ASCII,
)
_BACK_RELATION = re.compile(r"(\w+)_via_(\w+)", re.ASCII)
_MODIFIERS = {"isset", "changed", "each", "length", "lower"}
_KEYWORDS = {"null": None, "true": True, "false": False}
_MAX_SUGGESTION_LENGTH = 100
"""Longer names get no suggestion: the comparison is quadratic in their length."""
_UNSUPPORTED_TYPES = {"money", "refcursor", "hstore"}


@dataclass(slots=True)
class Resolver:
    """Resolves one scope: its paths begin at a row of ``collection``, unless they say otherwise.

    ``is_filter``: the text is a client's; ``is_superuser``: that client is one. ``has_body``: the
    request has a body, as a subscription's never has.
    """

    collections: Collections
    collection: Collection
    auth_collection: Collection | None
    is_filter: bool = False
    is_superuser: bool = False
    has_body: bool = False
    aliases: dict[str, str] = field(default_factory=dict)
    joined_paths: dict[RowPath, None] = field(default_factory=dict)
    email_conditions: list[Comparison] = field(default_factory=list)
    list_rules: dict[RowPath, NestedRule] = field(default_factory=dict)
    current_operand: syntax.OperandNode = field(init=False)

    @property
    def hides_values(self) -> bool:
        """Whether no answer may tell a value that the text's author can't see."""
        return self.collections.is_strict and not self.is_superuser

    # --- expressions

    def resolve_condition(self, expression: syntax.ExpressionNode) -> Condition:
        """Return the expression with its names resolved."""
        match expression:
            case syntax.ComparisonNode():
                return self._resolve_comparison(expression)
            case syntax.AndNode(parts):
                return Conjunction(tuple(self.resolve_condition(part) for part in parts))
            case syntax.OrNode(parts):
                return Disjunction(tuple(self.resolve_condition(part) for part in parts))

    def resolve_sort_path(self, text: str) -> tuple[Term, Comparison | None]:
        """Return the term that a sort key names, and whether the address that it reads is shown.

        Raises:
            RuleError: It names nothing that a row has, or nothing that its sender may read.
        """
        self.current_operand = syntax.IdentifierNode(text, 0, len(text))
        self.email_conditions = []
        term = self._resolve_path(text)
        if row_path_of(term) is None:
            self._refuse(f'"{text}" is the same for every record')
        if isinstance(term, FieldValue):
            term = replace(term, shown_by=None)  # one row only gives the key
        return term, next(iter(self.email_conditions), None)

    def list_rule_conditions(self) -> list[Condition]:
        """Return the list rules of the rows joined so far; a missing row needs to meet none."""
        conditions: list[Condition] = []
        for rule in self._list_rules(self.joined_paths):
            path = rule.row_path
            id_field = FieldValue(path, self.collections[path.collection_name].fields_by_name["id"])
            missing = Comparison(id_field, syntax.Op.EQ, True, ParameterTerm(LiteralParameter("")))
            conditions.append(Disjunction((missing, rule)))
        return conditions

    def _list_rules(self, paths: Iterable[RowPath]) -> list[NestedRule]:
        """Return the list rules of the rows at the paths, as far as not all rows meet them."""
        rules: list[NestedRule] = []
        for path in paths:
            collection = self.collections[path.collection_name]
            if not collection.list_rule:
                continue
            if path not in self.list_rules:
                inner = Resolver(
                    self.collections, collection, self.auth_collection, has_body=self.has_body
                )
                where = inner.resolve_condition(syntax.parse_expression(collection.list_rule))
                self.list_rules[path] = NestedRule(path, where)
            rules.append(self.list_rules[path])
        return rules

    def _resolve_comparison(self, node: syntax.ComparisonNode) -> Condition:
        self.email_conditions = []
        left, right = self._resolve_operand(node.left), self._resolve_operand(node.right)
        listed = () if node.is_any else self._listed(left, right)
        resolved = Comparison(left, node.op, node.is_any, right, node.start, node.end, listed)
        conditions = resolved, *self.email_conditions
        return Conjunction(conditions) if self.email_conditions else resolved

    def _listed(self, *terms: Term) -> tuple[NestedRule, ...]:
        """Return what rows must meet to be a counter-example of a client's comparison.

        In PocketBase any row is one, so that the answer tells values of rows that aren't listed.
        """
        if not self.is_filter or not self.hides_values:
            return ()
        paths = (path for path in map(row_path_of, terms) if path is not None and path.is_multiple)
        joined = dict.fromkeys(row for path in paths for row in path.joined_rows())
        return tuple(self._list_rules(joined))

    def _resolve_operand(self, operand: syntax.OperandNode) -> Term:
        self.current_operand = operand
        match operand:
            case syntax.LiteralNode(value):
                return ParameterTerm(LiteralParameter(value))
            case syntax.IdentifierNode(text):
                return self._resolve_identifier(text)
            case syntax.CallNode():
                return self._resolve_call(operand)

    def _resolve_identifier(self, text: str) -> Term:
        """Return the operand: a macro, else a field, else a keyword. A field named true wins."""
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

    def _resolve_call(self, call: syntax.CallNode) -> Term:
        email_conditions = len(self.email_conditions)
        match call.name:
            case "geoDistance":
                term = self._geo_distance(call)
            case "strftime":
                term = self._strftime(call)
            case _:
                return self._refuse_unknown("function", call.name, ("geoDistance", "strftime"))
        # PocketBase doesn't check the visibility of an address in a function's arguments.
        del self.email_conditions[email_conditions:]
        return term

    def _geo_distance(self, call: syntax.CallNode) -> Term:
        if len(call.args) != 4:  # noqa: PLR2004 (two points of two numbers)
            self._refuse(f"geoDistance takes 4 arguments, got {len(call.args)}")
        if any(isinstance(arg, syntax.CallNode) or _text_of(arg) is not None for arg in call.args):
            self._refuse("arguments of geoDistance are identifiers or numbers")
        lon_a, lat_a, lon_b, lat_b = (self._resolve_operand(arg) for arg in call.args)
        return GeoDistance((lon_a, lat_a, lon_b, lat_b))

    def _strftime(self, call: syntax.CallNode) -> Term:
        if not 1 <= len(call.args) <= MAX_STRFTIME_ARGUMENTS:
            limit = MAX_STRFTIME_ARGUMENTS
            self._refuse(f"strftime takes 1 to {limit} arguments, got {len(call.args)}")
        layout, *times = call.args[:2]
        layout_text = _text_of(layout)
        if layout_text is None:
            self._refuse("the first argument of strftime is a text, the format")
        modifiers = [text for arg in call.args[2:] if (text := _text_of(arg)) is not None]
        if len(modifiers) < len(call.args[2:]):
            self._refuse("modifiers of strftime are texts")
        if times and isinstance(times[0], syntax.CallNode):
            self._refuse("the time of strftime is an identifier, a text or a number")
        time = self._resolve_operand(times[0]) if times else None
        return Strftime(layout_text, time, tuple(modifiers))

    # --- paths

    def _resolve_path(self, text: str) -> Term:
        if _ALLOWED_IDENTIFIER.fullmatch(text) is None:
            return self._refuse_unknown("field", text, [*self.collection.fields_by_name, *MACROS])
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
                return self._follow_path(RowPath(ScopeRow(self.collection.name)), parts)

    def _collection_rows(self, text: str) -> RowPath:
        name, _, alias = text.partition(":")
        collection = self._find_collection(name)
        if collection is None:
            self._refuse_unknown("collection", name, self.collections)
        if alias and self.aliases.setdefault(alias, collection.name) != collection.name:
            self._refuse(f'alias "{alias}" names two collections', RuleUnsupportedError)
        return self._record_joins(RowPath(CollectionRows(collection.name, alias or None)))

    def _find_collection(self, name_or_id: str) -> Collection | None:
        """Return the collection of that id or name; PocketBase ignores the name's case here."""
        collection = self.collections.find(name_or_id)
        if collection is not None:
            return collection
        wanted = name_or_id.lower()
        return next((c for c in self.collections.values() if c.name.lower() == wanted), None)

    def _auth_path(self, parts: list[str]) -> Term:
        if len(parts) == 1 and parts[0] in PRINCIPAL_FIELDS:
            return ParameterTerm(RequestValue(("auth", parts[0])))
        if len(parts) == 1 and parts[0].partition(":")[0] in self.collections.claim_names:
            return self._claim(parts[0])
        if self.auth_collection is None:
            return Keyword(None)
        caller_row = self._record_joins(RowPath(CallerRow(self.auth_collection.name)))
        return self._follow_path(caller_row, parts)

    def _claim(self, part: str) -> Term:
        name, modifier = self._split_modifier(part)
        if modifier not in {"", "isset", "lower"}:
            self._refuse(f'":{modifier}" can\'t be used with a claim')
        is_isset, is_lower = modifier == "isset", modifier == "lower"
        return ParameterTerm(RequestValue(("auth", name), is_isset=is_isset, is_lower=is_lower))

    def _body_path(self, parts: list[str]) -> Term:
        """Return a field of the request's body."""
        if self.has_body and len(parts) == 1:
            return self._request_value(["body", *parts])
        # A subscription has no body, nor have most reads.
        name, modifier = self._split_modifier(parts[0])
        field = self.collection.fields_by_name.get(name)
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
        """Return a value of the request, which is known when the subscription is made."""
        last, modifier = self._split_modifier(parts[-1])
        if modifier not in {"", "isset", "lower"}:
            self._refuse(f'":{modifier}" can\'t be used with "@request.{parts[0]}"')
        field = self.collection.fields_by_name.get(last)
        is_number = field and field.kind is FieldKind.NUMBER and not field.is_multiple
        is_isset = modifier == "isset"
        return ParameterTerm(
            RequestValue(
                (*parts[:-1], last),
                is_read_as_number=bool(is_number) and not is_isset,
                is_lower=modifier == "lower",
                is_isset=is_isset,
            )
        )

    def _follow_path(self, path: RowPath, parts: list[str]) -> Term:
        """Follow relations from a row to a field, which may have a modifier.

        From the caller's row an unknown name is NULL and no error.
        """
        for index, part in enumerate(parts[:-1]):
            collection = self.collections[path.collection_name]
            field = self._find_field(collection, part)
            rest = parts[index + 1 :]
            if field is not None and field.kind in {FieldKind.JSON, FieldKind.GEO_POINT}:
                return self._json_value(path, self._check_supported(field), rest)
            if index >= MAX_HOPS:
                self._refuse(f"a path takes at most {MAX_HOPS} relations")
            if field is None:
                back = self._back_relation(path, part)
                if back is None:
                    return Keyword(None)
                path = self._record_joins(path.extended_by(back))
                continue
            if field.relation is None:
                self._refuse(f'field "{part}" is not a relation')
            if not field.is_multiple and rest == ["id"]:
                return FieldValue(path, self._check_supported(field))
            target = self.collections[field.relation.collection_name].name
            many, one = (EachValue(field), ToEach(target)), (ToOne(field, target),)
            path = self._record_joins(path.extended_by(*(many if field.is_multiple else one)))
        return self._last_field(path, parts[-1])

    def _back_relation(self, path: RowPath, part: str) -> BackRelation | None:
        """Return the step over ``collection_via_field``; None if it is unknown and that is NULL."""
        collection = self.collections[path.collection_name]
        is_missing_null = isinstance(path.root, CallerRow)
        match = _BACK_RELATION.fullmatch(part)
        source = None if match is None else self._find_collection(match[1])
        field = None if match is None or source is None else self._find_field(source, match[2])
        if source is None or field is None:
            if is_missing_null:
                return None
            return self._refuse_unknown("field", part, _path_names(self.collections, collection))
        if field.relation is None or field.relation.collection_name != collection.name:
            if is_missing_null and field.relation is not None:
                return None
            self._refuse(f'"{part}" doesn\'t point to "{collection.name}"')
        key = None if field.column is None else (field.column.name,)
        is_unique = not field.is_multiple and key in source.table.unique_keys
        return BackRelation(source.name, field, is_unique)

    def _json_value(self, path: RowPath, field: Field, keys: list[str]) -> Term:
        if field.is_multiple:
            message = f'field "{field.name}" holds several values, which have no keys'
            self._refuse(message, RuleUnsupportedError)
        if field.kind is FieldKind.GEO_POINT and not field.is_stored_as_json and len(keys) != 1:
            return Keyword(None)
        return JsonValue(path, field, tuple(key.replace(":", "") for key in keys))

    def _last_field(self, path: RowPath, part: str) -> Term:
        name, modifier = self._split_modifier(part)
        collection = self.collections[path.collection_name]
        field = self._find_field(collection, name)
        if field is None:
            if collection.type == "auth" and name in {"password", "tokenKey"}:
                if self.is_filter:
                    self._refuse(f'field "{name}" is hidden', RuleNameError)
                return SecretTerm(path, Modifier.LOWER if modifier == "lower" else Modifier.WHOLE)
            if isinstance(path.root, CallerRow):
                return Keyword(None)
            known = _path_names(self.collections, collection)
            if name in known:
                hint = f'Perhaps you meant "{name}.id".'
                self._refuse(f'"{name}" needs a field', RuleNameError, hint=hint)
            self._refuse_unknown("field", name, known)
        self._check_supported(field)
        if modifier == "length" and _has_countable_values(field):
            return FieldValue(path, field, Modifier.LENGTH)
        if modifier == "each" and _has_countable_values(field):
            one_of_many = EachTerm(path.extended_by(EachValue(field)))
            return one_of_many if field.is_multiple else FieldValue(path, field, Modifier.EACH)
        is_address = name == "email" and self.is_filter and collection.type == "auth"
        shown_by = self._require_visible_email(path, collection) if is_address else None
        is_lower = modifier == "lower"
        if field.kind is FieldKind.JSON and not field.is_multiple:
            return JsonValue(path, field, (), is_lower=is_lower)
        modifier_ = Modifier.LOWER if is_lower else Modifier.WHOLE
        return FieldValue(path, field, modifier_, shown_by)

    def _require_visible_email(self, path: RowPath, collection: Collection) -> Field | None:
        """Add the condition that an address which a filter reads is shown by its owner.

        Returns the field that says so, if other addresses have to count as NULL: the condition is
        about the row that makes the comparison true, and where all of many rows have to make it
        true, the hidden addresses among them would decide.
        """
        visible = collection.fields_by_name.get("emailVisibility")
        visible_term: Term = Keyword(False) if visible is None else FieldValue(path, visible)
        self.email_conditions.append(Comparison(visible_term, syntax.Op.EQ, True, Keyword(True)))
        return visible if path.is_multiple and self.hides_values else None

    # --- names

    def _find_field(self, collection: Collection, name: str) -> Field | None:
        field = collection.fields_by_name.get(name)
        if field is not None and self.is_filter and (field.is_hidden or field.is_secret):
            self._refuse(f'field "{name}" is hidden', RuleNameError)
        return field

    def _check_supported(self, field: Field) -> Field:
        """Return the field, unless its type has no meaning in rules."""
        base = field.type.base
        element = base if base.element is None else base.element.base
        if (
            field.kind in {FieldKind.BYTES, FieldKind.COMPOSITE, FieldKind.GEOMETRY}
            or element.name in _UNSUPPORTED_TYPES
            or (field.kind is FieldKind.GEO_POINT and field.is_multiple)
        ):
            is_geometry = field.kind is FieldKind.GEOMETRY and not field.is_multiple
            hint = "Show it as geoPoint (fields.types) to use its lon and lat."
            message = f'field "{field.name}" of type {base.name} can\'t be used in rules'
            self._refuse(message, RuleUnsupportedError, hint=hint if is_geometry else "")
        return field

    def _record_joins(self, path: RowPath) -> RowPath:
        """Return the path. Of a filter its joins are recorded, for the list rules of their rows.

        A collection without list rule is for superusers only, so no filter may join it.
        """
        if self.is_filter and path not in self.joined_paths:
            for joined in path.joined_rows():
                name = joined.collection_name
                if self.collections[name].list_rule is None:
                    self._refuse(f'collection "{name}" can\'t be listed', RuleNameError)
                self.joined_paths.setdefault(joined)
        return path

    def _split_modifier(self, part: str) -> tuple[str, str]:
        """Return the name and its modifier; with more than one colon it is all a name."""
        name, colon, modifier = part.partition(":")
        if not colon or ":" in modifier:
            return part, ""
        if modifier not in _MODIFIERS:
            self._refuse_unknown("modifier", modifier, _MODIFIERS)
        return name, modifier

    # --- errors

    def _refuse(
        self, message: str, error: type[RuleError] = RuleSyntaxError, *, hint: str = ""
    ) -> NoReturn:
        operand = self.current_operand
        raise error(message, start=operand.start, end=operand.end, hint=hint)

    def _refuse_unknown(self, noun: str, name: str, known: Iterable[str]) -> NoReturn:
        suggestion = nearest_name(name, known) if len(name) <= _MAX_SUGGESTION_LENGTH else None
        hint = "" if suggestion is None else f'Perhaps you meant "{suggestion}".'
        self._refuse(f'there is no {noun} "{name}"', RuleNameError, hint=hint)


def _text_of(operand: syntax.OperandNode) -> str | None:
    match operand:
        case syntax.LiteralNode(str(text)):
            return text
        case _:
            return None


def _has_countable_values(field: Field) -> bool:
    """Return whether ``:each`` and ``:length`` apply: PocketBase's selects, relations and files."""
    is_link = field.kind in {FieldKind.RELATION, FieldKind.FILE}
    return field.is_multiple or field.is_select or is_link


def _path_names(collections: Collections, collection: Collection) -> list[str]:
    """Return the names that can follow a row of the collection in a path, for suggestions."""
    back = [
        f"{source.name}_via_{field.name}"
        for source in collections.values()
        for field in source.fields
        if field.relation is not None and field.relation.collection_name == collection.name
    ]
    return [field.name for field in collection.fields] + back
