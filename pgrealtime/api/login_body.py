"""The body of a login: from bytes to a checked ``LoginCall``, as the subscribe call's is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from pgrealtime.api.error_responses import (
    BAD_REQUEST,
    BLANK_MEMBER,
    ErrorResponse,
    LocalizedText,
    MemberFault,
    MemberFaults,
    RequestRefusedError,
    length_out_of_range,
)
from pgrealtime.protocol.form_json import fold_name, json_payloads, read_string_or_empty
from pgrealtime.protocol.forms import FormError, parse_form
from pgrealtime.protocol.json_reader import JsonError, JsonReader

_FORM_CONTENT_TYPES: Final = ("multipart/form-data", "application/x-www-form-urlencoded")
_MAX_MEMBER_BYTES: Final = 255
"""Bytes of each member."""

LOGIN_UNREADABLE: Final = ErrorResponse(
    400,
    LocalizedText("An error occurred while loading the submitted data.", "加载提交的数据时出错。"),
)
_UNSUPPORTED_CONTENT_TYPE: Final = ErrorResponse(
    400, LocalizedText("Unsupported Content-Type.", "不支持的 Content-Type。")
)
_INVALID_VALUE: Final = MemberFault(
    "validation_in_invalid", LocalizedText("Must be a valid value.", "必须是有效的值。")
)


@dataclass(frozen=True, slots=True)
class LoginCall:
    """What a client submitted, as it submitted it."""

    identity: str = ""
    password: str = field(default="", repr=False)
    identity_field: str = ""


_ATTRIBUTE_BY_MEMBER: Final = {
    "identity": "identity",
    "password": "password",
    "identityField": "identity_field",
}


def parse_login_call(content_type: str, body: bytes, query: bytes) -> LoginCall:
    """Return what the body says; see ``body.parse_subscribe_call``, whose readers these are.

    Raises:
        RequestRefusedError: It can't be read, or is of a type that isn't known.
    """
    try:
        if content_type.startswith("application/json"):
            return LoginCall(**_members_from_json(JsonReader(body), fold_name))
        if content_type.startswith(_FORM_CONTENT_TYPES):
            return LoginCall(**_members_from_form(parse_form(content_type, body, query)))
    except (JsonError, FormError) as error:
        raise RequestRefusedError(LOGIN_UNREADABLE) from error
    raise RequestRefusedError(_UNSUPPORTED_CONTENT_TYPE)


def check_body_readable(content_type: str, body: bytes, query: bytes) -> None:
    """Let pass what can be read, for a call that wants nothing of it.

    Raises:
        RequestRefusedError: It can't be read, or is of a type that isn't known.
    """
    try:
        if content_type.startswith("application/json"):
            _skip_object(JsonReader(body))
        elif content_type.startswith(_FORM_CONTENT_TYPES):
            for reader in json_payloads(parse_form(content_type, body, query)):
                _skip_object(reader)
        else:
            raise RequestRefusedError(_UNSUPPORTED_CONTENT_TYPE)
    except (JsonError, FormError) as error:
        raise RequestRefusedError(BAD_REQUEST) from error


def _skip_object(reader: JsonReader) -> None:
    if not reader.consume_null():
        for _name in reader.members():
            reader.skip()


def _members_from_json(reader: JsonReader, normalize_name: Callable[[str], str]) -> dict[str, str]:
    if reader.consume_null():
        return {}
    known = {normalize_name(name): attribute for name, attribute in _ATTRIBUTE_BY_MEMBER.items()}
    found: dict[str, str] = {}
    for name in reader.members():
        attribute = known.get(normalize_name(name))
        if attribute is None:
            reader.skip()
        elif attribute in found:
            raise JsonError("repeated member")
        else:
            found[attribute] = read_string_or_empty(reader)
    return found


def _members_from_form(pairs: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """The first value of each key counts; ``@jsonPayload`` overwrites them, null empties all."""
    found: dict[str, str] = {}
    for name, value in pairs:
        attribute = _ATTRIBUTE_BY_MEMBER.get(name.decode(errors="replace"))
        if attribute is not None:
            found.setdefault(attribute, value.decode(errors="replace"))
    for reader in json_payloads(pairs):
        found = {} if reader.consume_null() else found | _members_from_json(reader, str)
    return found


def check_login_call(call: LoginCall, identity_fields: Collection[str]) -> None:
    """Let pass what can be tried.

    Args:
        call: As read.
        identity_fields: What people of this collection log in by.

    Raises:
        RequestRefusedError: With everything that is wrong.
    """
    texts: Mapping[str, str] = {"identity": call.identity, "password": call.password}
    faults: MemberFaults = {
        name: BLANK_MEMBER if not text else length_out_of_range(1, _MAX_MEMBER_BYTES)
        for name, text in texts.items()
        if not 0 < len(text.encode()) <= _MAX_MEMBER_BYTES
    }
    if len(call.identity_field.encode()) > _MAX_MEMBER_BYTES:
        faults = {**faults, "identityField": length_out_of_range(1, _MAX_MEMBER_BYTES)}
    elif call.identity_field and call.identity_field not in identity_fields:
        faults = {**faults, "identityField": _INVALID_VALUE}
    if faults:
        message = LocalizedText(
            "An error occurred while validating the submitted data.", "验证提交的数据时出错。"
        )
        raise RequestRefusedError(ErrorResponse(400, message, faults))
