"""Which bodies of subscribe calls can be parsed, and which faults are found in those that can."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.api.error_responses import encode_error_response, invalid_members
from pgrealtime.api.subscribe_body import SubscribeBody, find_call_faults, parse_subscribe_body
from pgrealtime.errors import SubscriptionError

JSON = "application/json"
URLENCODED = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=B"


def part(name: str, value: str, more: str = "") -> str:
    """Return a part of a multipart body."""
    return f'--B\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'


@pytest.mark.parametrize(
    ("content_type", "body", "call"),
    [
        (JSON, '{"clientId":"c","subscriptions":["a","b"]}', SubscribeBody("c", ("a", "b"))),
        ("application/jsonx", '{"clientId":"c"}', SubscribeBody("c")),
        (JSON, '{"clientId":"c"} trailing', SubscribeBody("c")),
        (JSON, ' \n{"clientId":"c"},', SubscribeBody("c")),
        (JSON, '{"clientId":"c","x":{"y":[1,{}]}}', SubscribeBody("c")),
        (JSON, '{"CLIENTID":"c","Subscriptions":["a"]}', SubscribeBody("c", ("a",))),
        (JSON, '{"client_id":"c","sub-scriptions":["a"]}', SubscribeBody("c", ("a",))),
        (JSON, "null", SubscribeBody()),
        (JSON, "nullx", SubscribeBody()),
        (JSON, '{"clientId":null,"subscriptions":null}', SubscribeBody()),
        (JSON, '{"clientId":"c","subscriptions":[null,""]}', SubscribeBody("c", ("", ""))),
        (JSON, '{"clientId":"\\u0063\\n"}', SubscribeBody("c\n")),
        (URLENCODED, "clientId=c&subscriptions=a%2F*&subscriptions=b+c", None),
        (URLENCODED, "clientId=c&clientId=d", SubscribeBody("c")),
        (URLENCODED, "clientId=c&subscriptions[]=a", SubscribeBody("c")),
        (URLENCODED, "clientid=c", SubscribeBody()),
        (URLENCODED, "clientId=c&subscriptions=%ff", SubscribeBody("c", ("\ufffd",))),
        (URLENCODED + "x", "clientId=c", SubscribeBody()),
        (URLENCODED + "; charset=utf-8", "clientId=c", SubscribeBody("c")),
        (URLENCODED, 'a=1&@jsonPayload={"clientId":"c"}', SubscribeBody("c")),
        (URLENCODED, 'clientId=c&@jsonPayload={"CLIENTID":"d"}', SubscribeBody("c")),
        (URLENCODED, "clientId=c&@jsonPayload=null", SubscribeBody()),
        (
            URLENCODED,
            'clientId=c&subscriptions=a&@jsonPayload={"subscriptions":["b"]}',
            SubscribeBody("c", ("b",)),
        ),
        (
            MULTIPART,
            part("clientId", "c")
            + part("subscriptions", "a")
            + part("subscriptions", "b")
            + "--B--",
            SubscribeBody("c", ("a", "b")),
        ),
        (
            MULTIPART,
            "preamble\r\n" + part("clientId", "c") + "--B--\r\nepilogue",
            SubscribeBody("c"),
        ),
        (MULTIPART, part("clientId", "a\r\n--Bx\r\nb") + "--B--", SubscribeBody("a\r\n--Bx\r\nb")),
        (MULTIPART, part("clientId", "c").replace("\r\n", "\n") + "--B--\n", SubscribeBody("c")),
        (MULTIPART, part("clientId", "c", '; filename="f"') + "--B--", SubscribeBody()),
        (MULTIPART, part("clientId", "c", '; filename=""') + "--B--", SubscribeBody("c")),
        (MULTIPART, part("@jsonPayload", '{"clientId":"c"}') + "--B--", SubscribeBody("c")),
        ('multipart/form-data ; Boundary="B"', part("clientId", "c") + "--B--", SubscribeBody("c")),
    ],
)
def test_readable_body(content_type: str, body: str, call: SubscribeBody | None) -> None:
    """Bodies that PocketBase parses (protocol, 3.1)."""
    expected = call or SubscribeBody("c", ("a/*", "b c"))

    assert parse_subscribe_body(content_type, body.encode(), b"") == expected


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (JSON, ""),
        (JSON, " "),
        (JSON, '{"clientId":'),
        (JSON, "[]"),
        (JSON, '"x"'),
        (JSON, "5"),
        (JSON, '{"clientId":5}'),
        (JSON, '{"clientId":"c","subscriptions":"a"}'),
        (JSON, '{"clientId":"c","subscriptions":[1]}'),
        (JSON, '{"clientId":"c","subscriptions":[["a"]]}'),
        (JSON, '{"clientId":"c","subscriptions":{"a":1}}'),
        (JSON, '{"clientId":"c","clientId":"c"}'),
        (JSON, '{"clientId":"c","CLIENTID":"c"}'),
        (JSON, '{"clientId":"c","x":1,"x":1}'),
        (JSON, '{"clientId":"c","x":"\udcff"}'),
        (JSON, '{"clientId":"c","x":"\\ud800"}'),
        (JSON, '\ufeff{"clientId":"c"}'),
        ("Application/JSON", '{"clientId":"c"}'),
        ("text/plain", '{"clientId":"c"}'),
        ("", '{"clientId":"c"}'),
        ("application/xml", "<a><ClientId>c</ClientId></a>"),
        (URLENCODED, "clientId=c&a=%zz"),
        (URLENCODED, "clientId=c&a;b"),
        (URLENCODED + "; x", "clientId=c"),
        (URLENCODED, "clientId=c&@jsonPayload={}x"),
        (URLENCODED, "clientId=c&@jsonPayload="),
        (URLENCODED, 'clientId=c&@jsonPayload={"clientId":5}'),
        (URLENCODED, "clientId=c" + "&a=1" * 10_000),
        (URLENCODED, "clientId=" + "c" * (10 << 20)),
        (MULTIPART, ""),
        (MULTIPART, "--nonsense"),
        (MULTIPART, part("clientId", "c")),
        (MULTIPART, part("clientId", "c") + "--B junk\r\n--B--"),
        (MULTIPART, "--B\r\nno header\r\n\r\nx\r\n--B--"),
        (MULTIPART, part("a", "b") * 1001 + "--B--"),
        ("multipart/form-data", part("clientId", "c") + "--B--"),
        ("multipart/form-data; boundary", part("clientId", "c") + "--B--"),
        ("multipart/form-data; boundary=B; boundary=C", part("clientId", "c") + "--B--"),
        ("multipart/form-data; boundary=", part("clientId", "c") + "--B--"),
    ],
)
def test_unreadable_body(content_type: str, body: str) -> None:
    """The error code is the same whatever the reason (protocol, 3.1)."""
    with pytest.raises(SubscriptionError) as refusal:
        parse_subscribe_body(content_type, body.encode(errors="surrogateescape"), b"")

    assert refusal.value.error_code == "body_unreadable"


def test_url_counts_for_forms_and_not_for_json() -> None:
    """A form's values are those of body and query string together, as in Go."""
    query = b"clientId=u&subscriptions=q"
    form = part("clientId", "c") + part("subscriptions", "a") + "--B--"

    assert parse_subscribe_body(JSON, b"{}", query) == SubscribeBody()
    assert parse_subscribe_body(URLENCODED, b"subscriptions=a", query) == SubscribeBody(
        "u", ("a", "q")
    )
    assert parse_subscribe_body(MULTIPART, form.encode(), query) == SubscribeBody("u", ("q", "a"))
    with pytest.raises(SubscriptionError):
        parse_subscribe_body(URLENCODED, b"clientId=c", b"a;b")


