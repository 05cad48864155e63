"""The option ``fields``, as PocketBase 0.40.6 was seen to read it.

``tests/conformance/test_record_fields.py`` compares many more with the real one.
"""

from __future__ import annotations

import time

import msgspec
import pytest
from msgspec import Raw

from pgrealtime.records.fields import ExcerptModifier, Fields, compile_projections, parse_fields

TEXTS: dict[str, Fields | None] = {
    "": {},
    " , ,": {},
    "*": {"*": None},
    " title , body ": {"title": None, "body": None},
    "author.name": {"author.name": None},
    "t:excerpt(3)": {"t": ExcerptModifier(3)},
    "t:excerpt(3,true), n": {"t": ExcerptModifier(3, with_ellipsis=True), "n": None},
    "t: excerpt( 3 , 1 )": {"t": ExcerptModifier(3, with_ellipsis=True)},
    "t:excerpt 3 true": {"t": ExcerptModifier(3, with_ellipsis=True)},
    "t:excerpt(3,yes)": {"t": ExcerptModifier(3)},
    "t:excerpt(0x1F)": {"t": ExcerptModifier(31)},
    "t:excerpt(010)": {"t": ExcerptModifier(8)},
    "t:excerpt(10.9)": {"t": ExcerptModifier(10)},
    "t,t:excerpt(2)": {"t": ExcerptModifier(2)},
    "t:excerpt(2),t": {"t": None},
    "'a,b',c": {"'a,b'": None, "c": None},
    "(a,b),c)": {"(a,b)": None, "c)": None},
    r"a\(,b": {r"a\(": None, "b": None},
    "t:excerpt(0)": None,
    "t:excerpt(-1)": None,
    "t:excerpt(09)": None,
    "t:excerpt(9223372036854775808)": None,
    "t:excerpt()": None,
    "t:excerpt(1,true,2)": None,
    "t:Excerpt(1)": None,
    "t:": None,
    "a:b:c": None,
    "(a": None,
    "a'": None,
    "`a": None,
}


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_fields_are_read(text: str) -> None:
    assert parse_fields(text) == TEXTS[text]


RECORD = Raw(
    b'{"t":"Hello <b>bold</b>","n":12.50,"j":{"a":{"x":1,"y":2},"a.b":5,'
    b'"l":[{"k":1,"m":2},{"k":3}],"mixed":[1,{"k":2}],"late":[{"k":1,"m":2},null],"e":[],"s":"abc","0":null},"s":["a","b"]}'
)

PICKS = {
    "zzz": "{}",
    "n,t": '{"t":"Hello <b>bold</b>","n":12.50}',
    "t.x": '{"t":"Hello <b>bold</b>"}',
    "t:excerpt(6,true),n:excerpt(1)": '{"t":"Hello...","n":12.50}',
    "s:excerpt(1)": '{"s":["a","b"]}',
    "j.a.x": '{"j":{"a":{"x":1}}}',
    "j.a.x,j.a": '{"j":{"a":{"x":1,"y":2}}}',
    "j.a.b": '{"j":{"a":{},"a.b":5}}',
    "j.l.k": '{"j":{"l":[{"k":1},{"k":3}]}}',
    "j.mixed.k": '{"j":{"mixed":[1,{"k":2}]}}',
    "j.late.k": '{"j":{"late":[{"k":1},null]}}',
    "j.e.k,j.0.k": '{"j":{"e":[],"0":null}}',
    "j.s:excerpt(2)": '{"j":{"s":"ab"}}',
    "*,j.a.x": '{"t":"Hello <b>bold</b>","n":12.50,"j":{"a":{"x":1}},"s":["a","b"]}',
    "*:excerpt(2),j.*:excerpt(1),j.a.y": (
        '{"t":"He","n":12.50,"j":{"a":{"y":2},"a.b":5,"l":[{"k":1,"m":2},{"k":3}],'
        '"mixed":[1,{"k":2}],"late":[{"k":1,"m":2},null],"e":[],"s":"a","0":null},"s":["a","b"]}'
    ),
    "*.t": "{}",
}


@pytest.mark.parametrize("text", PICKS)
def test_members_are_picked(text: str) -> None:
    """Objects in a list are picked from one by one; what isn't an object is taken whole."""
    fields = parse_fields(text)
    assert fields is not None
    members = msgspec.json.decode(RECORD, type=dict[str, Raw])
    picks = ((name, value, compile_projections(fields)(name)) for name, value in members.items())
    picked = {name: pick(value) for name, value, pick in picks if pick is not None}
    assert msgspec.json.encode(picked).decode() == PICKS[text]


def test_many_names_take_no_longer_than_their_number() -> None:
    """Members are picked from an event once for every topic that requests others."""
    names = [f"a{number}" for number in range(5_000)]
    value = Raw(msgspec.json.encode(dict.fromkeys(names, 1)))
    start = time.perf_counter()

    fields = parse_fields(",".join(f"j.{name}" for name in names))
    assert fields is not None
    pick = compile_projections(fields)("j")
    assert pick is not None
    assert pick(value) == value
    assert time.perf_counter() - start < 2.0


def test_what_is_nested_too_deep_to_pick_from_is_taken_whole() -> None:
    """One subscriber's path must not end the stream of the others."""
    deep = Raw(b'{"a":' * 5000 + b"1" + b"}" * 5000)
    for path in ("a.a", "a" + ".a" * 1200):
        fields = parse_fields(path)
        assert fields is not None
        pick = compile_projections(fields)("a")
        assert pick is not None
        assert pick(deep) == deep
