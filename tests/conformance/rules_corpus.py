"""Evaluates the rules corpus with pgrealtime's reference query and engine, on a real database.

A corpus is a folder with ``cases.json``; the data is always that of ``tests/rules-corpus``. Its
README documents the cases.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

import psycopg

from pgrealtime.auth.principal import GUEST, AuthRecord, Principal, Superuser
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.changes import Row, TableName
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import CollectionConfig, FieldsConfig, RelationConfig
from pgrealtime.errors import RuleError, RuleUnsupportedError
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.index import PredicateIndex
from pgrealtime.rules.engine.plan import BoundPredicate, Specialization
from pgrealtime.rules.language.predicate import AdmitAll, DenyAll
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.sql.reference import ReferenceQuery, check_rule, reference_query
from tests.engine_driving import CallerMember, evaluate_rows

CORPUS = Path(__file__).parent.parent / "rules-corpus"

Case: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = Mapping[str, list[Row]]
"""Collection to its rows, in text form."""

_TOPIC_SETTINGS = "SET search_path = pg_catalog; SET default_transaction_read_only = on"


@dataclass(frozen=True, slots=True)
class Refused:
    """The rule is not accepted."""

    error: RuleError


class Way(Enum):
    """How a case is evaluated."""

    REFERENCE = "the reference query"
    ENGINE = "the engine"
    ENGINE_KNOWING = "the engine, with the subscriber's own row at hand"


Answer: TypeAlias = tuple[str, ...] | Refused
"""The ids that are shown, sorted."""


@dataclass(slots=True)
class Corpus:
    """The data, loaded into a database of its own."""

    connection: psycopg.Connection
    collections: Collections
    rows: Rows

    def answer(self, case: Case, way: Way, now: datetime | None = None) -> Answer:
        """Return what pgrealtime shows to the case's subscriber, at a given time or now."""
        now = now or datetime.now(UTC)
        collections = self._with_list_rules(case.get("others", {}))
        collection = collections[case["collection"]]
        rule = case["rule"]
        request = self._request(case)
        try:
            if rule is not None and way is Way.REFERENCE:
                check_rule(collections, collection, rule)
        except RuleError as error:
            return Refused(error)
        rows = self.rows[collection.name]
        ids = [row[collection.key.name] or "" for row in rows]
        if way is not Way.REFERENCE:
            try:
                verdicts = self._decided(collections, collection, request, case, way, now=now)
            except RuleError as error:
                return Refused(error)
            return tuple(one for one, admitted in zip(ids, verdicts, strict=True) if admitted)
        match reference_query(collections, collection, rule, request):
            case AdmitAll():
                return tuple(ids)
            case DenyAll():
                return ()
            case ReferenceQuery() as asked:
                question = asked.sql_query(rows, now)
                found = self.connection.execute(question.sql.encode(), question.params).fetchall()
                return tuple(sorted(ids[index] for (index,) in found))

    def _decided(
        self,
        collections: Collections,
        collection: Collection,
        request: RuleRequest,
        case: Case,
        way: Way,
        *,
        now: datetime,
    ) -> list[bool]:
        """Return, row by row, what the engine says."""
        rows = self.rows[collection.name]
        own = self._own_row(request) if way is Way.ENGINE_KNOWING else None
        bound = RuleCompiler(collections).bind_caller(collection, case["rule"], request, own)
        if isinstance(bound, DenyAll):
            return [False for _ in rows]
        index: PredicateIndex[CallerMember] = PredicateIndex()
        index.add(CallerMember(request, bound.specialization, bound.values))
        return [bool(hits) for hits in evaluate_rows(self.connection, index, rows, now)]

    def specializations(
        self, asked: Iterable[Case]
    ) -> Iterator[tuple[str, tuple[Specialization, Collections]]]:
        """Yield the rules of cases that read other rows, what each is for a caller and the names.

        A rule that is the same for several callers comes once.
        """
        seen: set[str] = set()
        for case in asked:
            request, collections = (
                self._request(case),
                self._with_list_rules(case.get("others", {})),
            )
            kind = case["auth"].partition("/")[0]
            name = (
                f"{case['collection']} {case['rule']} {case['query']} {kind} {case.get('others')}"
            )
            if case["rule"] is None or "." not in name or name in seen:
                continue
            seen.add(name)
            for is_known in (False, True):
                own, collection = self._own_row(request) if is_known else None, case["collection"]
                with suppress(RuleError):
                    bound = RuleCompiler(collections).bind_caller(
                        collections[collection], case["rule"], request, own
                    )
                    if isinstance(bound, BoundPredicate) and bound.specialization.reads_other_rows:
                        yield f"{name} {is_known}", (bound.specialization, collections)

    def _own_row(self, request: RuleRequest) -> Row | None:
        match request.principal:
            case AuthRecord(collection_name=name, id=record_id):
                return next(row for row in self.rows[name] if row["id"] == record_id)
            case _:
                return None

    def _with_list_rules(self, others: Mapping[str, str | None]) -> Collections:
        """Return the collections with these list rules; only client filters read them."""
        if not others:
            return self.collections
        return Collections(
            tuple(
                replace(collection, list_rule=others.get(collection.name, ""))
                for collection in self.collections.values()
            )
        )

    def _request(self, case: Case) -> RuleRequest:
        headers = {_snake_case(name): value for name, value in case["headers"].items()}
        return RuleRequest(
            principal=self._principal(case["auth"]), query=case["query"], headers=headers
        )

    def _principal(self, auth: str) -> Principal:
        if auth == "guest":
            return GUEST
        if auth == "superuser":
            return Superuser("root")
        name, record_id = auth.split("/")
        row = next(row for row in self.rows[name] if row["id"] == record_id)
        return AuthRecord(
            collection_id=self.collections[name].id,
            collection_name=name,
            id=record_id,
            email=row["email"] or "",
            email_visibility=row["emailVisibility"] == "true",
            verified=row["verified"] == "true",
        )


