"""The body of a login: from bytes to a checked ``LoginCall``, as the subscribe call's is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from pgrealtime.api import problems
from pgrealtime.api.body import BLANK, folded, out_of_range, payloads, string_or_empty
from pgrealtime.api.problems import Fault, Faults, Problem, RefusedError, Text
from pgrealtime.protocol.forms import FormError, form_pairs
from pgrealtime.protocol.json_reader import JsonError, JsonReader

_FORMS: Final = ("multipart/form-data", "application/x-www-form-urlencoded")
_LONGEST: Final = 255
"""Bytes of each member."""

UNREADABLE: Final = Problem(
    400,
    Text("An error occurred while loading the submitted data.", "加载提交的数据时出错。"),
)
_UNKNOWN_TYPE: Final = Problem(400, Text("Unsupported Content-Type.", "不支持的 Content-Type。"))
_NOT_ONE_OF_THEM: Final = Fault(
    "validation_in_invalid", Text("Must be a valid value.", "必须是有效的值。")
)


@dataclass(frozen=True, slots=True)
class LoginCall:
    """What a client submitted, as it submitted it."""

    identity: str = ""
    password: str = field(default="", repr=False)
    identity_field: str = ""


_MEMBERS: Final = {
    "identity": "identity",
    "password": "password",
    "identityField": "identity_field",
}


def read_login(content_type: str, body: bytes, query: bytes) -> LoginCall:
    """Return what the body says; see ``body.read_call``, whose readers these are.

    Raises:
        RefusedError: It can't be read, or is of a type that isn't known.
    """
    try:
        if content_type.startswith("application/json"):
            return LoginCall(**_members(JsonReader(body), folded))
        if content_type.startswith(_FORMS):
            return LoginCall(**_from_form(form_pairs(content_type, body, query)))
    except (JsonError, FormError) as error:
        raise RefusedError(UNREADABLE) from error
    raise RefusedError(_UNKNOWN_TYPE)


def check_readable(content_type: str, body: bytes, query: bytes) -> None:
    """Let pass what can be read, for a call that wants nothing of it.

    Raises:
        RefusedError: It can't be read, or is of a type that isn't known.
    """
    try:
        if content_type.startswith("application/json"):
            _skip_object(JsonReader(body))
        elif content_type.startswith(_FORMS):
            for reader in payloads(form_pairs(content_type, body, query)):
                _skip_object(reader)
        else:
            raise RefusedError(_UNKNOWN_TYPE)
    except (JsonError, FormError) as error:
        raise RefusedError(problems.UNREADABLE) from error


def _skip_object(reader: JsonReader) -> None:
    if not reader.null():
        for _name in reader.members():
            reader.skip()


def _members(reader: JsonReader, spelled: Callable[[str], str]) -> dict[str, str]:
    if reader.null():
        return {}
    known = {spelled(name): attribute for name, attribute in _MEMBERS.items()}
    found: dict[str, str] = {}
    for name in reader.members():
        attribute = known.get(spelled(name))
        if attribute is None:
            reader.skip()
        elif attribute in found:
            raise JsonError("repeated member")
        else:
            found[attribute] = string_or_empty(reader)
    return found


def _from_form(pairs: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """The first value of each key counts; ``@jsonPayload`` overwrites them, null empties all."""
    found: dict[str, str] = {}
    for name, value in pairs:
        attribute = _MEMBERS.get(name.decode(errors="replace"))
        if attribute is not None:
            found.setdefault(attribute, value.decode(errors="replace"))
    for reader in payloads(pairs):
        found = {} if reader.null() else found | _members(reader, str)
    return found


def check(call: LoginCall, identity_fields: Collection[str]) -> None:
    """Let pass what can be tried.

    Args:
        call: As read.
        identity_fields: What people of this collection log in by.

    Raises:
        RefusedError: With everything that is wrong.
    """
    texts: Mapping[str, str] = {"identity": call.identity, "password": call.password}
    faults: Faults = {
        name: BLANK if not text else out_of_range(1, _LONGEST)
        for name, text in texts.items()
        if not 0 < len(text.encode()) <= _LONGEST
    }
    if len(call.identity_field.encode()) > _LONGEST:
        faults = {**faults, "identityField": out_of_range(1, _LONGEST)}
    elif call.identity_field and call.identity_field not in identity_fields:
        faults = {**faults, "identityField": _NOT_ONE_OF_THEM}
    if faults:
        message = Text(
            "An error occurred while validating the submitted data.", "验证提交的数据时出错。"
        )
        raise RefusedError(Problem(400, message, faults))
