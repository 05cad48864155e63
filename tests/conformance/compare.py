"""Compares what came with what was recorded: placeholders, bytes, JSON values, multisets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

PLACEHOLDER = re.compile(r"\{\{([A-Za-z0-9_.]+)\}\}")

PATTERNS = {
    "ts": r"\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2}\.\d{3}Z",
    "jwt": r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+",
}
"""What the placeholders of values that vary from run to run match."""


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Return the text with the remembered values inserted, ready to be sent.

    Raises:
        KeyError: A value was not remembered.
    """
    return PLACEHOLDER.sub(lambda found: variables[found[1]], text)


def pattern(text: str, variables: Mapping[str, str]) -> re.Pattern[str]:
    """Return an expression for the texts that an expected text matches."""
    parts: list[str] = []
    end = 0
    for found in PLACEHOLDER.finditer(text):
        parts.append(re.escape(text[end : found.start()]))
        name = found[1]
        parts.append(PATTERNS[name] if name in PATTERNS else re.escape(variables[name]))
        end = found.end()
    parts.append(re.escape(text[end:]))
    return re.compile("".join(parts), re.DOTALL)


def is_text_as_expected(expected: str, actual: bytes, variables: Mapping[str, str]) -> bool:
    """Return whether the bytes are the expected text in UTF-8."""
    try:
        text = actual.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return pattern(expected, variables).fullmatch(text) is not None


def is_json_as_expected(expected: str, actual: bytes, variables: Mapping[str, str]) -> bool:
    """Return whether both are JSON of equal value, ignoring member order and white space."""
    try:
        value = json.loads(actual)
    except ValueError:
        return False
    return _is_value_as_expected(json.loads(expected), value, variables)


def _is_value_as_expected(expected: Any, actual: Any, variables: Mapping[str, str]) -> bool:
    match expected:
        case str():
            wanted = pattern(expected, variables)
            return isinstance(actual, str) and wanted.fullmatch(actual) is not None
        case dict():
            return (
                isinstance(actual, dict)
                and expected.keys() == actual.keys()
                and all(_is_value_as_expected(expected[k], actual[k], variables) for k in expected)
            )
        case list():
            return (
                isinstance(actual, list)
                and len(expected) == len(actual)
                and all(map(_is_value_as_expected, expected, actual, [variables] * len(expected)))
            )
        case bool() | None:
            return expected is actual
        case _:
            return not isinstance(actual, bool) and bool(expected == actual)


def is_message_as_expected(
    expected: str, actual: bytes, variables: Mapping[str, str], how: Literal["bytes", "json"]
) -> bool:
    """Return whether an event is the expected one.

    With ``json`` its data may be spelt otherwise.
    """
    if how == "bytes":
        return is_text_as_expected(expected, actual, variables)
    wanted_head, _, wanted_data = expected.partition("\ndata:")
    head, found, data = actual.partition(b"\ndata:")
    return (
        bool(found)
        and is_text_as_expected(wanted_head, head, variables)
        and is_json_as_expected(wanted_data, data, variables)
    )


def are_messages_as_expected(
    expected: Sequence[str],
    actual: Sequence[bytes],
    variables: Mapping[str, str],
    *,
    how: Literal["bytes", "json"],
    order: Literal["given", "any"],
) -> bool:
    """Return whether the events are the expected ones, in the given order or as a multiset."""
    if len(expected) != len(actual):
        return False
    if order == "given":
        pairs = zip(expected, actual, strict=True)
        return all(is_message_as_expected(e, a, variables, how) for e, a in pairs)
    left = list(actual)
    for wanted in expected:
        found = [m for m in left if is_message_as_expected(wanted, m, variables, how)]
        if not found:
            return False
        left.remove(found[0])
    return True
