"""Topics and their options, as PocketBase 0.40.6 takes them apart."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.protocol.topic import Topic, parse_topic, snake_case


@pytest.mark.parametrize(
    ("text", "collection", "record_id"),
    [
        ("posts", "posts", None),
        ("posts/*", "posts", None),
        ("posts/abc", "posts", "abc"),
        ("pbc_1/abc", "pbc_1", "abc"),
        ("posts/*?options={}", "posts", None),
        ("posts/abc?", "posts", "abc"),
        ("posts?x", "posts", None),
        ("posts/a/b", "posts", "a/b"),
        ("posts/a b", "posts", "a b"),
    ],
)
def test_three_forms_are_known(text: str, collection: str, record_id: str | None) -> None:
    """Protocol 4.1: the whole collection in two spellings, and one record."""
    topic = parse_topic(text)

    assert (topic.text, topic.collection_name_or_id, topic.record_id) == (
        text,
        collection,
        record_id,
    )


@pytest.mark.parametrize(
    "text",
    [
        "nosuch/*",
        "PROJECTS/*",
        "projects/**",
        "projects/",
        "projects/*/",
        " projects/*",
        "projects/* ",
        "/projects/*",
        "projects/PROJECTOPEN0001",
        "*",
        "projects/%2A",
        "projects#",
        "PB_CONNECT",
        "@oauth2",
        "?projects/*",
        "",
        "projects\n",
        "projects/*\r\nevent: x",
        "projects/projectopen0001\r",
        "projects/*?options={}\n",
    ],
)
def test_other_spellings_match_nothing(text: str) -> None:
    """Recording ``topic_spelling``, and line breaks, which would tear the frame (4.6)."""
    topic = parse_topic(text)

    whole = topic.collection_name_or_id == "projects" and topic.record_id is None
    this_one = topic.collection_name_or_id == "projects" and topic.record_id == "projectopen0001"
    assert not whole
    assert not this_one


@pytest.mark.parametrize(
    ("text", "query", "headers"),
    [
        (
            (
                "p/*?options=%7B%22query%22%3A%7B%22a%22%3A%221%22%7D"
                "%2C%22headers%22%3A%7B%22x%22%3A%22y%20z%22%7D%7D"
            ),
            {"a": "1"},
            {"x": "y z"},
        ),
        (
            'p/1?options={"query": {"abc": "123"}, "headers": {"x-token": "..."}}',
            {"abc": "123"},
            {"x_token": "..."},
        ),
        ('p/*?options={"query":{"a":"b+c"}}', {"a": "b c"}, {}),
        ('p/*?x=1&options={"query":{"a":"1"}}&y', {"a": "1"}, {}),
        ('p/*?options={"query":{"a":"1"}}&options={"query":{"a":"2"}}', {"a": "1"}, {}),
        ('p/*?options=&options={"query":{"a":"2"}}', {}, {}),
        ('p/*?%6fptions={"query":{"a":"1"}}', {"a": "1"}, {}),
        ('p/*?Options={"query":{"a":"1"}}', {}, {}),
        ('p/*?options={"query":{"a":";"}}', {}, {}),
        ('p/*?options={"query":{"a":"%zz"}}', {}, {}),
        ('p/*?options=;&options={"query":{"a":"2"}}', {"a": "2"}, {}),
        ('p/*?options={"query":{"a":"%26"}}', {"a": "&"}, {}),
        ('p/*?options={"query":{"a":"1&b"}}', {"a": ""}, {}),
        ('p/*?options={"query":{"a":"1"}}#frag', {"a": "1"}, {}),
        ('p/*#?options={"query":{"a":"1"}}', {}, {}),
        ('p/*?options={"query":{"a":"1#"}}', {"a": ""}, {}),
        ('p/*?options={"query":{"a":"1"}}#%zz', {}, {}),
        ('p/5%?options={"query":{"a":"1"}}', {}, {}),
        ('p/*?options={"query":{"a":"\t"}}', {}, {}),
        ('p/*?\x7foptions={"query":{"a":"1"}}', {}, {}),
        ('p/*?options={"QUERY":{"a":"1"},"query":{"b":"2"}}', {"b": "2"}, {}),
        ('p/*?options={"other":{"deep":[[1,{"x":2}]]},"query":{"b":"2"}}', {"b": "2"}, {}),
        ("p/*?options=null", {}, {}),
        ('p/*?options={"query":null,"headers":{"a":"b"}}', {}, {"a": "b"}),
        ("p/*?options=[]", {}, {}),
        ("p/*?options={", {}, {}),
        ('p/*?a?options={"query":{"a":"1"}}', {}, {}),
    ],
)
def test_options_are_read_from_the_query(
    text: str, query: dict[str, str], headers: dict[str, str]
) -> None:
    """Protocol 5.1 and 5.2."""
    topic = parse_topic(text)

    assert (topic.query, topic.headers) == (query, headers)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ('"text"', "text"),
        ('"\\u00e9\\n"', "é\n"),
        ('"\\ud83d\\ude00"', "😀"),
        ("1", "1"),
        ("12.50", "12.5"),
        ("1e20", "100000000000000000000"),
        ("1e-6", "0.000001"),
        ("1.0", "1"),
        ("-0.0", "-0"),
        ("12345678901234567890", "12345678901234567000"),
        ("true", "true"),
        ("false", "false"),
        ("null", ""),
        ("[1,2]", ""),
        ('{"a":[{}]}', ""),
    ],
)
def test_values_become_strings(written: str, value: str) -> None:
    """Protocol 5.3."""
    topic = parse_topic("p/*?options=" + quote('{"query":{"x":' + written + "}}"))

    assert topic.query == {"x": value}


@pytest.mark.parametrize(
    "written",
    [
        "01",
        "+1",
        ".5",
        "1.",
        "1e",
        "NaN",
        "Infinity",
        "'a'",
        '"\\x"',
        '"\\ud800"',
        "tru",
        "",
        "1e999",
    ],
)
def test_fault_keeps_what_came_before(written: str) -> None:
    """Protocol 5.2: bad JSON is no error, and what was read before it counts."""
    options = '{"headers":{"h":"1"},"query":{"a":"1","x":' + written + ',"z":"2"}}'
    topic = parse_topic("p/*?options=" + quote(options))

    assert topic.collection_name_or_id == "p"
    assert topic.headers == {"h": "1"}
    assert topic.query["a"] == "1"
    assert "z" not in topic.query


@pytest.mark.parametrize(
    ("name", "normal"),
    [
        ("X-Token", "x_token"),
        ("x_token", "x_token"),
        ("xToken", "x_token"),
        ("X--TOKEN", "x_token"),
        ("X.Token", "x_token"),
        ("XToken", "xtoken"),
        ("x-ToKen", "x_to_ken"),
        ("a1B", "a1_b"),
        ("--", ""),
        ("é-x", "x"),
    ],
)
def test_header_names_are_snake_case(name: str, normal: str) -> None:
    """Protocol 5.4."""
    assert snake_case(name) == normal


def test_options_of_absurd_size_end_early() -> None:
    """A thousand such topics come with one call and are read in one go."""
    topic = parse_topic('p/*?options={"query":{"a":"1","b":' + "[[]," * 600 + "1" + "]" * 600)

    assert topic.query == {"a": "1", "b": ""}


PLAIN = st.text(st.characters(codec="utf-8"), max_size=20)


@given(query=st.dictionaries(PLAIN, PLAIN, max_size=4), sdk=st.sampled_from([quote, quote_plus]))
def test_what_an_sdk_encodes_is_what_a_rule_sees(
    query: dict[str, str], sdk: Callable[[str], str]
) -> None:
    """JavaScript percent encodes, Dart encodes as a form: both arrive."""
    topic = parse_topic("p/*?options=" + sdk(json.dumps({"query": query})))

    assert topic.query == query


@given(st.text())
def test_any_text_is_a_topic(text: str) -> None:
    """A stored subscription is an opaque string (4.5)."""
    topic = parse_topic(text)

    assert isinstance(topic, Topic)
    assert topic.text == text
    assert "?" not in topic.collection_name_or_id + (topic.record_id or "")


@given(st.text(string.ascii_letters + string.digits + "_.-", min_size=1))
def test_collection_topic_is_its_own_name(name: str) -> None:
    assert parse_topic(name).collection_name_or_id == name
    assert parse_topic(f"{name}/*").collection_name_or_id == name
