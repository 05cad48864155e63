"""The body of a login: from bytes to a checked ``LoginBody``. Used by ``api.login``."""

from __future__ import annotations

from collections.abc import Callable, Collection
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
from pgrealtime.protocol.form_json import fold_name, json_payloads, open_body, read_string_or_empty
from pgrealtime.protocol.forms import FormError, FormPair
from pgrealtime.protocol.json_reader import JsonError, JsonReader

_MAX_MEMBER_BYTES: Final = 255

LOGIN_UNREADABLE: Final = ErrorResponse(
    400,
    LocalizedText("An error occurred while loading the submitted data.", "加载提交的数据时出错。"),
)
_LOGIN_INVALID: Final = LocalizedText(
    "An error occurred while validating the submitted data.", "验证提交的数据时出错。"
)
_UNSUPPORTED_CONTENT_TYPE: Final = ErrorResponse(
    400, LocalizedText("Unsupported Content-Type.", "不支持的 Content-Type。")
)
_INVALID_VALUE: Final = MemberFault(
    "validation_in_invalid", LocalizedText("Must be a valid value.", "必须是有效的值。")
)


@dataclass(frozen=True, slots=True)
class LoginBody:
    """A login as submitted, unchecked. One without a body has the defaults."""

    identity: str = ""
    password: str = field(default="", repr=False)
    identity_field: str = ""


_ATTRIBUTE_BY_MEMBER: Final = {
    "identity": "identity",
    "password": "password",
    "identityField": "identity_field",
}


def parse_login_body(content_type: str, body: bytes, query: bytes) -> LoginBody:
    """Parse a body; for the arguments see ``form_json.open_body``.

    Raises:
        RequestRefusedError: It can't be read, or has an unknown content type.
    """
    try:
        match open_body(content_type, body, query):
            case JsonReader() as reader:
                return LoginBody(**_members_from_json(reader, fold_name))
            case list() as pairs:
                return LoginBody(**_members_from_form(pairs))
            case None:
                raise RequestRefusedError(_UNSUPPORTED_CONTENT_TYPE)
    except (JsonError, FormError) as error:
        raise RequestRefusedError(LOGIN_UNREADABLE) from error


def check_body_readable(content_type: str, body: bytes, query: bytes) -> None:
    """Check that a body can be read whose members don't matter; arguments as above.

    Raises:
        RequestRefusedError: It can't be read, or has an unknown content type.
    """
    try:
        match open_body(content_type, body, query):
            case JsonReader() as reader:
                _skip_object(reader)
            case list() as pairs:
                for reader in json_payloads(pairs):
                    _skip_object(reader)
            case None:
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
    members: dict[str, str] = {}
    for name in reader.members():
        attribute = known.get(normalize_name(name))
        if attribute is None:
            reader.skip()
        elif attribute in members:
            raise JsonError("repeated member")
        else:
            members[attribute] = read_string_or_empty(reader)
    return members


def _members_from_form(pairs: list[FormPair]) -> dict[str, str]:
    """Return the first value of each key, overwritten by ``@jsonPayload``; its null resets all."""
    members: dict[str, str] = {}
    for name, value in pairs:
        attribute = _ATTRIBUTE_BY_MEMBER.get(name.decode(errors="replace"))
        if attribute is not None:
            members.setdefault(attribute, value.decode(errors="replace"))
    for reader in json_payloads(pairs):
        members = {} if reader.consume_null() else members | _members_from_json(reader, str)
    return members


def check_login_body(call: LoginBody, identity_fields: Collection[str]) -> None:
    """Check the members of a call; the collection logs in by ``identity_fields``.

    Raises:
        RequestRefusedError: With all invalid members.
    """
    faults: dict[str, MemberFault | MemberFaults] = {
        name: BLANK_MEMBER if not text else length_out_of_range(1, _MAX_MEMBER_BYTES)
        for name, text in (("identity", call.identity), ("password", call.password))
        if not 0 < len(text.encode()) <= _MAX_MEMBER_BYTES
    }
    if len(call.identity_field.encode()) > _MAX_MEMBER_BYTES:
        faults["identityField"] = length_out_of_range(1, _MAX_MEMBER_BYTES)
    elif call.identity_field and call.identity_field not in identity_fields:
        faults["identityField"] = _INVALID_VALUE
    if faults:
        raise RequestRefusedError(ErrorResponse(400, _LOGIN_INVALID, faults))
