"""``fields``, excerpts and stored JSON, compared with the real PocketBase.

Expressions and HTML are drawn at random; the seed is part of the test's name, and
``PGREALTIME_SEED`` repeats it.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from msgspec import Raw

from pgrealtime.catalog.model import Column
from pgrealtime.collections.model import Field, FieldKind
from pgrealtime.records.excerpt import excerpt
from pgrealtime.records.fields import compile_projections, parse_fields
from pgrealtime.records.values import Json, choose_converter
from tests.column_types import base_type
from tests.conformance.fixtures import (
    FixtureCollection,
    FixtureField,
    FixtureRow,
    Fixtures,
    SuperuserAccount,
)
from tests.conformance.http_client import Request, send
from tests.conformance.pocketbase_server import PocketBaseServer, PocketBaseTemplate

SEED = int(os.environ.get("PGREALTIME_SEED") or secrets.randbelow(10**9))

MEMBERS: dict[str, Any] = {
    "t": "Hello <b>bold</b> world",
    "n": 12.5,
    "s": ["a", "b"],
    "g": {"lon": 1, "lat": 2},
    "j": {
        "a": {"x": 1.5, "y": 2, "z": {"q": [1, 2]}},
        "a.b": 5,
        "": {"": 1},
        "l": [{"k": 1, "m": "a b"}, {"k": "str ing"}],
        "m": [1, {"k": 2}],
        "e": [],
        "s": "str",
        "nul": None,
        "*": {"a": 1},
    },
    "h": "hidden",
}

PIECES = [
    *("t", "n", "j", "g", "s", "h", "id", "a", "k", "l", "m", "e", "x", "lon", "zzz"),
    *("j.l.k", "j.a.x", "*,", "*", ".", ".", ",", ",", ",", " ", "\t", "\\", "'", '"', "`"),
    *("(", ")", ":", ":excerpt(", "excerpt(3)", ":excerpt(2,true)", "1", "0", "x", "_", "true"),
]

JSON_TEXTS = [
    '{"z" : 1.50, "a":[1E400, -0, 1e5 ,{ }], "a" : [ ] }',
    r'"\u00e9\/\u2028\u007f <>& \b\f\n\r\t\u0000\u001F \" \\ \\u0041"',
    r'"\ud83d\ude00 \ud800 \udc00x \ud83d"',
    '"raw \u007f \u2028 \u2029 \u0080 é \U0001f600"',
    "  12  ",
    "null",
    "true",
    '{"a b" : "c : d , e"}',
    r'{"k\u00e9y\/":"\/"}',
]

HTML = [
    *("a", "b ", "  ", "\n", "é", "日本", "word another", "\xa0", "\u2003", "&amp;", "&lt;b&gt;"),
    *("<!-- c -->", "<br>", "<hr/>", "<img src=x/>", '<a href="x>y">', "</a>", "<", ">", "< p"),
    *("<p>", "</p>", "<b>", "</b>", "<div>", "</div>", "<h1>", "</h1>", "<ul>", "<li>", "</li>"),
    *("</ul>", "<span class='q'>", "</span>", "<pre>", "</pre>", "<u>", "</u>", "</x>", "<x-y>"),
    *("<script>x<p></script>", "<style>s</style>", "<title>t</title>", "<svg><g></g></svg>"),
    *("<select><option>o</select>", "<textarea><b>&amp;</textarea>", "<iframe>z</iframe>"),
    *("<table><tr><td>x</td><td>y</table>", "<blockquote>", "</blockquote>", "<body>"),
]
"""Well or badly nested, but without a formatting tag left open over a block's end.

