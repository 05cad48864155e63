"""What a client is told when its request can't be served: PocketBase's words, in two languages.

The English is PocketBase's to the byte. The Chinese is that of the API document this program
started from, and in its manner where the document is silent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from pgrealtime.errors import PgRealtimeError

Language: TypeAlias = Literal["en", "zh"]


@dataclass(frozen=True, slots=True)
class Text:
    """One sentence, in each language."""

    en: str
    zh: str

    def in_language(self, language: Language) -> str:
        """Return the sentence."""
        return self.en if language == "en" else self.zh


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one member of a body."""

    code: str
    text: Text
    params: Mapping[str, int] = field(default_factory=dict)


Faults: TypeAlias = Mapping[str, "Fault | Faults"]
"""By member name; an element of a list by its zero based index, one level down."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A refusal: the status, the sentence, and the members at fault, if any."""

    status: int
    text: Text
    faults: Faults = field(default_factory=dict)


_SOMETHING_WENT_WRONG: Final = Text(
    "Something went wrong while processing your request.", "处理请求时出错。"
)

UNREADABLE: Final = Problem(400, _SOMETHING_WENT_WRONG)
NO_SUCH_ROUTE: Final = Problem(
    404, Text("The requested resource wasn't found.", "未找到请求的资源。")
)
NO_SUCH_FILE: Final = Problem(404, Text("File not found.", "文件未找到。"))
TOO_SLOW: Final = Problem(408, Text("Request timeout.", "请求超时。"))
TOO_MANY: Final = Problem(429, Text("Too Many Requests.", "请求过多。"))
TOO_LARGE: Final = Problem(413, Text("Request entity too large.", "请求体过大。"))
INTERNAL: Final = Problem(500, _SOMETHING_WENT_WRONG)

_UNAVAILABLE: Final = Problem(
    503, Text("Realtime is temporarily unavailable.", "实时服务暂时不可用。")
)

NO_TOKEN: Final = Problem(
    401,
    Text("The request requires valid record authorization token.", "请求需要有效的记录授权令牌。"),
)

_BY_CODE: Final[Mapping[str, Problem]] = {
    "body_unreadable": UNREADABLE,
    "client_unknown": Problem(
        404, Text("Missing or invalid client id.", "缺少或无效的客户端 ID。")
    ),
    "address_mismatch": Problem(400, Text("Invalid realtime client.", "无效的实时客户端。")),
    "authorization_mismatch": Problem(
        403,
        Text(
            "The current and the previous request authorization don't match.",
            "当前请求和之前的请求授权不匹配。",
        ),
    ),
    "guest_refused": NO_TOKEN,
    "stream_away": _UNAVAILABLE,
    "database_unreachable": _UNAVAILABLE,
}


class RefusedError(PgRealtimeError):
    """A request that gets this answer, found out on the way."""

    code = "request_refused"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text.en)
        self.problem = problem


def problem_of(error: PgRealtimeError) -> Problem:
    """Return what the client is told of this error; an unforeseen code is our own failure."""
    if isinstance(error, RefusedError):
        return error.problem
    return _BY_CODE.get(error.error_code, INTERNAL)


def invalid(faults: Faults) -> Problem:
    """Return the refusal of a body that could be read but doesn't hold."""
    return Problem(400, _SOMETHING_WENT_WRONG, faults)


_LIMITS: Final[Mapping[str, Text]] = {
    "views": Text(
        "A connection may have no more than {most} different fields and expand.",
        "每个连接的 fields 和 expand 组合不得超过 {most} 种。",
    ),
    "filter_characters": Text(
        "The filters of a connection must be no longer than {most} characters together.",
        "每个连接的过滤器总长度不得超过 {most} 个字符。",
    ),
    "asking_filters": Text(
        "A connection may have no more than {most} filters that need the database.",
        "每个连接需要查询数据库的过滤器不得超过 {most} 个。",
    ),
    "unindexed_filters": Text(
        "A connection may have no more than {most} filters without an equality.",
        "每个连接不含等值条件的过滤器不得超过 {most} 个。",
    ),
    "unindexed_filters_of_address": Text(
        "An address may have no more than {most} filters without an equality.",
        "每个地址不含等值条件的过滤器不得超过 {most} 个。",
    ),
}
"""Ours: PocketBase has no such limits."""


def limit_fault(limit: str, most: int) -> Fault:
    """Return what is wrong with a topic that is one too many of its kind."""
    text = _LIMITS[limit]
    told = Text(text.en.format(most=most), text.zh.format(most=most))
    return Fault("validation_limit_reached", told, {"max": most})


def encode(problem: Problem, language: Language) -> bytes:
    """Return the body of the answer: sorted members, no spaces, no newline at the end."""
    return json.dumps(
        {
            "data": _in_language(problem.faults, language),
            "message": problem.text.in_language(language),
            "status": problem.status,
        },
        ensure_ascii=False,
        separators=(",", ":"),
        sort_keys=True,
    ).encode()


def _in_language(faults: Faults, language: Language) -> dict[str, object]:
    return {
        name: _fault(entry, language) if isinstance(entry, Fault) else _in_language(entry, language)
        for name, entry in faults.items()
    }


def _fault(fault: Fault, language: Language) -> dict[str, object]:
    told: dict[str, object] = {"code": fault.code, "message": fault.text.in_language(language)}
    return {**told, "params": dict(fault.params)} if fault.params else told


def preferred_language(accept_language: str) -> Language:
    """Return the language an ``Accept-Language`` header asks for; English unless Chinese leads.

    Equal weights keep the order they are written in (RFC 9110, section 12.5.4).
    """
    weighted = [_weighted(entry) for entry in accept_language.split(",")]
    for tag, weight in sorted(weighted, key=lambda entry: -entry[1]):
        if weight > 0 and tag.partition("-")[0] in ("zh", "en", "*"):
            return "zh" if tag.startswith("zh") else "en"
    return "en"


def _weighted(entry: str) -> tuple[str, float]:
    tag, _, parameters = entry.partition(";")
    name, _, weight = parameters.partition("=")
    if name.strip().lower() != "q":
        return tag.strip().lower(), 1.0
    try:
        return tag.strip().lower(), float(weight)
    except ValueError:
        return tag.strip().lower(), 0.0