@given(
    st.text(st.characters(max_codepoint=300)) | st.text("ab/*?%", max_size=8),
    st.lists(st.text(st.characters(max_codepoint=300)) | st.text("ab/*?%", max_size=8)),
    st.booleans(),
    st.booleans(),
)
def test_a_plain_body_means_what_it_means_to_the_whole_parser(
    client_id: str,
    topics: list[str],
    compact: bool,  # noqa: FBT001 (hypothesis)
    ascii_only: bool,  # noqa: FBT001 (hypothesis)
) -> None:
    """Bodies as SDKs send them are recognized by their form; a blank before makes another form."""
    separators = (",", ":") if compact else (", ", ": ")
    members = {"clientId": client_id, "subscriptions": topics}
    body = json.dumps(members, separators=separators, ensure_ascii=ascii_only).encode()

    assert parse_subscribe_body(JSON, body, b"") == parse_subscribe_body(JSON, b" " + body, b"")
    assert parse_subscribe_body(JSON, body, b"") == SubscribeBody(client_id, tuple(topics))


@given(client=st.text(), subscriptions=st.lists(st.text()), ascii_only=st.booleans())
def test_json_body_says_what_was_put_in(
    client: str,
    subscriptions: list[str],
    ascii_only: bool,  # noqa: FBT001 (hypothesis)
) -> None:
    """Any text survives encoding and parsing."""
    body = json.dumps({"clientId": client, "subscriptions": subscriptions}, ensure_ascii=ascii_only)

    assert parse_subscribe_body(JSON, body.encode(), b"") == SubscribeBody(
        client, tuple(subscriptions)
    )


