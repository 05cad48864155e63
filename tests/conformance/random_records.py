"""Random schemas, rows, rules and read requests: pure, and the same for the same seed.

``records_differential`` loads them into both servers. Ids ascend in the order of insertion, so that
PocketBase's order by rowid is the default order of the tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, TypeAlias
from urllib.parse import quote, urlencode
from uuid import UUID

from tests.conformance.fixtures import FieldType, FixtureField
from tests.conformance.random_rules import TEXTS, RandomRules, Vocabulary

Kind = Literal["base", "auth", "view"]
RowData: TypeAlias = Mapping[str, Any]
"""A row as PocketBase shows it; JSON fields hold its text, or None."""

GUEST = "guest"
SUPERUSER = "superuser"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How the tables in PostgreSQL are made, where operators differ."""

    ids: Literal["text", "bigint", "uuid"] = "text"
    json: Literal["json", "jsonb"] = "jsonb"
    geo: Literal["point", "jsonb"] = "jsonb"
    lists: Literal["array", "junction"] = "array"
    """Of the ids of a relation to several records."""
    select: Literal["text", "enum"] = "text"
    number: Literal["double precision", "numeric", "bigint"] = "double precision"
    date: Literal["timestamptz", "timestamp", "date"] = "timestamptz"
    text: Literal["text", "varchar", "icu", "caseless"] = "text"
    """The last two are texts of a collation that sorts otherwise, or takes letters for equal."""
    views: Literal["view", "materialized", "table"] = "view"
    has_foreign_keys: bool = False
    has_other_names: bool = False
    """Tables and columns are called otherwise than collections and fields."""

    @classmethod
    def random(cls, random: Random) -> Shape:
        """Return a shape in which tables hold what they hold in PocketBase."""
        lists: Literal["array", "junction"] = random.choice(("array", "junction"))
        return cls(
            ids=random.choice(("text", "text", "bigint", "uuid")),
            json=random.choice(("json", "jsonb")),
            geo=random.choice(("point", "jsonb")),
            lists=lists,
            select=random.choice(("text", "enum")),
            number=random.choice(("double precision", "double precision", "numeric", "bigint")),
            date=random.choice(("timestamptz", "timestamp", "date")),
            text=random.choice(("text", "varchar", "icu", "caseless")),
            views=random.choice(("view", "materialized", "table")),
            has_foreign_keys=lists == "junction" or random.random() < 0.5,
            has_other_names=random.random() < 0.3,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewColumn:
    """A column of a view: an own field of the source, nullable or not, or a field of another."""

    field: FixtureField
    source: str
    """The field's name there."""
    form: Literal["plain", "nullable", "joined", "count"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomCollection:
    """A collection of the world."""

    name: str
    type: Kind
    fields: tuple[FixtureField, ...]
    """Without id, and without the given fields of an auth collection."""
    unique: str = ""
    """A single relation that no two rows share."""
    view_of: str = ""
    joined: tuple[str, str] = ("", "")
    """A view's second table: the relation that leads to it, and its name."""
    counted: tuple[str, str] = ("", "")
    """A view's third table, of which it counts rows: its name, and its relation to the first."""
    columns: tuple[ViewColumn, ...] = ()

    @property
    def id(self) -> str:
        """PocketBase's id."""
        return f"pbc_{self.name}".ljust(15, "0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The rules of a collection."""

    list: str | None
    view: str | None
    manage: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRequest:
    """A list or view request."""

    method: str
    collection: str
    record_id: str | None
    caller: str
    """``guest``, ``superuser`` or COLLECTION/ID."""
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    order: Literal["total", "any"]
    """What ``query`` says about the order of the records."""

    @property
    def path(self) -> str:
        """Path and query."""
        record = "" if self.record_id is None else f"/{quote(self.record_id, safe='')}"
        query = f"?{urlencode(self.query)}" if self.query else ""
        return f"/api/collections/{self.collection}/records{record}{query}"


_SINGLE: tuple[FieldType, ...] = (
    *("text", "text", "text", "number", "number", "bool", "date", "date", "json", "json"),
    *("geoPoint", "select", "editor", "url", "email", "file"),
)
_LISTS: tuple[tuple[FieldType, int], ...] = (("select", 6), ("file", 9))
"""Types of several values, and how many there may be."""
_NAMES = (
    *("title", "name", "label", "order", "group", "desc", "nickName", "note", "a", "b", "x1"),
    *("size", "kind", "level", "status", "user", "end", "limit", "createdAt", "Data", "tags"),
    *("day", "spot", "meta", "flag", "n", "rank"),
)
_RELATION_NAMES = ("author", "owner", "team", "parent", "ref", "lead", "boss", "topic")
_LIST_NAMES = ("members", "likes", "reviewers", "links", "peers")
_OPTIONS = ("x", "y", "zed", "Ä", "a b", "10")
_TEXTS = (
    *("", "", "a", "A", "b", "abc", "ABC", "é", "É", "Zoë", "10", "9", "5", "5.0", "1e1", "true"),
    *("%", "a%b", "a_b", "_", "\\", 'say "hi"', "it's", "two words", "\U0001f600", "日本"),
    *("null", "2024", " lead", "tab\there", "line\nbreak", "<b>bold</b> &amp; more", "h%"),
)
_INTEGERS = (0, 0, 1, -1, 5, 10, 9, 100, 1000000, 3, -100, 9007199254740991)
_DECIMALS = (*_INTEGERS, 2.5, 0.1, -0.5, 123456789.125, 10.5)
_NUMBERS = {
    "bigint": _INTEGERS,
    # Its text has all its digits, whereas SQLite writes a large double with an exponent.
    "numeric": _DECIMALS,
    "double precision": (*_DECIMALS, 1e20, -1e-7, 0.30000000000000004),
}
"""By the type of their columns."""
_DATES = (
    *("", "", "1999-12-31 23:59:59.999Z", "2024-01-01 00:00:00.000Z", "2024-02-03 04:05:06.789Z"),
    *("2024-02-03 04:05:06.790Z", "2024-12-31 12:00:00.000Z", "2090-06-15 06:07:08.009Z"),
)
_DAYS = ("", "", *(f"{day} 00:00:00.000Z" for day in ("1999-12-31", "2024-01-01", "2090-06-15")))
_JSON: tuple[Any, ...] = (
    *(None, None, 1, 0, 2.5, 10, "a", "", "10", "B", True, False, [], {}, [1, 2], ["a", "b"]),
    *({"a": 1}, {"a": "x"}, {"a": None}, {"a": True}, {"a": 10}, {"a": "10"}, {"a": [1, "z"]}),
    *({"a": {"b": 2}}, {"a": 9, "b": "y"}, {"b": [{"c": 1}]}, [{"a": 5}, 7], [[1], [2]]),
)
_PLACES = (
    *({"lon": 0, "lat": 0}, {"lon": 12.5, "lat": -5}, {"lon": -100, "lat": 45.25}),
    {"lon": 100.125, "lat": 0.5},
)
_FILES = ("one_a1.txt", "two_b2.png", "Three_c3.pdf")
_JSON_PATHS = ("a", "b", "0", "a.b", "a.0", "b.0.c", "1")
_GIVEN_AUTH = ("email", "emailVisibility", "verified")


def json_text(value: Any) -> str:
    """Return JSON as PostgreSQL's jsonb writes it, without blanks."""
    return json.dumps(_ordered(value), separators=(",", ":"), ensure_ascii=False)


def _ordered(value: Any) -> Any:
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: (len(name.encode()), name.encode()))
        return {name: _ordered(value[name]) for name in names}
    return [_ordered(item) for item in value] if isinstance(value, list) else value


_VALUES: Mapping[FieldType, tuple[Any, ...]] = {
    "bool": (True, False),
    "date": _DATES,
    "json": tuple(None if value is None else json_text(value) for value in _JSON),
    "geoPoint": _PLACES,
    "select": ("", *_OPTIONS),
    "file": ("", "doc_a1b2.txt", "Pic_z9.png"),
    "email": ("", "a@example.com", "B@example.com"),
    "url": ("", "https://example.com/?a=1&b=2", "http://x.org"),
}
"""Single values by type; of others ``_TEXTS``."""


def email_of(record_id: str) -> str:
    """Return the address of an account."""
    return f"{record_id}@example.com"


class RandomWorld:
    """A schema with rows, from a seed; and then rules and requests, as many as wanted."""

    def __init__(self, seed: int, shape: Shape | None = None) -> None:
        self._random = Random(seed)
        self.shape = Shape.random(self._random) if shape is None else shape
        self.ids: Mapping[str, list[str]] = {
            name: [self._new_id(at, number) for number in range(self._random.randint(6, 16))]
            for at, name in enumerate(self._table_names())
        }
        tables = [self._table(name) for name in self.ids]
        self.rows: Mapping[str, list[RowData]] = {
            table.name: [
                self._row(table, record_id, number)
                for number, record_id in enumerate(self.ids[table.name])
            ]
            for table in tables
        }
        views = [self._view(f"digest{number}", tables) for number in range(self._upto(2))]
        self.collections: Mapping[str, RandomCollection] = {
            collection.name: collection for collection in (*tables, *views)
        }
        self._relations = self._relations_of_all()
        self.begin_rules()
        self._maker = RandomRules(self._random.randrange(1 << 30), self._vocabulary())
        self.callers = (
            GUEST,
            SUPERUSER,
            *(
                f"{table.name}/{record_id}"
                for table in tables
                if table.type == "auth"
                for record_id in self.ids[table.name][:4]
            ),
        )

    # -- schema

    def _table_names(self) -> tuple[str, ...]:
        staff = ("staff",) if self._random.random() < 0.5 else ()
        return ("people", *staff, "posts", "teams", "Notes")

    def _new_id(self, table: int, number: int) -> str:
        match self.shape.ids:
            case "text":
                return f"{'psqtn'[table]}{number:02}"
            case "bigint":
                return str(table * 1000 + 100 + number * 7)
            case "uuid":
                high = (table + 1) << 120 | number << 100
                return str(UUID(int=high | self._random.getrandbits(64)))

    def _table(self, name: str) -> RandomCollection:
        names = self._random.sample(_NAMES, 12)
        fields = [self._field(names.pop()) for _ in range(self._random.randint(4, 8))]
        singles = self._random.sample(_RELATION_NAMES, self._random.randint(1, 3))
        fields += [self._relation(one, 1) for one in singles]
        lists = self._random.sample(_LIST_NAMES, self._random.randint(0, 3))
        fields += [self._relation(one, 99) for one in lists]
        return RandomCollection(
            name=name,
            type="auth" if name in ("people", "staff") else "base",
            fields=tuple(fields),
            unique=singles[0] if self._random.random() < 0.3 else "",
        )

    def _field(self, name: str) -> FixtureField:
        kind, most = self._random.choice((*((one, 1) for one in _SINGLE), *_LISTS))
        return FixtureField(
            name=name,
            type=kind,
            hidden=self._random.random() < 0.12,
            values=_OPTIONS if kind == "select" else (),
            max_select=most,
        )

    def _relation(self, name: str, most: int) -> FixtureField:
        target = self._random.choice([*self.ids])
        return FixtureField(
            name=name,
            type="relation",
            hidden=self._random.random() < 0.1,
            max_select=most,
            collection_id=target,
        )

    def _view(self, name: str, tables: list[RandomCollection]) -> RandomCollection:
        source = self._random.choice(tables)
        own = [self._view_column(field) for field in source.fields]
        columns = self._random.sample(own, self._random.randint(2, len(own)))
        joined, counted = ("", ""), ("", "")
        lead = [f for f in source.fields if f.type == "relation" and not f.is_multiple]
        if self._random.random() < 0.5:
            relation = self._random.choice(lead)
            other = next(table for table in tables if table.name == relation.collection_id)
            joined = relation.name, other.name
            columns += [
                self._renamed(field, "joined", f"j{number}")
                for number, field in enumerate(other.fields)
                if field.type in ("text", "number", "bool")
            ][:2]
        counting = [
            (table.name, field.name)
            for table in tables
            for field in table.fields
            if field.collection_id == source.name and not field.is_multiple
        ]
        if counting and self._random.random() < 0.5:
            counted = self._random.choice(counting)
            count = FixtureField(name="many", type="number")
            columns.append(ViewColumn(field=count, source="id", form="count"))
        return RandomCollection(
            name=name,
            type="view",
            fields=tuple(column.field for column in columns),
            view_of=source.name,
            joined=joined,
            counted=counted,
            columns=tuple(columns),
        )

    def _view_column(self, field: FixtureField) -> ViewColumn:
        if field.type in ("text", "number", "bool") and self._random.random() < 0.5:
            return self._renamed(field, "nullable", f"v_{field.name}")
        return ViewColumn(field=field, source=field.name, form="plain")

    def _renamed(
        self, field: FixtureField, form: Literal["nullable", "joined"], name: str
    ) -> ViewColumn:
        renamed = FixtureField(name=name, type=field.type)
        return ViewColumn(field=renamed, source=field.name, form=form)

    # -- rows

    def _row(self, table: RandomCollection, record_id: str, number: int) -> RowData:
        row: dict[str, Any] = {"id": record_id}
        if table.type == "auth":
            row |= {
                "email": email_of(record_id) if self._random.random() < 0.9 else "",
                "emailVisibility": self._random.random() < 0.5,
                "verified": self._random.random() < 0.5,
            }
        for field in table.fields:
            row[field.name] = self._value(field)
            if field.name == table.unique:
                targets = self.ids[field.collection_id]
                row[field.name] = targets[number] if number < len(targets) else ""
        return row

    def _value(self, field: FixtureField) -> Any:
        if field.type == "relation":
            return self._related(field)
        if field.is_multiple:
            return self._some(_OPTIONS[:4] if field.type == "select" else _FILES)
        if field.type == "number":
            return self._random.choice(_NUMBERS[self.shape.number])
        if field.type == "date" and self.shape.date == "date":
            return self._random.choice(_DAYS)
        return self._random.choice(_VALUES.get(field.type, _TEXTS))

    def _some(self, values: tuple[str, ...]) -> list[str]:
        return self._random.sample(values, self._random.randint(0, min(3, len(values))))

    def _related(self, field: FixtureField) -> Any:
        targets = list(self.ids[field.collection_id])
        if not self.shape.has_foreign_keys:
            targets.append(self._new_id(4, 99))
        if not field.is_multiple:
            return self._random.choice(("", *targets))
        some = self._random.sample(targets, self._random.choice((0, 1, 2, 3, 4)))
        return sorted(some, key=_in_order) if self.shape.lists == "junction" else some

    # -- rules

    def _relations_of_all(self) -> Mapping[str, Mapping[str, str]]:
        """Return by collection its relations and back relations, and what they lead to."""
        collections = self.collections.values()
        relations: dict[str, dict[str, str]] = {one.name: {} for one in collections}
        for one in collections:
            for field in one.fields:
                if field.type == "relation":
                    relations[one.name][field.name] = field.collection_id
                    relations[field.collection_id][f"{one.name}_via_{field.name}"] = one.name
        return relations

    def _vocabulary(self) -> Vocabulary:
        collections, relations = self.collections.values(), self._relations
        some_ids = tuple(f"'{ids[1]}'" for ids in self.ids.values())
        caller_paths = ["id", *_GIVEN_AUTH, "collectionName", "nope", "id:lower"]
        for one in collections:
            if one.type == "auth":
                caller_paths += [field.name for field in one.fields]
                caller_paths += [f"{name}.id" for name in relations[one.name]]
        return Vocabulary(
            fields={one.name: " ".join(_paths(one)) for one in collections},
            relations=relations,
            texts=(
                *TEXTS[:2],
                *("'x'", "'Zoë'", "'abc'", "'two_b2.png'", "'example'", "'ÉÄ'", "'[\"x\"]'"),
                *some_ids,
                *TEXTS,
            ),
            request=(
                *(f"@request.auth.{path}" for path in caller_paths),
                *("@request.query.q", "@request.query.q:isset", "@request.query.q:lower"),
                *("@request.method", "@request.context", "@request.headers.x_key"),
                *("@request.body.title", "@request.query.nope"),
            ),
        )

    def begin_rules(self) -> None:
        """Draw how many of the next rules admit everybody, and which paths are used most.

        A path that rule, filter and sort have in common is about one related row.
        """
        self._openness = self._random.choice((0.2, 0.5, 0.8))
        self._shared_paths = {name: self._hops(name, self._upto(2)) for name in self.collections}

    def rule(self, collection: str) -> str | None:
        """Return a random rule, which may be one that PocketBase refuses."""
        if self._random.random() < self._openness:
            return ""
        chance = self._random.random()
        if chance < 0.08:
            return None
        if chance < 0.2:
            return self._maker.rule(collection)
        if chance < 0.7:
            return self._likely(collection)
        if chance < 0.78:
            return f"@request.auth.id != '' && ({self._maker.rule(collection, 1)})"
        if chance < 0.85:
            return f"{self._likely(collection)} || {self._maker.rule(collection, 1)}"
        lists = [name for name in self._relations[collection] if "_via_" not in name]
        if not lists:
            return "id != ''"
        relation = self._random.choice(lists)
        return f"{relation}.id {self._random.choice(('?=', '=', '?!='))} @request.auth.id"

    def _likely(self, collection: str) -> str:
        """Return a condition on values that rows have, which some rows satisfy."""
        parts = [
            self._likely_comparison(collection) for _ in range(self._random.choice((1, 1, 2, 3)))
        ]
        return self._random.choice((" || ", " || ", " && ")).join(parts)

    def view_rule(self, collection: str) -> str | None:
        """Return a random view rule, which expansions ask too."""
        if self._random.random() < 0.15:
            return f"@request.context {self._random.choice(('=', '!='))} 'expand'"
        return self.rule(collection)

    def _hops(self, collection: str, count: int) -> tuple[str, str]:
        """Return a path of relations, with its last dot, and the collection it leads to."""
        path = ""
        for _ in range(count):
            if not self._relations[collection]:
                break
            relation, collection = self._random.choice([*self._relations[collection].items()])
            path += f"{relation}."
        return path, collection

    def _likely_comparison(self, collection: str) -> str:
        random = self._random
        path, collection = (
            self._shared_paths[collection]
            if random.random() < 0.3
            else self._hops(collection, random.choice((*(0, 1) * 8, 0, 2, 2, 3, 5, 7)))
        )
        field = random.choice(self.collections[collection].fields)
        value = self._value(field)
        operator = random.choice(("=", "!=", "!=", ">", "<=", ">=", "~", "!~", "?=", "?!=", "?~"))
        match field.type:
            case "number" | "bool":
                return f"{path}{field.name} {operator} {json.dumps(value)}"
            case "json":
                key = random.choice(("", f".{random.choice(_JSON_PATHS)}"))
                literal = random.choice(("1", "'x'", "null", "10", "true", "''"))
                return f"{path}{field.name}{key} {operator} {literal}"
            case "geoPoint":
                return f"{path}{field.name}.lon {operator} {value['lon']}"
            case _ if field.is_multiple:
                literal = random.choice((*value, ""))
                each = random.choice((":each", "", ":length"))
                return f"{path}{field.name}{each} {operator} {_literal(literal)}"
            case _:
                return f"{path}{field.name} {operator} {_literal(value)}"

    def manage_rule(self, collection: str) -> str | None:
        """Return a rule about the addresses of an auth collection."""
        chance = self._random.random()
        if chance < 0.3:
            return None
        return self._maker.rule(collection, 1) if chance < 0.5 else self._likely(collection)

    # -- requests

    def request(self) -> ReadRequest:
        """Return the next request."""
        random = self._random
        collection = random.choice([*self.collections.values()])
        caller = random.choice((*self.callers, GUEST, SUPERUSER))
        is_view = random.random() < 0.15
        query: dict[str, str] = {}
        order: Literal["total", "any"] = "any"
        if random.random() < 0.3:
            query |= self._maker.query()
        if not is_view or random.random() < 0.1:
            if random.random() < 0.6:
                query["filter"] = self._filter(collection.name, caller)
            if random.random() < 0.65:
                query["sort"], order = self._sort(collection.name, caller)
        if random.random() < 0.4:
            query["expand"] = self._expand(collection.name)
        if random.random() < 0.15:
            query["fields"] = self._fields(collection)
        if not is_view:
            query |= self._page(order)
        ids = self.ids[collection.view_of or collection.name]
        return ReadRequest(
            method="HEAD" if random.random() < 0.04 else "GET",
            collection=self._spelled(collection),
            record_id=random.choice((*ids, "nope", ids[0].upper())) if is_view else None,
            caller=caller,
            query=dict(random.sample([*query.items()], len(query))),
            headers={"X-Key": random.choice(("", "5", "abc"))} if random.random() < 0.2 else {},
            body=b'{"title":"a","n":1}' if random.random() < 0.05 else b"",
            order=order,
        )

    def _spelled(self, collection: RandomCollection) -> str:
        return self._random.choice(
            (collection.name,) * 8 + (collection.name.upper(), collection.id)
        )

    def _filter(self, collection: str, caller: str) -> str:
        chance = self._random.random()
        if chance < 0.03:
            return f"{self._likely(collection)} || @request.query.q = 'a'"
        if chance < 0.1:
            return self._maker.function_rule(collection, is_filter=True)
        if chance < 0.2:
            return f"{self._maker.path(collection)} != ''"
        is_free = caller == SUPERUSER and self._random.random() < 0.3
        if is_free:
            other = self._random.choice([*self.collections])
            path = f"@collection.{other}.{self._maker.path(other, 1)}"
            return f"{self._maker.path(collection)} ?= {path}"
        if chance < 0.7:
            return self._likely(collection)
        return self._maker.rule(collection, self._random.choice((0, 1, 1, 2)), is_filter=True)

    def _sort(self, collection: str, caller: str) -> tuple[str, Literal["total", "any"]]:
        random = self._random
        keys = [
            random.choice(("", "", "-", "+")) + self._sort_path(collection, caller)
            for _ in range(random.choice((1, 1, 1, 2, 3)))
        ]
        chance = random.random()
        if chance < 0.04:
            return ",".join(("@random", *keys)), "any"
        has_rowid = self.collections[collection].type != "view" or self.shape.views != "table"
        if chance < 0.12 and has_rowid:  # a PocketBase view may be a table here
            keys.append(random.choice(("@rowid", "-@rowid")))
            return ",".join(keys), "total"
        if chance < 0.2:
            return ",".join(keys), "any"
        keys.append(random.choice(("id", "-id")))
        return ",".join(keys), "total"

    def _sort_path(self, collection: str, caller: str) -> str:
        if caller == SUPERUSER and self._random.random() < 0.05:
            other = self._random.choice([*self.collections])
            return f"@collection.{other}.{self._maker.path(other, 1)}"
        chance = self._random.random()
        if chance < 0.6:
            path, collection = (
                self._shared_paths[collection]
                if chance < 0.25
                else self._hops(collection, self._random.choice((*(1, 2) * 8, 4, 6)))
            )
            return path + self._random.choice([*_paths(self.collections[collection])])
        return self._maker.path(collection, self._random.choice((0, 0, 1, 1, 2)))

    def _expand(self, collection: str) -> str:
        paths = [self._expand_path(collection) for _ in range(self._random.choice((1, 1, 2, 3)))]
        return ",".join(paths)

    def _expand_path(self, collection: str) -> str:
        relations = self._relations
        steps: list[str] = []
        for _ in range(self._random.choice((*(1, 2) * 4, 3, 3, 5, 7))):
            if self._random.random() < 0.04:
                return ".".join((*steps, "nope"))
            if not relations[collection]:
                break
            name, collection = self._random.choice([*relations[collection].items()])
            if "_via_" in name and self._random.random() < 0.2:
                owner, field = name.split("_via_")
                name = self._random.choice((f"{owner}({field})", f"{owner.upper()}_via_{field}"))
            steps.append(name)
        return ".".join(steps) or "nope"

    def _fields(self, collection: RandomCollection) -> str:
        names = [field.name for field in collection.fields]
        texts = [field.name for field in collection.fields if field.type in ("text", "editor")]
        first = self._random.choice([*self._relations[collection.name], "nope"])
        below = ("expand", "expand.*", f"expand.{first}", f"expand.{first}.id", f"expand.{first}.*")
        parts = self._random.choices(("*", "id", "nope", *below, *names), k=self._upto(4))
        if texts and self._random.random() < 0.5:
            cut = self._random.choice(
                ("excerpt(3)", "excerpt(4,true)", "excerpt(200)", "excerpt(0)")
            )
            parts.append(f"{self._random.choice(texts)}:{cut}")
        return ",".join(parts)

    def _page(self, order: str) -> dict[str, str]:
        query: dict[str, str] = {}
        chance = self._random.random()
        if order != "total":  # only a whole list can be compared
            query["perPage"] = "200"
        elif chance < 0.4:
            query |= {"page": str(self._upto(4)), "perPage": str(self._upto(6))}
        elif chance < 0.5:
            query |= {"page": self._random.choice(("0", "-1", "x", "99", "1"))}
        if self._random.random() < 0.2:
            query["skipTotal"] = self._random.choice(("1", "true", "0", "yes"))
        return query

    def _upto(self, most: int) -> int:
        return self._random.randint(1, most)


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _paths(collection: RandomCollection) -> Iterator[str]:
    yield "id"
    if collection.type == "auth":
        yield from _GIVEN_AUTH
    for field in collection.fields:
        yield field.name
        if field.type == "json":
            yield from (f"{field.name}.{path}" for path in _JSON_PATHS)
        if field.type == "geoPoint":
            yield from (f"{field.name}.lon", f"{field.name}.lat")


def _in_order(record_id: str) -> tuple[int, str]:
    return (int(record_id), "") if record_id.isdigit() else (0, record_id)
