"""Warns about rules by which callers without a value match rows without one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pgrealtime.cli.check.rules import identifier_text, replace_spans
from pgrealtime.collections.model import Collection, Collections, Field, FieldKind
from pgrealtime.errors import ConfigProblem
from pgrealtime.rules.language import predicate, syntax
from pgrealtime.rules.language.resolve import resolve_rule
from pgrealtime.rules.language.syntax import AndNode, ComparisonNode, ExpressionNode, Op, OrNode


@dataclass(frozen=True, slots=True)
class _AbsentValue:
    """A value that a caller may lack: all of ``@request.auth``, or one value of the options."""

    prefix: str
    """Prefix of the paths that are empty then."""
    guard: str
    """A path that is empty only then."""
    caller_description: str
    row_field: str = ""
    """A path of the row that is empty, too."""

    def covers(self, operand: syntax.OperandNode) -> bool:
        text = identifier_text(operand)
        if text == self.row_field:
            return text != ""
        return text.startswith(self.prefix) and (self.prefix.endswith(".") or text == self.prefix)


_GUEST = _AbsentValue("@request.auth.", "@request.auth.id", "guests")
_OPTION_PREFIXES = ("@request.query.", "@request.headers.")


def absent_value_warnings(
    path: str,
    rule: str,
    expression: ExpressionNode,
    collections: Collections,
    collection: Collection,
) -> Iterator[ConfigProblem]:
    """Yield comparisons by which a caller without a value matches rows without one.

    An empty value is equal to an empty value, as in PocketBase.
    """
    for absent in _absent_values(expression):
        absent_values = [
            (cmp, field)
            for cmp in syntax.comparison_nodes(expression)
            if (field := _path_compared_with(cmp, absent)) is not None
            and (cmp.op is Op.NE or _may_be_empty(rule, cmp, collections, collection))
            # The field is empty where the comparison is true.
            and _may_decide(
                cmp, expression, absent if cmp.op is Op.NE else replace(absent, row_field=field)
            )
        ]
        if absent_values:
            cmp, field = absent_values[0]
            what = "with" if cmp.op is Op.NE else "without"
            guarded = [
                (cmp.start, cmp.end, f'({absent.guard} != "" && {rule[cmp.start : cmp.end]})')
                for cmp, _ in absent_values
            ]
            message = f'{absent.caller_description} may see every record {what} "{field}"'
            yield ConfigProblem(path, message, f"write: {replace_spans(rule, guarded)}")


def _absent_values(expression: ExpressionNode) -> Iterator[_AbsentValue]:
    yield _GUEST
    comparisons = syntax.comparison_nodes(expression)
    texts = (identifier_text(side) for cmp in comparisons for side in (cmp.left, cmp.right))
    for text in dict.fromkeys(texts):
        if text.startswith(_OPTION_PREFIXES) and ":" not in text:
            yield _AbsentValue(text, text, f"callers that omit {text}")


def _path_compared_with(cmp: ComparisonNode, absent: _AbsentValue) -> str | None:
    """Return the row's path that is compared with the absent value; None if there is none."""
    is_equality = cmp.op is Op.EQ or (cmp.op is Op.NE and absent is _GUEST)
    for own, other_side in ((cmp.left, cmp.right), (cmp.right, cmp.left)):
        text = identifier_text(other_side)
        is_of_row = text.startswith("@collection.") or text[:1] not in ("", "@")
        if is_equality and absent.covers(own) and is_of_row and text not in _KEYWORDS:
            return text
    return None


_KEYWORDS = {"null": "", "true": "True", "false": "False"}
_BOOLEAN_TEXTS = {"True", "False"}


def _may_be_empty(
    rule: str, cmp: ComparisonNode, collections: Collections, collection: Collection
) -> bool:
    """Whether the row's side can be empty or missing, by the constraints of its table."""
    resolved = resolve_rule(rule[cmp.start : cmp.end], collections, collection, None)
    terms = [t for t in predicate.terms(resolved.where) if predicate.row_path_of(t) is not None]
    return not terms or any(not _is_never_empty(term, collections) for term in terms)


def _is_never_empty(term: predicate.Term, collections: Collections) -> bool:
    if not isinstance(term, predicate.FieldValue):
        return False
    row_path = term.row_path
    if isinstance(row_path.root, predicate.CollectionRows):
        return False
    prefixes = [row_path.steps[:length] for length in range(len(row_path.steps))]
    owners = [collections[predicate.RowPath(row_path.root, p).collection_name] for p in prefixes]
    return all(
        isinstance(step, predicate.ToOne) and _is_column_never_empty(owner, step.field)
        for owner, step in zip(owners, row_path.steps, strict=True)
    ) and _is_column_never_empty(collections[row_path.collection_name], term.field)


def _is_column_never_empty(owner: Collection, field: Field) -> bool:
    column = field.column
    if column is None or not column.not_null:
        return False
    is_foreign = any(key.column_names == (column.name,) for key in owner.table.foreign_keys)
    return column == owner.key or is_foreign or field.kind is not FieldKind.TEXT


def _may_decide(cmp: ComparisonNode, expression: ExpressionNode, absent: _AbsentValue) -> bool:
    """Whether some row can pass the rule by this comparison alone."""
    match expression:
        case ComparisonNode():
            return expression is cmp
        case AndNode(parts) | OrNode(parts):
            decided = isinstance(expression, OrNode)  # the verdict that makes cmp irrelevant
            own = next((part for part in parts if _may_decide(cmp, part, absent)), None)
            return own is not None and all(
                part is own or _verdict(part, absent) is not decided for part in parts
            )


def _verdict(expression: ExpressionNode, absent: _AbsentValue) -> bool | None:
    """Return the rule's verdict for a caller without the value; None if it depends on the row."""
    match expression:
        case ComparisonNode():
            return _comparison_verdict(expression, absent)
        case AndNode(parts) | OrNode(parts):
            verdicts = [_verdict(part, absent) for part in parts]
            deciding = isinstance(expression, OrNode)
            return deciding if deciding in verdicts else None if None in verdicts else not deciding


def _comparison_verdict(cmp: ComparisonNode, absent: _AbsentValue) -> bool | None:
    """Return the verdict of a comparison that reads no row; None if that isn't known here."""
    left, right = _static_text(cmp.left, absent), _static_text(cmp.right, absent)
    if left is None or right is None:
        return None
    match cmp.op:
        case Op.EQ | Op.NE if not (left and right) or {left, right} <= _BOOLEAN_TEXTS:
            return (left == right) is (cmp.op is Op.EQ)
        case Op.LT | Op.LE | Op.GT | Op.GE | Op.LIKE if not (left and right):
            return False
        case _:
            return None


def _static_text(operand: syntax.OperandNode, absent: _AbsentValue) -> str | None:
    """Return the operand's value as text, empty for a missing one; None if it isn't known here."""
    match operand:
        case syntax.LiteralNode(value):
            return str(value)
        case syntax.IdentifierNode(text) if text in _KEYWORDS:
            return _KEYWORDS[text]
        case syntax.IdentifierNode(text) if text == f"{absent.prefix}:isset":
            return str(False)
        case syntax.IdentifierNode() if absent.covers(operand):
            return ""
        case _:
            return None
