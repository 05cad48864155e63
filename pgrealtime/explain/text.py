"""Formats the result of ``explain`` as text and finds the parts of a rule that decide. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, FieldKind
from pgrealtime.errors import RuleError, underline_span
from pgrealtime.protocol.topic import Topic
from pgrealtime.rules.language.predicate import AdmitAll, DenyAll
from pgrealtime.rules.language.sqlite_values import Scalar
from pgrealtime.rules.sql.reference import ReferenceQuery, SqlQuery

_MAX_VALUE_CHARACTERS = 80
HIDDEN_TEXT = "[hidden]"
"""Printed instead of values that records don't show to every subscriber."""
CAVEAT = (
    "evaluated with the present content of the tables, which may have changed since the event;"
    " @request.query and @request.headers are as in the topic's options"
)
MIRROR_CAVEAT = (
    "related rows are as they are now; a change of one of these is told by a resync of its own;"
    " @request.query and @request.headers are as in the topic's options"
)
IMAGE_CAVEAT = (
    "evaluated with the row as the change wrote it (of a delete: as it was) and with related rows"
    " as they are now; @request.query and @request.headers are as in the topic's options"
)
READ_CAVEAT = (
    "evaluated with the present content of the tables; @request.query and @request.headers are as"
    " in the topic's options, those of a browser are others"
)
_MAX_NAMED_FRAGMENTS = 3
"""Deciding parts that the verdict names at most."""


@dataclass(frozen=True, slots=True)
class ConditionVerdict:
    """The value of a condition for a row, or why there is none."""

    value: bool | None
    """None is UNKNOWN (NULL in SQL), or no answer."""
    failure: str = ""
    """Why there was no answer, which the service treats as FALSE."""

    @property
    def label(self) -> str:
        """The word that is printed."""
        if self.failure:
            return "denied"
        return {True: "true", False: "false", None: "unknown"}[self.value]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedFragment:
    """A part of a rule or filter, and its value by itself."""

    display_text: str
    verdict: ConditionVerdict
    operand_values: tuple[tuple[str, str], ...] = ()
    """Of a comparison: its operands and their values, as text."""
    is_conjunction: bool = True
    """Of a part with fragments: whether all must be true, or any."""
    fragments: tuple[EvaluatedFragment, ...] = ()


def deciding_fragments(evaluated: EvaluatedFragment) -> list[EvaluatedFragment]:
    """Return the smallest parts that keep a part from being true.

    Of a conjunction the first part that isn't true is enough. If each part is true by itself, the
    whole decides: no single related row makes all of them true.
    """
    failing = [part for part in evaluated.fragments if not part.verdict.value]
    if not failing:
        return [evaluated]
    if evaluated.is_conjunction:
        return deciding_fragments(failing[0])
    return [fragment for part in failing for fragment in deciding_fragments(part)]


def describe_fragments(parts: Iterable[EvaluatedFragment]) -> str:
    """Return the deciding parts, as the verdict names them."""
    texts = [part.display_text for part in parts]
    if len(texts) == 1:
        return texts[0]
    unnamed = len(texts) - _MAX_NAMED_FRAGMENTS
    more = [f"{unnamed} more"] if unnamed > 0 else []
    return f"none of: {'; '.join([*texts[:_MAX_NAMED_FRAGMENTS], *more])}"


def fragment_lines(evaluated: EvaluatedFragment, indent: str = "") -> Iterator[str]:
    """Yield the lines of a part and of its fragments, in the order of the text."""
    start, below = f"{indent}{evaluated.verdict.label:<9}", f"{indent}{'':<9}"
    if evaluated.fragments:
        yield f"{start}{'all of:' if evaluated.is_conjunction else 'any of:'}"
    else:
        yield start + evaluated.display_text
        if evaluated.operand_values:
            yield below + "; ".join(f"{s} is {value}" for s, value in evaluated.operand_values)
    if evaluated.verdict.failure:
        yield f"{below}{evaluated.verdict.failure}"
    elif (
        not evaluated.verdict.value
        and evaluated.fragments
        and deciding_fragments(evaluated) == [evaluated]
    ):
        yield f"{below}each is true of some related row, but no one row makes all of them true"
    for part in evaluated.fragments:
        yield from fragment_lines(part, f"{indent}  ")


