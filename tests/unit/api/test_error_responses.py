"""The bodies of error responses, byte for byte, in both languages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules

import pytest

from pgrealtime import api
from pgrealtime.api.error_responses import (
    INTERNAL_ERROR,
    ErrorResponse,
    Language,
    MemberFault,
    RequestRefusedError,
    encode_error_response,
    error_response_of,
    invalid_members,
    preferred_language,
)
from pgrealtime.errors import DatabaseUnreachableError, SetupError, SubscriptionError


@pytest.mark.parametrize(
    ("code", "english", "chinese"),
    [
        (
            "client_unknown",
            '{"data":{},"message":"Missing or invalid client id.","status":404}',
            '{"data":{},"message":"缺少或无效的客户端 ID。","status":404}',
        ),
        (
            "authorization_mismatch",
            (
                '{"data":{},"message":"The current and the previous request authorization don\'t '
                'match.","status":403}'
            ),
            '{"data":{},"message":"当前请求和之前的请求授权不匹配。","status":403}',
        ),
        (
            "address_mismatch",
            '{"data":{},"message":"Invalid realtime client.","status":400}',
            '{"data":{},"message":"无效的实时客户端。","status":400}',
        ),
        (
            "body_unreadable",
            (
                '{"data":{},"message":"Something went wrong while processing your request.",'
                '"status":400}'
            ),
            '{"data":{},"message":"处理请求时出错。","status":400}',
        ),
        (
            "read_locked",
            '{"data":{},"message":"Only superusers can perform this action.","status":403}',
            '{"data":{},"message":"只有超级用户可以执行此操作。","status":403}',
        ),
        (
            "read_reserved_request",
            '{"data":{},"message":"Only superusers can filter by @request.","status":403}',
            '{"data":{},"message":"只有超级用户可以按 @request 过滤。","status":403}',
        ),
        (
            "read_reserved_collection",
            '{"data":{},"message":"Only superusers can filter by @collection.","status":403}',
            '{"data":{},"message":"只有超级用户可以按 @collection 过滤。","status":403}',
        ),
        (
            "record_unknown",
            '{"data":{},"message":"The requested resource wasn\'t found.","status":404}',
            '{"data":{},"message":"未找到请求的资源。","status":404}',
        ),
        (
            "stream_away",
            '{"data":{},"message":"Realtime is temporarily unavailable.","status":503}',
            '{"data":{},"message":"实时服务暂时不可用。","status":503}',
        ),
    ],
)
def test_refused_calls_say_why(code: str, english: str, chinese: str) -> None:
    """Status and message by the error's code, as PocketBase has them."""
    response = error_response_of(SubscriptionError("whatever", code=code))

    assert encode_error_response(response, "en").decode() == english
    assert encode_error_response(response, "zh").decode() == chinese


def test_a_text_has_one_translation_whichever_route_says_it() -> None:
    """One Chinese text for an English one, and both are sentences."""
    pairs = {(_message(one, "en"), _message(one, "zh")) for one in _all_responses()}

    assert len(pairs) > 20
    assert len({english for english, _ in pairs}) == len(pairs)
    assert [pair for pair in pairs if not (pair[0].endswith(".") and pair[1].endswith("。"))] == []


def _all_responses() -> Iterator[ErrorResponse]:
    for module in iter_modules(api.__path__, "pgrealtime.api."):
        for value in vars(import_module(module.name)).values():
            if isinstance(value, ErrorResponse):
                yield value
            elif isinstance(value, Mapping):
                yield from (one for one in value.values() if isinstance(one, ErrorResponse))


def _message(error_response: ErrorResponse, language: Language) -> str:
    return str(json.loads(encode_error_response(error_response, language))["message"])


def test_faults_are_nested_and_sorted() -> None:
    """Faults of elements are under their index as text; all objects are sorted (protocol, 1.4)."""
    fault = MemberFault("some_code", "Wrong.", "错。", {"min": 1, "max": 2})
    response = invalid_members(
        {"b": fault, "a": {"10": fault, "9": MemberFault("other", "No.", "不。")}}
    )

    assert encode_error_response(response, "en").decode() == (
        '{"data":{"a":{"10":{"code":"some_code","message":"Wrong.","params":{"max":2,"min":1}},'
        '"9":{"code":"other","message":"No."}},'
        '"b":{"code":"some_code","message":"Wrong.","params":{"max":2,"min":1}}},'
        '"message":"Something went wrong while processing your request.","status":400}'
    )


def test_unexpected_error_exposes_nothing() -> None:
    """Its message, detail and hint are for the log only."""
    error = SetupError('permission denied for table "secrets"', detail="a row", hint="GRANT")

    assert error_response_of(error) is INTERNAL_ERROR
    assert b"secrets" not in encode_error_response(error_response_of(error), "en")


def test_unreachable_database_is_temporary() -> None:
    """Status 503: after a 500 a client wouldn't retry."""
    assert error_response_of(DatabaseUnreachableError("gone")).status == 503


def test_refusal_found_on_the_way_is_what_is_answered() -> None:
    """A refusal raised inside of a handler has its own response."""
    response = invalid_members({})

    assert error_response_of(RequestRefusedError(response)) is response


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("", "en"),
        ("en-US", "en"),
        ("zh", "zh"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("ZH-Hant-TW", "zh"),
        ("en-US,en;q=0.9,zh-CN;q=0.8", "en"),
        ("en;q=0.5, zh;q=0.8", "zh"),
        ("de,fr;q=0.9,zh;q=0.2", "zh"),
        ("de", "en"),
        ("*", "en"),
        ("zh;q=0", "en"),
        ("zh;q=0.0,en;q=0.1", "en"),
        ("zh;q=x,en", "en"),
        (";;;,,q=1", "en"),
        ("zhuang", "en"),
    ],
)
def test_language_is_the_one_asked_for_first(header: str, language: str) -> None:
    """The supported language that Accept-Language prefers, English by default."""
    assert preferred_language(header) == language
