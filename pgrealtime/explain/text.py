"""What ``explain`` found out, as lines for people, and which part of a rule decided. Pure."""

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
"""Stands for what records don't show to everybody."""
CAVEAT = (
    "judged by what the tables hold now, perhaps not what they held then;"
    " @request.query and @request.headers are as in the topic's options"
)
_MAX_NAMED_FRAGMENTS = 3
"""Parts that are named as what decided."""


@dataclass(frozen=True, slots=True)
class ConditionVerdict:
    """What a condition is of a row."""

    value: bool | None
    """None is unknown, NULL in SQL, or that there was no answer."""
    failure: str = ""
    """Why there was no answer: to the service as good as false."""

    @property
    def label(self) -> str:
        """For people."""
        if self.failure:
            return "denied"
        return {True: "true", False: "false", None: "unknown"}[self.value]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedFragment:
    """A part of a rule or filter, and what it is by itself."""

    display_text: str
    verdict: ConditionVerdict
    operand_values: tuple[tuple[str, str], ...] = ()
    """Of a comparison: operands and what their values are, ready to be shown."""
    is_conjunction: bool = True
    """Of a join: all parts must be true, not any."""
    fragments: tuple[EvaluatedFragment, ...] = ()


def deciding_fragments(evaluated: EvaluatedFragment) -> list[EvaluatedFragment]:
    """Return the smallest parts that keep a part from being true.

    Of what must all be true the first that isn't is enough. A join of which every part is true by
    itself decides as a whole: no related row makes all of them true at once.
    """
    failing = [part for part in evaluated.fragments if not part.verdict.value]
    if not failing:
        return [evaluated]
    if evaluated.is_conjunction:
        return deciding_fragments(failing[0])
    return [one for part in failing for one in deciding_fragments(part)]


def describe_fragments(parts: Iterable[EvaluatedFragment]) -> str:
    """Return what decided, as the verdict names it."""
    texts = [part.display_text for part in parts]
    if len(texts) == 1:
        return texts[0]
    more = (
        [f"{len(texts) - _MAX_NAMED_FRAGMENTS} more"] if len(texts) > _MAX_NAMED_FRAGMENTS else []
    )
    return f"none of: {'; '.join([*texts[:_MAX_NAMED_FRAGMENTS], *more])}"


def fragment_lines(evaluated: EvaluatedFragment, indent: str = "") -> Iterator[str]:
    """Yield a part and what it is made of, in the order of the text."""
    start, below = f"{indent}{evaluated.verdict.label:<9}", f"{indent}{'':<9}"
    if evaluated.fragments:
        yield f"{start}{'all of:' if evaluated.is_conjunction else 'any of:'}"
    else:
        yield start + evaluated.display_text
        if evaluated.operand_values:
            yield below + "; ".join(f"{side} is {told}" for side, told in evaluated.operand_values)
    if evaluated.verdict.failure:
        yield f"{below}{evaluated.verdict.failure}"
    elif (
        evaluated.fragments
        and deciding_fragments(evaluated) == [evaluated]
        and not evaluated.verdict.value
    ):
        yield f"{below}each is true of some related row, but no one row makes all of them true"
    for part in evaluated.fragments:
        yield from fragment_lines(part, f"{indent}  ")


def format_value(value: Scalar) -> str:
    """Return a value as people read it; a long text is cut."""
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
    """Return the line without what a terminal would obey, be unable to print or hide."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


# --- what was looked at


def disagreement_lines(*, plain: bool, engine: bool, parts: bool) -> Iterator[str]:
    """Yield that those who must agree don't."""
    yield "three ways to decide must agree and don't; please report this with the schema:"
    for name, verdict in (("plain query", plain), ("engine", engine), ("parts", parts)):
        yield f"  {name}: {'delivered' if verdict else 'not delivered'}"
    yield "the verdict below is the engine's: it is what the service does"


def refusal_lines(text: str, error: RuleError) -> Iterator[str]:
    """Yield what is wrong with a filter, and where."""
    yield f"  refused: {error.message}"
    yield from underline_span(text, error.start, error.end).splitlines()


def topic_lines(topic: Topic, collection: Collection) -> Iterator[str]:
    """Yield what the topic means."""
    what = "all records" if topic.record_id is None else f'the record "{topic.record_id}"'
    yield f'{what} of "{collection.name}", table {collection.table.name}'
    for name, values in (("query", topic.query), ("headers", topic.headers)):
        for key, value in values.items():
            if (name, key) != ("query", "filter"):
                yield f"@request.{name}.{key} is {format_value(value)}"


def rule_lines(rule: str | None, *, is_superuser: bool) -> list[str]:
    """Return the rule as it stands."""
    match rule:
        case None:
            lines = ["missing: superusers only"]
        case "":
            lines = ["empty: everyone"]
        case _:
            lines = rule.splitlines()
    return [*lines, "superusers pass it"] if is_superuser else lines


def row_lines(
    collection: Collection, row: Row, compiled: AdmitAll | DenyAll | ReferenceQuery
) -> Iterator[str]:
    """Yield that the row is there, and what rule and filter read of it."""
    yield f"{collection.name}/{row[collection.key.name]} is there"
    for name in compiled.columns if isinstance(compiled, ReferenceQuery) else ():
        yield f"{_field_name(collection, name)} is {_format_cell(collection, name, row[name])}"


def _field_name(collection: Collection, column: str) -> str:
    found = (f.name for f in collection.fields if f.column and f.column.name == column)
    return next(found, column)


def _is_hidden(collection: Collection, column: str) -> bool:
    """Whether records don't show the column to everybody, or not at all."""
    shown_as = [f for f in collection.fields if f.column and f.column.name == column]
    return not shown_as or any(f.is_hidden or f.is_secret for f in shown_as)


def _format_cell(collection: Collection, column: str, text: str | None) -> str:
    if _is_hidden(collection, column):
        return HIDDEN_TEXT
    field_ = collection.fields_by_name[_field_name(collection, column)]
    if text is None or field_.is_multiple:
        return format_value(text)
    match field_.kind:
        case FieldKind.BOOL:
            return format_value(text == "t")
        case FieldKind.NUMBER:
            return text
        case _:
            return format_value(text)


def sql_lines(query: SqlQuery, compiled: ReferenceQuery) -> Iterator[str]:
    """Yield the statement and its parameters."""
    hidden = {
        f"c{at}"
        for at, name in enumerate(compiled.columns)
        if _is_hidden(compiled.collection, name)
    }
    yield query.sql
    for name, value in query.params.items():
        yield f"{name} = {HIDDEN_TEXT if name in hidden else value!r}"