See ``excerpt``.
"""


def expression(random: Random) -> str:
    return "".join(random.choice(PIECES) for _ in range(random.randint(1, 8)))


def html(random: Random) -> str:
    return "".join(random.choice(HTML) for _ in range(random.randint(1, 12)))


def row(number: int, **data: Any) -> FixtureRow:
    return FixtureRow(collection="docs", data={"id": f"{number:015d}", **data}, raw=True)


def fixtures(rows: list[FixtureRow]) -> Fixtures:
    fields = (
        FixtureField(name="t", type="text"),
        FixtureField(name="n", type="number"),
        FixtureField(name="s", type="select", max_select=2, values=("a", "b")),
        FixtureField(name="g", type="geoPoint"),
        FixtureField(name="j", type="json"),
        FixtureField(name="h", type="text", hidden=True),
    )
    docs = FixtureCollection(
        id="pbc_docs00000001", name="docs", type="base", list_rule="", view_rule="", fields=fields
    )
    root = SuperuserAccount(email="root@example.com", password="rootpass1234")
    return Fixtures(superuser=root, accounts={}, collections=(docs,), rows=tuple(rows))


async def template(directory: Path, rows: list[FixtureRow]) -> PocketBaseTemplate:
    return await PocketBaseTemplate.build(fixtures(rows), directory)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with an empty folder ``template`` in it."""
    (tmp_path / "template").mkdir()
    return tmp_path


async def get(server: PocketBaseServer, path: str) -> Any:
    """Return the answer to a guest, None if it is a refusal."""
    request = Request(method="GET", path=f"/api/collections/docs/records{path}", headers={})
    answer = await send(request, server.address)
    return answer.body if answer.head.status == 200 else None


@pytest.mark.parametrize("seed", [SEED])
async def test_fields_pick_what_pocketbase_picks(seed: int, folder: Path) -> None:
    """For any expression, valid or not; what REST refuses, realtime ignores as a whole."""
    random = Random(seed)
    made = await template(folder / "template", [row(1, **MEMBERS)])
    async with made.running(folder / "running") as server:
        whole = msgspec.json.decode(await get(server, f"/{1:015d}"), type=dict[str, Raw])
        for _ in range(300):
            text = expression(random)
            answer = await get(server, f"/{1:015d}?fields={quote(text, safe='')}")
            fields = parse_fields(text)
            assert (fields is None) == (answer is None), text
            if fields is not None:
                picks = {
                    name: (compile_projections(fields)(name), value)
                    for name, value in whole.items()
                }
                picked = {name: pick(value) for name, (pick, value) in picks.items() if pick}
                assert json.loads(msgspec.json.encode(picked)) == json.loads(answer), text


@pytest.mark.parametrize("seed", [SEED])
async def test_excerpts_are_pocketbases(seed: int, folder: Path) -> None:
    """For HTML of an editor, well or badly nested, at any length, with and without dots."""
    random = Random(seed)
    texts = [html(random) for _ in range(400)]
    rows = [row(number, t=text) for number, text in enumerate(texts)]
    made = await template(folder / "template", rows)
    theirs, ours = {}, {}
    async with made.running(folder / "running") as server:
        for limit, dots in [(1, True), (2, False), (3, True), (5, True), (8, False), (200, True)]:
            option = f"t:excerpt({limit},{str(dots).lower()})"
            answer = await get(server, f"?perPage=500&sort=id&fields={option}")
            items = json.loads(answer)["items"]
            for text, item in zip(texts, items, strict=True):
                theirs[limit, dots, text] = item["t"]
                ours[limit, dots, text] = excerpt(text, limit, with_ellipsis=dots)
    different = {
        text: (limit, theirs[limit, dots, text], ours[limit, dots, text])
        for limit, dots, text in theirs
        if theirs[limit, dots, text] != ours[limit, dots, text]
    }
    # A browser mends crossed tags by moving formatting, which isn't followed.
    assert len(different) <= len(texts) // 100, different


def shown(stored: str) -> Json:
    json_type = base_type("json", oid=114, category="U")
    column = Column(name="j", attribute_number=1, type=json_type)
    convert = choose_converter(Field(name="j", column=column, kind=FieldKind.JSON, type=json_type))
    assert convert is not None
    return convert(stored)


async def test_stored_json_is_written_as_pocketbase_writes_it(folder: Path) -> None:
    """Blanks go, strings are escaped anew, numbers stay, half a surrogate pair is U+FFFD."""
    rows = [row(number, j=text) for number, text in enumerate(JSON_TEXTS)]
    made = await template(folder / "template", rows)
    async with made.running(folder / "running") as server:
        answer = await get(server, "?perPage=500&sort=id")
    items = msgspec.json.decode(answer, type=dict[str, Raw])["items"]
    theirs = [bytes(item["j"]) for item in msgspec.json.decode(items, type=list[dict[str, Raw]])]
    assert [msgspec.json.encode(shown(text)) for text in JSON_TEXTS] == theirs
