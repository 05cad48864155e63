"""The SQL of predicates: what it contains and depends on, and which module makes it."""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlglot import exp, parse_one
from sqlglot.optimizer.qualify import qualify
from sqlglot.schema import MappingSchema

import pgrealtime.rules
from pgrealtime.auth.principal import AuthRecord
from pgrealtime.catalog.model import Column
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.rules.language import predicate
from pgrealtime.rules.language.parameters import ParameterClass, parameter_class, parameter_value
from pgrealtime.rules.language.predicate import DenyAll
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.resolve import resolve_rule
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.conditions import translate_predicate
from pgrealtime.rules.sql.nodes import ROW_ALIAS
from pgrealtime.rules.sql.reference import ReferenceQuery, reference_query
from tests.unit.rules.schema import COLLECTIONS, POSTS, USERS

ANN = AuthRecord(collection_id="pbc_users", collection_name="users", id="uann")


def _sql(rule: str, request: RuleRequest | None = None) -> str:
    request = request or RuleRequest(principal=ANN)
    query = reference_query(COLLECTIONS, POSTS, rule, request)
    assert isinstance(query, ReferenceQuery)
    return query.sql


_SOURCES = sorted(Path(pgrealtime.rules.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", _SOURCES, ids=lambda path: path.name)
def test_connectives_are_made_in_one_place(path: Path) -> None:
    """A bare ``exp.And`` prints no brackets and changes the meaning; one module makes them."""
    made = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "exp"
    }
    assert not made & {"And", "Or", "Not", "Xor"}
    assert path.name == "nodes.py" or not made & {"and_", "or_", "not_", "condition"}


def test_no_value_of_a_rule_is_in_the_text() -> None:
    """Literals, request values and JSON keys are always bound by placeholders."""
    request = RuleRequest(principal=ANN, query={"q": "quux'--", "filter": "title != 'fi%lt'"})
    rule = "title ~ 'lit%eral' && views > 4711 && data.somekey = @request.query.q && id = @now"
    query = reference_query(COLLECTIONS, POSTS, rule, request)
    assert isinstance(query, ReferenceQuery)
    question = query.sql_query([], datetime.now(UTC))
    for secret in ("lit", "4711", "somekey", "quux", "fi%", "uann"):
        assert secret not in question.sql
    given = [content for content in question.params.values() if content is not None]
    assert {"lit%eral", "4711", 'strict $."somekey"', "quux'--", "fi%lt"} <= {
        content for content in given if isinstance(content, str | float)
    }


def test_every_percent_is_a_placeholder_or_doubled() -> None:
    """The driver reads the text as a format."""
    rest = re.sub(r"%\(\w+\)s|%%", "", _sql("title ~ author.name && tags:each ?~ title"))
    assert "%" not in rest


def test_translation_depends_on_classes_only() -> None:
    """Two callers whose values have the same classes share it; others needn't."""
    rule = "title = @request.query.q || views > @request.query.q || title ~ @request.query.q"

    def of(text: str) -> str:
        return _sql(rule, RuleRequest(query={"q": text}))

    assert of("a") == of("something else")
    assert of("1") == of(" 22.5 ")
    assert len({of("a"), of("1"), of(""), of("%\\"), _sql(rule, RuleRequest())}) == 5


def test_leaves_over_one_path_share_its_join() -> None:
    """Two ``?`` comparisons are about one reviewer; other paths have joins of their own."""
    shared = _sql("reviewers.name ?= 'a' && reviewers.level ?> 1 && reviewers:each ?= 'x'")
    assert shared.count("LEFT JOIN") == 2
    apart = _sql("@collection.users.name ?= 'a' && @collection.users:b.name ?= 'b'")
    assert apart.count("LEFT JOIN") == 2


def test_table_is_qualified_and_names_are_quoted() -> None:
    """search_path is pg_catalog, so an unqualified name can't be shadowed."""
    tree = parse_one(re.sub(r"%\(\w+\)s", "NULL", _sql("author.name = 'x'")), dialect="postgres")
    tables = {(table.db, table.name) for table in tree.find_all(exp.Table) if table.name}
    assert tables == {("public", "users")}
    assert all(
        identifier.args["quoted"]
        for column in tree.find_all(exp.Column)
        for identifier in column.find_all(exp.Identifier)
    )


@pytest.mark.parametrize(
    "rule",
    [
        "title = 'x' || views > 1 && published = true",
        "author.name = 'x' || reviewers.level != 3 && comments_via_post.score ?> 1",
        "@collection.teams.lead.name = @request.auth.name || data.a.0 ~ 'x'",
    ],
)
def test_every_column_is_one_of_the_row_it_is_asked_of(rule: str) -> None:
    """Sqlglot's resolver finds all columns in the schema, with their case."""
    classes = {
        parameter: parameter_class(
            parameter_value(parameter, RuleRequest(principal=ANN), datetime.now(UTC))
        )
        for parameter in predicate.condition_parameters(
            resolve_rule(rule, COLLECTIONS, POSTS, USERS).where
        )
    }
    translated = translate_predicate(
        resolve_rule(rule, COLLECTIONS, POSTS, USERS), COLLECTIONS, classes
    )
    row = nodes.table(POSTS.table, ROW_ALIAS)
    select = exp.Select(
        expressions=[exp.Literal.number(1)],
        from_=exp.From(this=row),
        where=exp.Where(this=translated.condition.copy()),
    )
    schema: dict[str, object] = {
        "public": {
            one.table.name.name: {column.name: column.type.name for column in one.table.columns}
            for one in COLLECTIONS.values()
        }
    }
    qualify(
        select,
        dialect="postgres",
        schema=MappingSchema(schema, dialect="postgres", normalize=False),
        validate_qualify_columns=True,
        quote_identifiers=False,
    )


def test_columns_and_tables_that_are_read_are_listed() -> None:
    """A row image must have the columns; the tables need overlays on deletes."""
    query = reference_query(
        COLLECTIONS,
        POSTS,
        "author.name = 'x' || views > 1",
        RuleRequest(query={"filter": "title ~ 'y'"}),
    )
    assert isinstance(query, ReferenceQuery)
    assert query.column_names == ("author", "views", "title")
    assert [part.tables for part in query.sql_predicates] == [{USERS.table.name}, frozenset()]


def test_absent_parameters_are_folded_into_the_text() -> None:
    """A guest's ``author = @request.auth.id`` matches rows without author."""
    guest = _sql("author = @request.auth.id", RuleRequest())
    assert "IS NULL" in guest
    assert "%(p0)s" not in guest
    assert ParameterClass.ABSENT.is_empty


def _repeated(part: str) -> str:
    """Return a filter as long as a topic can be."""
    return "||".join([part] * (2400 // (len(part) + 2)))


@pytest.mark.parametrize(
    "text",
    [
        _repeated("strftime('%F%T', title) = data"),
        _repeated("data !~ data.a"),
        _repeated("geoDistance(data, data, title, views) ~ title"),
        _repeated("data.0.0.0.0.0.0.0.0.0.0.0.0 = data"),
        _repeated("reviewers.manager.groups.lead.name != reviewers.groups.lead.manager.level"),
        "strftime('" + "%F" * 1100 + "', data) = data",
        "data" + ".a" * 1200 + " = data" + ".0" * 1100,
        "||".join(f"views ~ data.a{number}" for number in range(100)),
    ],
    ids=range(8),
)
def test_any_filter_is_small_in_sql_and_quickly_made(text: str) -> None:
    """A client's filter is translated or refused within bounded time and memory."""
    before = time.perf_counter()
    query = reference_query(COLLECTIONS, POSTS, "", RuleRequest(query={"filter": text}))
    assert time.perf_counter() - before < 10
    assert isinstance(query, DenyAll | ReferenceQuery)
    assert isinstance(query, DenyAll) or len(query.sql) < 300_000


def _loosened(collection: Collection) -> Collection:
    """Return the collection with all its columns of a nondeterministic collation."""

    def loose(column: Column) -> Column:
        return replace(column, is_deterministic=False)

    fields = [
        one if one.column is None else replace(one, column=loose(one.column))
        for one in collection.fields
    ]
    columns = tuple(map(loose, collection.table.columns))
    table = replace(collection.table, columns=columns)
    return replace(collection, key=loose(collection.key), fields=tuple(fields), table=table)


_LOOSE = Collections(tuple(map(_loosened, COLLECTIONS.values())))
_TEXT_COLUMNS = {
    column.name
    for one in _LOOSE.values()
    for column in one.table.columns
    if (column.type.element or column.type).name == "text"
} | {"value"}
_COMPARISONS = (
    *(exp.EQ, exp.NEQ, exp.NullSafeEQ, exp.NullSafeNEQ, exp.GT, exp.GTE, exp.LT, exp.LTE),
    *(exp.Like, exp.ILike, exp.RegexpLike, exp.ArrayContainsAll, exp.ArrayOverlaps, exp.In),
    exp.Operator,
)


def _bare_texts(node: exp.Expr) -> Iterator[exp.Column]:
    """Yield the text columns that a comparison reads under their own collation."""
    match node:
        case exp.Collate() | exp.Subquery():
            return
        case exp.Anonymous(this="array_to_json" | "cardinality" | "length" | "strpos"):
            return  # the result has no collation
        case exp.Case():
            for branch in (*(one.args["true"] for one in node.args["ifs"]), node.args["default"]):
                if branch is not None:
                    yield from _bare_texts(branch)
        case exp.Column() if node.name in _TEXT_COLUMNS:
            yield node
        case _:
            for child in node.iter_expressions():
                yield from _bare_texts(child)


def _is_bytewise(comparison: exp.Expr) -> bool:
    """Return whether no text is compared by its collation alone.

    A comparison by collation may select rows through an index if a comparison of bytes of the same
    operands follows.
    """
    sides = list(comparison.iter_expressions())
    if not any(True for side in sides for _ in _bare_texts(side)):
        return True
    if any(isinstance(side.unnest(), exp.Collate) for side in sides):
        return True
    around = comparison.parent
    texts = {one.sql() for side in sides for one in side.find_all(exp.Column)}
    return isinstance(around, exp.And) and any(
        _is_bytewise(other) and texts <= {one.sql() for one in other.find_all(exp.Column)}
        for other in around.iter_expressions()
        if other is not comparison
    )


_PATHS = (
    *("title", "tags", "tags:each", "author", "reviewers", "reviewers:each", "title:lower"),
    *("author.name", "reviewers.name", "views"),
    *("comments_via_post.id", "comments_via_post.post", "author.manager.groups.lead.id", "data.a"),
    *("@collection.users.name", "@collection.comments.post", "author.posts_via_reviewers.title"),
    *("@request.auth.name", "@request.auth.groups:each", "@request.auth.groups.name"),
    *("author:length", "strftime('%Y', title)", "geoDistance(title, 1, id, 2)"),
)


@pytest.mark.parametrize("left", _PATHS)
def test_every_text_comparison_is_of_bytes(left: str) -> None:
    """No comparison of any operands depends on a nondeterministic collation alone."""
    others = [*_PATHS, "'a'", "5", "''", "null", "true", "@request.auth.id", "@request.query.q"]
    for place, right in enumerate(others, _PATHS.index(left)):
        for op in ("=", ("!=", "?=", "<", "?>=", "~", "!~", "?!=")[place % 7]):
            rule = f"{left} {op} {right}"
            request = RuleRequest(principal=ANN, query={"q": "x"})
            query = reference_query(_LOOSE, _LOOSE["posts"], rule, request)
            assert isinstance(query, ReferenceQuery), rule
            for part in query.sql_predicates:
                for comparison in part.condition.find_all(*_COMPARISONS):
                    assert _is_bytewise(comparison), f"{rule}: {comparison.sql('postgres')}"


def test_a_comparison_by_collation_would_be_seen() -> None:
    """The check above detects such a comparison."""
    plain = parse_one('"r"."title" = %(p)s', dialect="postgres")
    collated = parse_one('"r"."title" COLLATE "C" = "a"."name"', dialect="postgres")
    narrowed = parse_one('"r"."title" = \'x\' AND "r"."title" COLLATE "C" = \'x\'')
    assert [_is_bytewise(plain), _is_bytewise(collated)] == [False, True]
    assert all(map(_is_bytewise, narrowed.find_all(exp.EQ)))