def format_value(value: Scalar) -> str:
    """Return a value as it is printed; a long text is cut."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str() if len(value) > _MAX_VALUE_CHARACTERS:
            return f"{json.dumps(value[:_MAX_VALUE_CHARACTERS], ensure_ascii=False)}..."
        case str():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return str(value).removesuffix(".0")


def escape_unprintable(line: str) -> str:
    """Return the line with control and other unprintable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def disagreement_lines(*, plain: bool, engine: bool, parts: bool) -> Iterator[str]:
    """Yield the report that three evaluations differ that must agree."""
    yield "three evaluations differ that must agree; please report this with the schema:"
    for name, verdict in (("reference query", plain), ("engine", engine), ("parts", parts)):
        yield f"  {name}: {'delivered' if verdict else 'not delivered'}"
    yield "the verdict below is the engine's, which the service uses"


def read_disagreement_lines(*, statement: bool, parts: bool) -> Iterator[str]:
    """Yield the report that the statement of a read and its parts differ."""
    yield "two evaluations differ that must agree; please report this with the schema:"
    for name, verdict in (("statement", statement), ("parts", parts)):
        yield f"  {name}: {'found' if verdict else 'not found'}"


def sort_key_lines(key: str, verdict: ConditionVerdict) -> Iterator[str]:
    """Yield whether a list sorted by the key has the record."""
    yield f"  {verdict.label:<9}{key}"
    if not verdict.value:
        reason = verdict.failure or "a list rule of what it joins doesn't admit the related row"
        yield f"  {'':<9}{reason}"


def refusal_lines(text: str, error: RuleError) -> Iterator[str]:
    """Yield why a filter is refused, and where in its text."""
    yield f"  refused: {error.message}"
    yield from underline_span(text, error.start, error.end).splitlines()


def topic_lines(topic: Topic, collection: Collection) -> Iterator[str]:
    """Yield the topic's collection, record and options."""
    what = "all records" if topic.record_id is None else f'the record "{topic.record_id}"'
    yield f'{what} of "{collection.name}", table {collection.table.name}'
    for name, values in (("query", topic.query), ("headers", topic.headers)):
        for key, value in values.items():
            if (name, key) != ("query", "filter"):
                yield f"@request.{name}.{key} is {format_value(value)}"


def rule_lines(rule: str | None, *, is_superuser: bool) -> list[str]:
    """Return the rule's text, or what its absence means."""
    match rule:
        case None:
            lines = ["missing: superusers only"]
        case "":
            lines = ["empty: every caller"]
        case _:
            lines = rule.splitlines()
    return [*lines, "superusers pass it"] if is_superuser else lines


def row_lines(
    collection: Collection, row: Row, compiled: AdmitAll | DenyAll | ReferenceQuery
) -> Iterator[str]:
    """Yield that the record exists, and the columns that rule and filter read."""
    yield f"{collection.name}/{row[collection.key.name]} exists"
    yield from column_lines(collection, row, compiled)


def column_lines(
    collection: Collection, row: Row, compiled: AdmitAll | DenyAll | ReferenceQuery
) -> Iterator[str]:
    """Yield the columns that rule and filter read."""
    for name in compiled.column_names if isinstance(compiled, ReferenceQuery) else ():
        yield f"{_field_name(collection, name)} is {_format_cell(collection, name, row[name])}"


def _field_name(collection: Collection, column: str) -> str:
    names = (f.name for f in collection.fields if f.column and f.column.name == column)
    return next(names, column)


def _is_hidden(collection: Collection, column: str) -> bool:
    """Whether records show the column not at all, or not to every subscriber."""
    fields = [f for f in collection.fields if f.column and f.column.name == column]
    return not fields or any(f.is_hidden or f.is_secret for f in fields)


def _format_cell(collection: Collection, column: str, text: str | None) -> str:
    if _is_hidden(collection, column):
        return HIDDEN_TEXT
    field_ = collection.fields_by_name[_field_name(collection, column)]
    if text is None or field_.is_multiple:
        return format_value(text)
    if field_.kind is FieldKind.NUMBER:
        return text
    return format_value(text == "t" if field_.kind is FieldKind.BOOL else text)


def sql_lines(query: SqlQuery, compiled: ReferenceQuery) -> Iterator[str]:
    """Yield the statement and its parameters."""
    hidden = {
        f"c{index}"
        for index, name in enumerate(compiled.column_names)
        if _is_hidden(compiled.collection, name)
    }
    yield query.sql
    for name, value in query.params.items():
        yield f"{name} = {HIDDEN_TEXT if name in hidden else value!r}"
