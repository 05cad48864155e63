"""Error responses of the API: PocketBase's statuses and messages, in two languages.

Raised by the routes as ``RequestRefusedError``; ``api.app`` encodes them. The English is
PocketBase's to the byte. The Chinese is that of the API document this program implements, and in
its style where the document has none.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias

from pgrealtime.errors import PgRealtimeError

Language: TypeAlias = Literal["en", "zh"]


@dataclass(frozen=True, slots=True)
class MemberFault:
    """Why one member of a body is invalid, in each language."""

    code: str
    en: str
    zh: str
    params: Mapping[str, int] = field(default_factory=dict)


MemberFaults: TypeAlias = Mapping[str, "MemberFault | MemberFaults"]
"""By member name; one level below a list, by the index of the element."""


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """Status and body of an error response, in each language."""

    status: int
    en: str
    zh: str
    member_faults: MemberFaults = field(default_factory=dict)


BAD_REQUEST: Final = ErrorResponse(
    400, "Something went wrong while processing your request.", "处理请求时出错。"
)
COLLECTION_NOT_FOUND: Final = ErrorResponse(404, "Missing collection context.", "缺少集合上下文。")
SUPERUSERS_ONLY: Final = ErrorResponse(
    403, "Only superusers can perform this action.", "只有超级用户可以执行此操作。"
)
TOKEN_REQUIRED: Final = ErrorResponse(
    401, "The request requires valid record authorization token.", "请求需要有效的记录授权令牌。"
)
ROUTE_NOT_FOUND: Final = ErrorResponse(
    404, "The requested resource wasn't found.", "未找到请求的资源。"
)
COLLECTION_INVALID: Final = ErrorResponse(
    404, "Missing or invalid collection context.", "缺少或无效的集合上下文。"
)
"""Of the routes that log in, create or update; the others say less."""
FILE_NOT_FOUND: Final = ErrorResponse(404, "File not found.", "文件未找到。")
UNSUPPORTED_CONTENT_TYPE: Final = ErrorResponse(
    400, "Unsupported Content-Type.", "不支持的 Content-Type。"
)
REQUEST_TIMEOUT: Final = ErrorResponse(408, "Request timeout.", "请求超时。")
BODY_TOO_LARGE: Final = ErrorResponse(413, "Request entity too large.", "请求体过大。")
TOO_MANY_REQUESTS: Final = ErrorResponse(429, "Too Many Requests.", "请求过多。")
INTERNAL_ERROR: Final = replace(BAD_REQUEST, status=500)
_UNAVAILABLE: Final = ErrorResponse(
    503, "Realtime is temporarily unavailable.", "实时服务暂时不可用。"
)

_RESPONSE_BY_CODE: Final = {
    "body_unreadable": BAD_REQUEST,
    "client_unknown": ErrorResponse(
        404, "Missing or invalid client id.", "缺少或无效的客户端 ID。"
    ),
    "address_mismatch": ErrorResponse(400, "Invalid realtime client.", "无效的实时客户端。"),
    "authorization_mismatch": ErrorResponse(
        403,
        "The current and the previous request authorization don't match.",
        "当前请求和之前的请求授权不匹配。",
    ),
    "guest_refused": TOKEN_REQUIRED,
    "read_collection_unknown": COLLECTION_NOT_FOUND,
    "read_locked": SUPERUSERS_ONLY,
    "read_reserved_request": ErrorResponse(
        403, "Only superusers can filter by @request.", "只有超级用户可以按 @request 过滤。"
    ),
    "read_reserved_collection": ErrorResponse(
        403, "Only superusers can filter by @collection.", "只有超级用户可以按 @collection 过滤。"
    ),
    "read_invalid": BAD_REQUEST,
    "record_unknown": ROUTE_NOT_FOUND,
    "stream_away": _UNAVAILABLE,
    "database_unreachable": _UNAVAILABLE,
    "holder_silent": _UNAVAILABLE,
}


class RequestRefusedError(PgRealtimeError):
    """The request gets this response."""

    code = "request_refused"

    def __init__(self, error_response: ErrorResponse) -> None:
        super().__init__(error_response.en)
        self.error_response = error_response


def error_response_of(error: PgRealtimeError) -> ErrorResponse:
    """Return the response for an error; an unexpected code is an internal error."""
    if isinstance(error, RequestRefusedError):
        return error.error_response
    return _RESPONSE_BY_CODE.get(error.error_code, INTERNAL_ERROR)


def invalid_members(faults: MemberFaults) -> ErrorResponse:
    """Return the response for a body with invalid members."""
    return replace(BAD_REQUEST, member_faults=faults)


_LIMIT_TEXTS: Final = {
    "views": (
        "A connection may have no more than {most} different fields and expand.",
        "每个连接的 fields 和 expand 组合不得超过 {most} 种。",
    ),
    "filter_characters": (
        "The filters of a connection must be no longer than {most} characters together.",
        "每个连接的过滤器总长度不得超过 {most} 个字符。",
    ),
    "asking_filters": (
        "A connection may have no more than {most} filters that need the database.",
        "每个连接需要查询数据库的过滤器不得超过 {most} 个。",
    ),
    "unindexed_filters": (
        "A connection may have no more than {most} filters without an equality.",
        "每个连接不含等值条件的过滤器不得超过 {most} 个。",
    ),
    "unindexed_filters_of_address": (
        "An address may have no more than {most} filters without an equality.",
        "每个地址不含等值条件的过滤器不得超过 {most} 个。",
    ),
}
"""Limits of this program; PocketBase has none of them."""


def limit_reached(limit_name: str, maximum: int) -> MemberFault:
    """Return the fault of a topic that exceeds the limit."""
    en, zh = (text.format(most=maximum) for text in _LIMIT_TEXTS[limit_name])
    return MemberFault("validation_limit_reached", en, zh, {"max": maximum})


def encode_error_response(error_response: ErrorResponse, language: Language) -> bytes:
    """Return the response's JSON: sorted members, no blanks, no final newline."""
    return json.dumps(
        {
            "data": _encode_faults(error_response.member_faults, language),
            "message": _message_of(error_response, language),
            "status": error_response.status,
        },
        ensure_ascii=False,
        separators=(",", ":"),
        sort_keys=True,
    ).encode()


