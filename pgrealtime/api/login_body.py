"""The body of a login: from bytes to a checked ``LoginAttempt``. Used by ``api.login``."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final

from pgrealtime.api import error_responses
from pgrealtime.api.error_responses import ErrorResponse, MemberFault, RequestRefusedError
from pgrealtime.auth.login import LoginAttempt
from pgrealtime.protocol.forms import FormError, bind_body
from pgrealtime.protocol.json_reader import JsonError

_MEMBERS: Final = {"identity": False, "password": False, "identityField": False}

LOGIN_UNREADABLE: Final = ErrorResponse(
    400, "An error occurred while loading the submitted data.", "加载提交的数据时出错。"
)
_LOGIN_INVALID: Final = ErrorResponse(
    400, "An error occurred while validating the submitted data.", "验证提交的数据时出错。"
)
_INVALID_VALUE: Final = MemberFault(
    "validation_in_invalid", "Must be a valid value.", "必须是有效的值。"
)


def parse_login_body(content_type: str, body: bytes, query: bytes) -> LoginAttempt:
    """Parse a body, unchecked; for the arguments see ``bind_body``.

    Raises:
        RequestRefusedError: It can't be read, or has an unknown content type.
    """
    members = _bind_members(content_type, body, query, _MEMBERS, LOGIN_UNREADABLE)
    identity, password, identity_field = (members.get(name, [""])[0] for name in _MEMBERS)
    return LoginAttempt(identity=identity, password=password, identity_field=identity_field)


def check_body_readable(content_type: str, body: bytes, query: bytes) -> None:
    """Check that a body can be read whose members don't matter; as ``parse_login_body``."""
    _bind_members(content_type, body, query, {}, error_responses.BAD_REQUEST)


def _bind_members(
    content_type: str,
    body: bytes,
    query: bytes,
    is_list_by_name: Mapping[str, bool],
    if_unreadable: ErrorResponse,
) -> Mapping[str, list[str]]:
    try:
        members = bind_body(content_type, body, query, is_list_by_name)
    except (JsonError, FormError) as error:
        raise RequestRefusedError(if_unreadable) from error
    if members is None:
        raise RequestRefusedError(error_responses.UNSUPPORTED_CONTENT_TYPE)
    return members


def check_login_body(attempt: LoginAttempt, identity_fields: Collection[str]) -> None:
    """Check the members of a login to a collection that logs in by ``identity_fields``.

    Raises:
        RequestRefusedError: With all invalid members.
    """
    faults: dict[str, MemberFault | error_responses.MemberFaults] = {
        name: error_responses.BLANK_MEMBER if not text else error_responses.LENGTH_OUT_OF_RANGE
        for name, text in (("identity", attempt.identity), ("password", attempt.password))
        if not 0 < len(text.encode()) <= error_responses.MAX_TEXT_BYTES
    }
    if len(attempt.identity_field.encode()) > error_responses.MAX_TEXT_BYTES:
        faults["identityField"] = error_responses.LENGTH_OUT_OF_RANGE
    elif attempt.identity_field and attempt.identity_field not in identity_fields:
        faults["identityField"] = _INVALID_VALUE
    if faults:
        raise RequestRefusedError(replace(_LOGIN_INVALID, member_faults=faults))