async def load(database_url: str) -> Corpus:
    """Return the corpus, its data loaded into the (empty) database."""
    connection = psycopg.connect(database_url, autocommit=True)
    connection.execute((CORPUS / "schema.sql").read_bytes())
    schema = json.loads((CORPUS / "schema.json").read_text(encoding="utf-8"))
    shown = {one["name"]: configured(one) for one in schema["collections"]}
    async with await psycopg.AsyncConnection.connect(database_url) as reading:
        catalog = await read_catalog(reading, schemas=["public"])
    collections = build_collections(shown, catalog)
    rows = {name: list(_rows_of(connection, name, collections)) for name in collections}
    connection.execute(_TOPIC_SETTINGS.encode())
    return Corpus(connection, collections, rows)


def configured(described: Mapping[str, Any]) -> CollectionConfig:
    """Return a collection of ``schema.json`` as it is configured here, readable by every caller."""
    fields = described["fields"]
    return CollectionConfig(
        table=f"public.{described['name']}",
        type="auth" if described["kind"] == "auth" else "base",
        fields=FieldsConfig(
            hide=tuple(one["name"] for one in fields if one.get("hidden")),
            types={
                one["name"]: one["type"]
                for one in fields
                if one["type"] == "geoPoint" or (one["type"] == "select" and not one["multiple"])
            },
        ),
        relations={
            one["name"]: RelationConfig(collection=one["to"])
            for one in fields
            if one["type"] == "relation"
        },
        list_rule="",
    )


def _rows_of(connection: psycopg.Connection, name: str, collections: Collections) -> Iterator[Row]:
    table = collections[name].table
    columns = [column.name for column in table.columns]
    shown = psycopg.sql.SQL(", ").join(
        psycopg.sql.SQL("{}::text").format(psycopg.sql.Identifier(column)) for column in columns
    )
    query = psycopg.sql.SQL("SELECT {} FROM {} ORDER BY id").format(
        shown, psycopg.sql.Identifier(*_parts(table.name))
    )
    for values in connection.execute(query):
        yield dict(zip(columns, values, strict=True))


def _parts(name: TableName) -> tuple[str, str]:
    return name.schema, name.name


def _snake_case(name: str) -> str:
    """Return a header's name as rules have it (rules.md 10.1)."""
    spaced = re.sub(r"(?<=[^A-Z])(?=[A-Z])", "_", name)
    return re.sub(r"[\W_]+", "_", spaced).lower()


def cases(folder: Path) -> list[Case]:
    """Return the cases of a corpus."""
    loaded: list[Case] = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    return loaded


def expected(case: Case) -> tuple[str, ...] | None:
    """Return the ids that must arrive; None if the rule must be refused when it is set."""
    error = case["expect"].get("error")
    if error is not None and error["stage"] == "save":
        return None
    wanted = case.get("expect_realtime") or case["expect"]
    return tuple(wanted.get("ids", ()))


@dataclass(frozen=True, slots=True)
class Report:
    """Results of a corpus run."""

    right: tuple[str, ...]
    refused: tuple[str, ...]
    """Cases that are refused although PocketBase decides them."""
    wrong: tuple[str, ...]
    """Cases with another verdict, one line each."""

    def __str__(self) -> str:
        counts = f"{len(self.right)} right, {len(self.refused)} refused, {len(self.wrong)} wrong"
        return "\n".join([counts, *self.wrong])


def of_way(asked: Iterable[Case], way: Way) -> Iterator[Case]:
    """Yield the cases that apply to the way of evaluation.

    A refusal happens when the rule is set, before any evaluation; the subscriber's own row matters
    to few cases.
    """
    for case in asked:
        is_set = way is Way.REFERENCE or expected(case) is not None
        if is_set and (way is not Way.ENGINE_KNOWING or "@request.auth." in str(case)):
            yield case


def evaluate_cases(corpus: Corpus, asked: Iterable[Case], way: Way = Way.REFERENCE) -> Report:
    """Evaluate every case."""
    right: list[str] = []
    refused: list[str] = []
    wrong: list[str] = []
    for case in of_way(asked, way):
        wanted = expected(case)
        got = corpus.answer(case, way)
        match got, wanted:
            case Refused(), None:
                right.append(case["id"])
            case Refused(error), _ if isinstance(error, RuleUnsupportedError):
                refused.append(case["id"])
            case _ if got == wanted:
                right.append(case["id"])
            case _:
                wrong.append(f"{case['id']} {case['rule']!r} wanted {wanted}, got {got}")
    return Report(tuple(right), tuple(refused), tuple(wrong))
