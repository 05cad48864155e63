"""What a rule leaves open: where each value comes from, its class, and its forms in SQL.

A translation depends on the classes (``Shape``) of its parameters, never on their values. So one
translation serves every subscriber whose values have the same classes.
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
    """A literal of the text, known with it."""

    value: str | float


@dataclass(frozen=True, slots=True)
class LiftedLiteral:
    """The n-th literal of a text that was compiled without its literals."""

    index: int


@dataclass(frozen=True, slots=True)
class RequestValue:
    """A constant of ``@request``: ``("query", "k")``, ``("auth", "id")``, ``("context",)``."""

    path: tuple[str, ...]
    is_read_as_number: bool = False
    """It bears the name of a number field, so a text that is a number becomes one."""
    is_lower: bool = False
    is_isset: bool = False
    """Not the value, but 1 or 0 for whether there is one."""


class Macro(Enum):
    """A moment or a part of one, UTC; taken once per batch of changes."""

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
    """A column of the subscriber's own row, handed over in text form."""

    name: str
    """Empty: not a column, but NULL if there is no such row."""


MACROS: dict[str, Macro] = {macro.value: macro for macro in Macro}


class ParameterClass(Enum):
    """The class of a parameter's value: all that a translation depends on."""

    ABSENT = auto()
    """No value: a missing key, anything of a guest."""
    EMPTY = auto()
    """The empty text."""
    TEXT = auto()
    """Any other text that doesn't look like a number."""
    DANGLING_ESCAPE = auto()
    """Such a text whose LIKE pattern would end within an escape, and so can match nothing."""
    NUMERIC_TEXT = auto()
    """A text that looks like a number."""
    FLOAT = auto()
    """A float."""
    INTEGER = auto()
    """An integer; flags are such, and whole numbers that no double holds."""

    @property
    def is_empty(self) -> bool:
        """Known to be NULL or the empty text before anything runs."""
        return self in {ParameterClass.ABSENT, ParameterClass.EMPTY}

    @property
    def is_number(self) -> bool:
        """A number, not a text that looks like one."""
        return self in {ParameterClass.FLOAT, ParameterClass.INTEGER}


class SqlForm(Enum):
    """How a value is handed to Postgres."""

    TEXT = "text"
    """Text as SQLite shows the value: ``5.0`` for the float, ``5`` for the integer."""
    NUMBER = "number"
    """Text of the number with all its digits, which fits numeric and double precision."""
    PATTERN = "pattern"
    """LIKE pattern: the text between two ``%`` with its wildcards escaped, or as it is."""
    UUID = "uuid"
    """Text if it is a canonical uuid, else NULL: compares as the text would, for an index."""
    INTEGER = "integer"
    """Text if it is a canonical 64-bit integer, else NULL."""
    JSON = "json"
    """Text of a JSON container with its keys in jsonb's order; other texts as they are."""


@dataclass(frozen=True, slots=True)
class Binding:
    """A placeholder's content."""

    parameter: Parameter | CallerColumn
    form: SqlForm


def parameter_class(content: Scalar) -> ParameterClass:
    """Return the class of the value."""
    match content:
        case None:
            return ParameterClass.ABSENT
        case str():
            return _text_class(content)
        case int():
            return ParameterClass.INTEGER
        case float():
            return ParameterClass.FLOAT


def fixed_parameter_class(parameter: Parameter) -> ParameterClass | None:
    """Return the class that the parameter has for everybody, or None if that differs."""
    match parameter:
        case LiteralParameter(constant):
            return parameter_class(storable(constant))
        case Macro():
            is_text = parameter in _DATE_MACROS
            return ParameterClass.TEXT if is_text else ParameterClass.INTEGER
        case LiftedLiteral() | RequestValue():
            return None


# --- texts and numbers as SQLite has them


def _text_class(text: str) -> ParameterClass:
    if not text:
        return ParameterClass.EMPTY
    if looks_numeric(text):
        return ParameterClass.NUMERIC_TEXT
    made = like_pattern(text)
    trailing = len(made) - len(made.rstrip("\\"))
    return ParameterClass.DANGLING_ESCAPE if trailing % 2 else ParameterClass.TEXT


# --- the subscriber and the moment


_DATE_MACROS = {
    Macro.NOW,
    Macro.YESTERDAY,
    Macro.TOMORROW,
    Macro.TODAY_START,
    Macro.TODAY_END,
    Macro.MONTH_START,
    Macro.MONTH_END,
    Macro.YEAR_START,
    Macro.YEAR_END,
}
"""The macros that are texts; the others are integers."""