def _encode_faults(faults: MemberFault | MemberFaults, language: Language) -> dict[str, object]:
    if not isinstance(faults, MemberFault):
        return {name: _encode_faults(entry, language) for name, entry in faults.items()}
    members: dict[str, object] = {"code": faults.code, "message": _message_of(faults, language)}
    return {**members, "params": faults.params} if faults.params else members


def _message_of(error: ErrorResponse | MemberFault, language: Language) -> str:
    return error.en if language == "en" else error.zh


def preferred_language(accept_language: str) -> Language:
    """Return the preferred language of an ``Accept-Language`` header, English by default.

    Equal weights keep the order they are written in (RFC 9110, section 12.5.4).
    """
    weighted = [_parse_language_range(entry) for entry in accept_language.split(",")]
    for tag, weight in sorted(weighted, key=lambda entry: -entry[1]):
        if weight > 0 and tag.partition("-")[0] in ("zh", "en", "*"):
            return "zh" if tag.startswith("zh") else "en"
    return "en"


def _parse_language_range(entry: str) -> tuple[str, float]:
    tag, _, parameters = entry.lower().partition(";")
    name, _, weight = parameters.partition("=")
    if name.strip() != "q":
        return tag.strip(), 1.0
    try:
        return tag.strip(), float(weight)
    except ValueError:
        return tag.strip(), 0.0


BLANK_MEMBER: Final = MemberFault("validation_required", "Cannot be blank.", "缺少必填值。")
"""The fault of a required member that is missing or empty."""


MAX_TEXT_BYTES: Final = 255

LENGTH_OUT_OF_RANGE: Final = MemberFault(
    "validation_length_out_of_range",
    "The length must be between 1 and 255.",
    "长度必须在 1 到 255 之间。",
    {"max": MAX_TEXT_BYTES, "min": 1},
)
"""The fault of a text of more bytes than these."""


def length_too_long(maximum: int) -> MemberFault:
    """Return the fault of a text of too many bytes, or a list of too many elements."""
    return MemberFault(
        "validation_length_too_long",
        f"The length must be no more than {maximum}.",
        f"长度不得超过 {maximum}。",
        {"max": maximum, "min": 0},
    )
