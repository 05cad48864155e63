"""Arrays and rows as PostgreSQL writes them, in the forms that its documentation shows.

The server itself is asked by ``tests/integration/test_record_values.py``.
"""

from __future__ import annotations

import pytest

from pgrealtime.text_forms import Element, parse_array, parse_composite

ARRAYS: dict[str, list[Element]] = {
    "{}": [],
    "{1,2}": ["1", "2"],
    '{NULL,"NULL",null}': [None, "NULL", "null"],
    '{""}': [""],
    '{"a b","c,d","{e}"}': ["a b", "c,d", "{e}"],
    r'{"quo\"te","back\\slash","\\\""}': ['quo"te', "back\\slash", '\\"'],
    '{"two\nlines"}': ["two\nlines"],
    "{{1,2},{3,NULL}}": [["1", "2"], ["3", None]],
    '{{{a},{b}},{{"c d"},{e}}}': [[["a"], ["b"]], [["c d"], ["e"]]],
    "[0:1]={a,b}": ["a", "b"],
    "[2:3][-1:0]={{1,2},{3,4}}": [["1", "2"], ["3", "4"]],
    '[1:1]={"[0:1]={a}"}': ["[0:1]={a}"],
    "1 2 3": ["1", "2", "3"],
    "": [],
}


@pytest.mark.parametrize("text", ARRAYS, ids=repr)
def test_array_is_read(text: str) -> None:
    assert parse_array(text) == ARRAYS[text]


def test_boxes_are_set_apart_by_semicolons() -> None:
    assert parse_array("{(3,4),(1,2);NULL;(0,0),(0,0)}", ";") == [
        "(3,4),(1,2)",
        None,
        "(0,0),(0,0)",
    ]


ROWS: dict[str, list[str | None]] = {
    "(1,a)": ["1", "a"],
    "(,)": [None, None],
    '("",)': ["", None],
    '(,"a b",)': [None, "a b", None],
    '("a,b","(c)")': ["a,b", "(c)"],
    r'("quo""te","back\\slash")': ['quo"te', "back\\slash"],
    r'("a\"b")': ['a"b'],
    '("two\nlines",x)': ["two\nlines", "x"],
    r'("(1,""a """"b"""""")",2)': [r'(1,"a ""b""")', "2"],
    '("{1,2}",NULL)': ["{1,2}", "NULL"],
}


@pytest.mark.parametrize("text", ROWS, ids=repr)
def test_row_is_read(text: str) -> None:
    assert parse_composite(text) == ROWS[text]