BLANK = '{"code":"validation_required","message":"Cannot be blank."}'
OUT_OF_RANGE = (
    '{"code":"validation_length_out_of_range",'
    '"message":"The length must be between 1 and 255.","params":{"max":255,"min":1}}'
)


def too_long(most: int) -> str:
    return (
        '{"code":"validation_length_too_long",'
        f'"message":"The length must be no more than {most}.","params":{{"max":{most},"min":0}}}}'
    )


@pytest.mark.parametrize(
    ("call", "data"),
    [
        (SubscribeBody("c" * 255, ("a" * 2500,) * 1000), "{}"),
        (SubscribeBody("   "), "{}"),
        (SubscribeBody(), f'{{"clientId":{BLANK}}}'),
        (SubscribeBody("c" * 256), f'{{"clientId":{OUT_OF_RANGE}}}'),
        (SubscribeBody("é" * 128), f'{{"clientId":{OUT_OF_RANGE}}}'),
        (SubscribeBody("c", ("a" * 2501,) * 1001), f'{{"subscriptions":{too_long(1000)}}}'),
        (
            SubscribeBody("", ("ok", "é" * 1300)),
            f'{{"clientId":{BLANK},"subscriptions":{{"1":{too_long(2500)}}}}}',
        ),
    ],
)
def test_all_faults_are_reported_at_once(call: SubscribeBody, data: str) -> None:
    """Limits are those of protocol, 3.2; lengths are counted in bytes of UTF-8."""
    body = encode_error_response(invalid_members(find_call_faults(call)), "en").decode()

    assert body.partition(',"message":"Something')[0] == f'{{"data":{data}'


def test_blank_client_in_chinese_is_the_documents() -> None:
    """The Chinese messages are those of the documented protocol."""
    assert encode_error_response(
        invalid_members(find_call_faults(SubscribeBody())), "zh"
    ).decode() == (
        '{"data":{"clientId":{"code":"validation_required","message":"缺少必填值。"}},'
        '"message":"处理请求时出错。","status":400}'
    )


HEADER = '--B\r\nContent-Disposition: form-data; name="clientId"{}\r\n\r\nx\r\n--B--'


@pytest.mark.parametrize(
    ("more", "client_id"),
    [
        (";a=b" * 900, "x"),
        (";a=b" * 8_000_000, ""),
        (";a=b" + " " * 30_000_000 + ";a=b" * 900, "x"),
        ("\r\nX: y" * 9_999, "x"),
        ("\r\nX: y" * 10_000, None),
        ("\r\nX: y" + "\r\n z" * 1_000_000, "x"),
    ],
    ids=["parameters", "too many", "blanks", "headers", "one too many", "lines"],
)
def test_large_headers_of_a_part_take_no_longer_than_their_length(
    more: str, client_id: str | None
) -> None:
    """A part with too many parameters has no name; a body with too many headers is refused."""
    started = time.process_time()
    try:
        read = parse_subscribe_body(MULTIPART, HEADER.format(more).encode(), b"").client_id
    except SubscriptionError:
        read = None

    assert read == client_id
    assert time.process_time() - started < 3


def test_payloads_of_a_form_hold_no_more_than_one_text() -> None:
    """Otherwise a form of 32 MB would take a minute to parse."""
    payload = part("@jsonPayload", '{"x":[' + "1," * 110_000 + "1]}")
    assert parse_subscribe_body(MULTIPART, f"{payload}--B--".encode(), b"") == SubscribeBody()

    with pytest.raises(SubscriptionError):
        parse_subscribe_body(MULTIPART, f"{payload * 2}--B--".encode(), b"")


@pytest.mark.parametrize("text", ["[" * 9_000_000, '{"a":' * 5_000_000, "[1," * 9_000_000])
def test_large_nonsense_is_given_up_early(text: str) -> None:
    """The time to parse a body is bounded."""
    started = time.process_time()
    with pytest.raises(SubscriptionError):
        parse_subscribe_body(JSON, text.encode(), b"")

    assert time.process_time() - started < 2
