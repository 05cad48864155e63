"""What ``expand`` asks for, as PocketBase 0.40.6 was seen to take it."""

from __future__ import annotations

import time

import pytest

from pgrealtime.expand.plan import ExpandNames, parse_expand

TEXTS: dict[str, tuple[ExpandNames, ...]] = {
    "": (),
    " , ,, ": (),
    ".": (),
    "author": (("author",),),
    " author ": (("author",),),
    "au thor": (("author",),),
    "author\t": (("author\t",),),
    "author,editors": (("author",), ("editors",)),
    "author,author": (("author",),),
    "author.team": (("author", "team"),),
    "author . team": (("author", "team"),),
    ".author.team.": (("author", "team"),),
    "author..team": (("author", "", "team"),),
    "author,author.team": (("author", "team"),),
    "author.team,author": (("author", "team"),),
    "author.team,author.boss": (("author", "team"), ("author", "boss")),
    "auth,author": (("auth",), ("author",)),
    "a.b.c,a,a.b,b.c,a.b.c.d,b": (("b", "c"), ("a", "b", "c", "d")),
    "a.b.c.d.e.f": (("a", "b", "c", "d", "e", "f"),),
    "a.b.c.d.e.f.g,a.b.c.d.e.f.h": (("a", "b", "c", "d", "e", "f"),),
    "posts_via_author.tags": (("posts_via_author", "tags"),),
}


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_paths_are_read(text: str) -> None:
    assert parse_expand(text) == TEXTS[text]


def test_many_paths_take_no_longer_than_their_number() -> None:
    """A topic has room for hundreds, a call for a thousand topics, an URL for ten thousand."""
    names = [f"{number:x}" for number in range(10_000)]
    start = time.perf_counter()

    assert len(parse_expand(",".join(names))) == len(names)
    assert time.perf_counter() - start < 2.0
