"""Removes secrets and row values from log lines, as the last step before they are written."""

import re
import traceback
from collections.abc import Iterator, Mapping

REDACTED = "[hidden]"

_SECRET_WORDS = frozenset(
    ("authorization", "cookie", "jwt", "passwd", "password", "secret", "secrets", "token")
)
_WORD = re.compile(r"[a-z0-9]+")

_SECRET_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # A JSON Web Token, wherever it stands: its header is the base64 of '{"'.
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*"), REDACTED),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]+"), rf"\1 {REDACTED}"),
    # The password of a URL. Greedy: an unescaped "@" in it is no reason to show the rest.
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@]*:)\S*@"), rf"\1{REDACTED}@"),
    # libpq's keyword form, URL parameters, and key=value in messages.
    (
        re.compile(
            r"(?i)\b((?:\w+_)?(?:password|passwd|secret|token))(\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&,;]+)"
        ),
        rf"\1\2{REDACTED}",
    ),
)

_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters except tab and line feed: a terminal would interpret them."""

_SQLSTATES_WITHOUT_VALUES = (
    *("08", "0A", "25", "26", "28", "3D", "3F", "40", "42", "53", "54", "55", "57", "58"),
)
"""SQLSTATE classes whose messages name objects, settings and limits. Messages of other classes may
quote a row: data exceptions, violated constraints, errors that functions raise, and internal errors
(coordinates in PostGIS' messages, memory in "pfree called with invalid pointer")."""


def redact(value: object, *, key: str = "") -> object:
    """Return the value with everything that looks like a token or a password redacted.

    Mappings and sequences are looked through. Everything under a key such as ``previous_secret``
    or ``token_key`` is hidden unless it is a number, a boolean or None.
    """
    match value:
        case bool() | int() | float() | None:
            return value
        case _ if not _SECRET_WORDS.isdisjoint(_WORD.findall(key.lower().replace("_", " "))):
            return REDACTED
        case str():
            return redact_text(value)
        case Mapping():
            return {str(name): redact(inner, key=str(name)) for name, inner in value.items()}
        case list() | tuple() | set() | frozenset():
            return [redact(inner) for inner in value]
        case BaseException():
            return describe_exception(value)
        case _:
            return redact_text(str(value))


def redact_text(text: str) -> str:
    """Return the text with tokens and passwords redacted."""
    for pattern, replacement in _SECRET_PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def describe_exception(error: BaseException) -> str:
    """Return class and message; of a database error only what can't quote a row."""
    name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    text = message_without_values(error)
    return f"{name}: {text}" if text else redact_text(name)


def is_free_of_row_values(sqlstate: str) -> bool:
    """Whether the server's own messages of the SQLSTATE's class don't quote rows."""
    return sqlstate.startswith(_SQLSTATES_WITHOUT_VALUES)


def message_without_values(error: BaseException) -> str:
    """Return the message; of a database error the SQLSTATE, and what can't quote a row.

    A function can raise an error of any class; errors raised in a function have a context.
    """
    sqlstate = getattr(error, "sqlstate", None)
    if not isinstance(sqlstate, str):
        text = str(error)
    else:
        diagnostic = getattr(error, "diag", None)
        primary = getattr(diagnostic, "message_primary", None)
        is_plain = is_free_of_row_values(sqlstate) and not getattr(diagnostic, "context", None)
        text = f"SQLSTATE {sqlstate}: {primary}" if primary and is_plain else f"SQLSTATE {sqlstate}"
    return redact_text(_CONTROL_CHARACTER.sub(lambda match: f"\\x{ord(match[0]):02x}", text))


def describe_traceback(error: BaseException) -> str:
    """Return the traceback as Python prints it, with causes and groups, but with messages redacted.

    Python's own formatting would print a database error's message in full; other formatters add
    local variables, which hold rows and tokens.
    """
    return "".join(_traceback_lines(error, seen=set())).rstrip("\n")


def _traceback_lines(error: BaseException, *, seen: set[int]) -> Iterator[str]:
    seen.add(id(error))
    cause = error.__cause__
    context = None if error.__suppress_context__ else error.__context__
    if cause is not None and id(cause) not in seen:
        yield from _traceback_lines(cause, seen=seen)
        yield "\nThe above exception was the direct cause of the following exception:\n\n"
    elif context is not None and id(context) not in seen:
        yield from _traceback_lines(context, seen=seen)
        yield "\nDuring handling of the above exception, another exception occurred:\n\n"
    if error.__traceback__ is not None:
        yield "Traceback (most recent call last):\n"
        yield from traceback.format_tb(error.__traceback__)
    yield describe_exception(error) + "\n"
    if isinstance(error, BaseExceptionGroup):
        for number, inner in enumerate(error.exceptions, start=1):
            yield f"  [{number}]\n"
            for line in _traceback_lines(inner, seen=seen):
                yield "".join(f"  {part}" for part in line.splitlines(keepends=True))


def raise_location(error: BaseException) -> str:
    """Return the file and line that raised an error: its message and traceback may show a row."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"
