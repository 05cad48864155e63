"""Excerpts that PocketBase 0.40.6 made. ``tests/conformance`` compares more of them."""

from __future__ import annotations

import pytest

from pgrealtime.records.excerpt import excerpt

TEXTS = [
    ("", ""),
    ("a  b\n\tc", "a b c"),
    ("<p>Hello   <b>big</b> <i>w</i>orld</p><p>two</p>", "Hello big world two"),
    ("&lt;b&gt; &amp; &eacute; &#65; &notit; &amp", "<b> & é A ¬it; &"),
    ("a\u00a0b", "a\u00a0b"),
    ("a<b> b</b>c", "a bc"),
    ("<b>a </b> b", "a b"),
    ("a<!-- x -->b<![CDATA[x]]>c<?php x ?>d", "abcd"),
    ("a <b", "a"),
    ("1<2>3", "1<2>3"),
    ("a</p>b</b>c</br>d", "a bcd"),
    ("a<br><br>b<hr>c", "ab c"),
    ("<ul><li>a<li>b</ul>", "a b"),
    ("<table><tr><td>a<td>b</table>c<td>d", "a b cd"),
    ("<script>if(a<b)</script><style>p{}</style><title>t</title>z", "z"),
    ("x<title>&amp;<b></title>y", "x &<b> y"),
    ("a<noscript><p>b</noscript>c", "a <p>b c"),
    ("a<form>b</form><select><option>c</select><textarea><b>d</textarea>e", "ae"),
    ("<svg><title>a</title></svg>b<svg><g><p>c", "b c"),
    ("<a href='x>y' title=\"<i>\" z=</a>b", "b"),
    ("a<plaintext>b</plaintext>", "a b</plaintext>"),
    ("\u2003a\u2003", "a"),
]


@pytest.mark.parametrize(("html", "text"), TEXTS)
def test_tags_are_dropped_and_blanks_collapsed(html: str, text: str) -> None:
    assert excerpt(html, 200, with_ellipsis=True) == text


CUTS = [
    ("abcdef", 3, "abc..."),
    ("abc", 3, "abc"),
    ("ab cdef", 3, "ab..."),
    ("abc def", 3, "abc..."),
    ("日本語日本語", 3, "日本語..."),
    ("👍🏽abc", 1, "👍..."),
    ("<b>a</b>" * 7, 2, "aa..."),
    ("<p>a</p><p>b</p><p>c</p>", 3, "a b..."),
]


@pytest.mark.parametrize(("html", "limit", "text"), CUTS)
def test_long_texts_are_cut_by_characters(html: str, limit: int, text: str) -> None:
    """The dots come on top of the limit, and a blank at the cut is dropped."""
    assert excerpt(html, limit, with_ellipsis=True) == text
    assert excerpt(html, limit, with_ellipsis=False) == text.removesuffix("...")


def test_no_element_is_entered_after_so_many_bytes() -> None:
    """So a text of wide characters may come out shorter than the limit, without dots."""
    html = "<p>日</p><p>本</p><p>語</p><p>x</p>"
    assert excerpt(html, 4, with_ellipsis=True) == "日 本"
    assert excerpt(html, 11, with_ellipsis=True) == "日 本 語 x"


def test_deep_nesting_costs_no_more_than_length() -> None:
    """No tag searches all open tags, or this test would run into the time limit."""
    assert excerpt("<div>" * 100_000 + "a", 10, with_ellipsis=True) == "a"
    assert excerpt("<b>" * 100_000 + "a", 10, with_ellipsis=True) == "a"


def test_a_long_document_is_read_no_further_than_needed() -> None:
    endless = "<p>word</p>" * 1_000_000
    assert excerpt(endless, 10, with_ellipsis=True) == "word word..."
