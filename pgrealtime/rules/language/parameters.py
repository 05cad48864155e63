"""The parameters of a rule: what a value comes from, its class, and the forms it is bound in.

``resolve`` makes them of a rule's text. A translation depends on the classes of its parameters,
never on their values, so one translation serves all callers whose values have the same classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from pgrealtime.rules.language.sqlite_values import (
    Scalar,
    like_pattern,
    looks_numeric,
    storable,
)


@dataclass(frozen=True, slots=True)
class LiteralParameter:
    """A literal of the rule's text."""

    value: str | float


@dataclass(frozen=True, slots=True)
class LiftedLiteral:
    """The n-th literal of a filter that was compiled without its literals."""

    index: int


@dataclass(frozen=True, slots=True)
class RequestValue:
    """A value of ``@request``: ``("query", "k")``, ``("auth", "id")``, ``("context",)``."""

    path: tuple[str, ...]
    is_read_as_number: bool = False
    """It has the name of a number field, so a text that is a number becomes one."""
    is_lower: bool = False
    is_isset: bool = False
    """Not the value, but 1 or 0 for whether there is one."""


class Macro(Enum):
    """A time or a part of one, in UTC; the same for a whole batch of changes."""

    NOW = "@now"
    YESTERDAY = "@yesterday"
    TOMORROW = "@tomorrow"
    TODAY_START = "@todayStart"
    TODAY_END = "@todayEnd"
    MONTH_START = "@monthStart"
    MONTH_END = "@monthEnd"
    YEAR_START = "@yearStart"
    YEAR_END = "@yearEnd"
    SECOND = "@second"
    MINUTE = "@minute"
    HOUR = "@hour"
    DAY = "@day"
    MONTH = "@month"
    YEAR = "@year"
    WEEKDAY = "@weekday"


Parameter: TypeAlias = LiteralParameter | LiftedLiteral | RequestValue | Macro


@dataclass(frozen=True, slots=True)
class CallerColumn:
    """A column of the caller's own row, given in text form."""

    name: str
    """Empty: not a column, but NULL if there is no such row."""


MACROS: dict[str, Macro] = {macro.value: macro for macro in Macro}


class ParameterClass(Enum):
    """The class of a parameter's value: all that a translation depends on."""

    ABSENT = auto()
    """No value: a missing key, or anything of a guest."""
    EMPTY = auto()
    """The empty text."""
    TEXT = auto()
    """Any other text that doesn't look like a number."""
    DANGLING_ESCAPE = auto()
    """Such a text whose LIKE pattern would end within an escape, and so matches nothing."""
    NUMERIC_TEXT = auto()
    """A text that looks like a number."""
    FLOAT = auto()
    INTEGER = auto()
    """Booleans are integers, and so are whole numbers that no double holds."""

    @property
    def is_empty(self) -> bool:
        """Whether every value of the class is NULL or the empty text."""
        return self in {ParameterClass.ABSENT, ParameterClass.EMPTY}

    @property
    def is_number(self) -> bool:
        """Whether every value of the class is a number, not a text that looks like one."""
        return self in {ParameterClass.FLOAT, ParameterClass.INTEGER}


class SqlForm(Enum):
    """How a value is bound in SQL."""

    TEXT = "text"
    """Text as SQLite prints the value: ``5.0`` for the float, ``5`` for the integer."""
    NUMBER = "number"
    """Text of the number with all its digits, which fits numeric and double precision."""
    PATTERN = "pattern"
    """LIKE pattern: the text between two ``%`` with its wildcards escaped, or as it is."""
    UUID = "uuid"
    """Text if it is a canonical uuid, else NULL: compares as the text would, for an index."""
    INTEGER = "integer"
    """Text if it is a canonical 64-bit integer, else NULL; likewise."""
    JSON = "json"
    """Text of a JSON container with its keys in jsonb's order; other texts as they are."""


@dataclass(frozen=True, slots=True)
class Binding:
    """The parameter and form that a placeholder is bound to."""

    parameter: Parameter | CallerColumn
    form: SqlForm


def parameter_class(value: Scalar) -> ParameterClass:
    """Return the class of the value."""
    match value:
        case None:
            return ParameterClass.ABSENT
        case str():
            return _text_class(value)
        case int():
            return ParameterClass.INTEGER
        case float():
            return ParameterClass.FLOAT


def _text_class(text: str) -> ParameterClass:
    if not text:
        return ParameterClass.EMPTY
    if looks_numeric(text):
        return ParameterClass.NUMERIC_TEXT
    pattern = like_pattern(text)
    trailing_backslashes = len(pattern) - len(pattern.rstrip("\\"))
    return ParameterClass.DANGLING_ESCAPE if trailing_backslashes % 2 else ParameterClass.TEXT


def fixed_parameter_class(parameter: Parameter) -> ParameterClass | None:
    """Return the class that the parameter has for every request, or None if that differs."""
    match parameter:
        case LiteralParameter(value):
            return parameter_class(storable(value))
        case Macro():
            return ParameterClass.INTEGER if parameter in _TIME_PARTS else ParameterClass.TEXT
        case LiftedLiteral() | RequestValue():
            return None


_TIME_PARTS = frozenset(
    {Macro.SECOND, Macro.MINUTE, Macro.HOUR, Macro.DAY, Macro.MONTH, Macro.YEAR, Macro.WEEKDAY}
)
"""The macros that are integers. The others are dates as text."""
