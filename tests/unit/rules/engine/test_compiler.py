"""What a rule is compiled to: tests, index paths to its callers, and what callers share."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pgrealtime.auth.principal import GUEST, AuthRecord, Principal, Superuser
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collections
from pgrealtime.errors import RuleError, RuleUnsupportedError
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.formula import TestCall, each_test_call
from pgrealtime.rules.engine.index_paths import LookupKind
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.predicate import DenyAll
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.memory.compare import UndecidedError
from pgrealtime.rules.rule_set import caller_columns_read_by_rules
from pgrealtime.rules.sql.joins import MAX_JOINS
from pgrealtime.rules.sql.reference import ReferenceQuery, check_rule, reference_query
from tests.unit.rules.schema import COLLECTIONS, POSTS

ANN = AuthRecord(collection_id="pbc_users", collection_name="users", id="uann")
BOB = replace(ANN, id="ubob")
OWN: Row = {"id": "uann", "name": "Ann", "level": "3"}

COMPILER = RuleCompiler(COLLECTIONS)


def bind(
    rule: str | None, principal: Principal = ANN, text: str = "", **query: str
) -> BoundPredicate:
    """Bind a rule and a filter for a caller for whom some row may match."""
    if text:
        query["filter"] = text
    bound = COMPILER.bind_caller(POSTS, rule, RuleRequest(principal=principal, query=query))
    assert isinstance(bound, BoundPredicate)
    return bound


def path_kinds(bound: BoundPredicate) -> list[tuple[str, bool, int]]:
    """Return kind, exactness and number of guards of each path."""
    return [
        (path.kind.name, path.is_exact, len(path.guards)) for path in bound.specialization.paths
    ]


def _of_reviewers(comparisons: int) -> str:
    """Return a rule that joins reviewers twice, and for counterexamples as often as given."""
    return "&&".join(f"reviewers.name!={n}" for n in range(comparisons))


def test_joins_are_counted_those_for_counter_examples_included() -> None:
    """PocketBase has no limit; planning thousands of joins takes PostgreSQL seconds."""
    most = (MAX_JOINS - 2) // 2
    guest = RuleRequest()
    assert isinstance(
        reference_query(COLLECTIONS, POSTS, _of_reviewers(most), guest), ReferenceQuery
    )
    assert isinstance(COMPILER.bind_caller(POSTS, _of_reviewers(most), guest), BoundPredicate)

    text = _of_reviewers(most + 1)
    with pytest.raises(RuleUnsupportedError, match="more than 300 joins"):
        check_rule(COLLECTIONS, POSTS, text)
    request = RuleRequest(query={"filter": text})
    for refused in (
        reference_query(COLLECTIONS, POSTS, "", request),
        COMPILER.bind_caller(POSTS, "", request),
    ):
        assert isinstance(refused, DenyAll)
        assert "more than 300 joins" in refused.reason


def test_combinations_of_items_are_counted_before_they_are_gone_through() -> None:
    """A hundred by a hundred are evaluated in the process; one more only by PostgreSQL."""
    hundred = "{" + ",".join(f"x{n}" for n in range(100)) + "}"
    more = hundred[:-1] + ",y}"
    for rule in ("tags:each ?= reviewers:each && title = 'x'", "tags:each = reviewers:each"):
        (test,) = (
            call.test.in_process
            for call in each_test_call(bind(rule).specialization.formula)
            if _has_lists(call)
        )
        assert test is not None
        row: Row = {"title": "x", "tags": hundred, "reviewers": hundred}
        assert test(row, ()) is ("?" in rule)
        with pytest.raises(UndecidedError):
            test({**row, "tags": more}, ())


@pytest.mark.parametrize(
    "rule",
    ["title ~ geoDistance(1, 2, loc.lon, loc.lat)", "title ~ strftime('%Y', pub_date, '+1 day')"],
)
def test_what_no_evaluation_reads_need_not_be_in_the_row(rule: str) -> None:
    """A pattern that is no text matches nothing, whatever the arguments of its function hold."""
    (call,) = each_test_call(bind(rule).specialization.formula)
    assert call.test.column_names <= {"title"}


def _has_lists(call: TestCall) -> bool:
    return "tags" in call.test.column_names


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("author = @request.auth.id", [("KEY", True, 0)]),
        ("@request.auth.id ?= author && views > 3", [("KEY", True, 1)]),
        ("author = @request.auth.id && title ~ @request.query.q", [("KEY", False, 0)]),
        (
            "author = @request.auth.id || title = @request.query.q",
            [("KEY", True, 0), ("KEY", True, 0)],
        ),
        ("author = @request.auth.id || published = 1", [("KEY", True, 0), ("ALL", True, 1)]),
        ("tags:each ?= @request.query.q", [("KEY", True, 0)]),
        ("tags:each = @request.query.q", [("KEY", False, 0)]),
        ("tags:each ?= @request.query.q && tags:each ?~ 'x'", [("KEY", False, 0)]),
        ("author != @request.auth.id", [("EXCEPT", True, 0)]),
        ("title < @request.query.q", [("RANGE", True, 0)]),
        ("@request.query.q >= title && published = 1", [("RANGE", True, 1)]),
        ("title ~ @request.query.q", [("ALL", False, 0)]),
        ("title ~ @request.query.q && published = 1", [("ALL", False, 1)]),
        ("published = 1 && pub_date < @now", [("ALL", True, 1)]),
        ("author.manager = @request.auth.id", [("REMOTE", True, 0)]),
        ("comments_via_post.post.author ?= @request.auth.id", [("REMOTE", True, 0)]),
        ("comments_via_post.post.author = @request.auth.id", [("REMOTE", False, 0)]),
        (
            "reviewers.manager ?= @request.auth.id && reviewers.name ?= 'x' && published = 1",
            [("REMOTE", True, 1)],
        ),
        (
            "reviewers.manager ?= @request.auth.id && reviewers.name ?~ @request.query.q",
            [("REMOTE", False, 0)],
        ),
        ("author = @request.auth.id && author.name ~ 'x'", [("KEY", True, 1)]),
        ("author.name ~ 'x'", [("ALL", True, 1)]),
        ("author.name ~ @request.query.q", [("ALL", False, 0)]),
    ],
)
def test_the_way_to_subscribers(rule: str, expected: list[tuple[str, bool, int]]) -> None:
    """An equality is a key; AND takes its cheapest operand, OR all; else all are tested."""
    assert path_kinds(bind(rule, q="hello")) == expected


def test_equalities_that_must_all_hold_are_one_key() -> None:
    """In whatever order they are written, also when one is the client's."""
    paths = [
        *bind("author = @request.auth.id && title = @request.query.q", q="x").specialization.paths,
        *bind("author = @request.auth.id", text="title = 'y'").specialization.paths,
        *bind("title = @request.query.q && author = @request.auth.id", q="z").specialization.paths,
    ]

    assert [path.kind for path in paths] == [LookupKind.KEY] * 3
    assert len({path.entries_key for path in paths}) == 1


def test_literals_of_filters_are_values_and_not_templates() -> None:
    one, other = (bind("", text=f"title = '{text}' && views > {n}") for n, text in enumerate("ab"))

    assert one.specialization is other.specialization
    assert (one.values, other.values) == (("a", 0.0), ("b", 1.0))


def test_a_class_of_values_has_a_template_of_its_own() -> None:
    """``title = 5`` compares with the text 5.0, and an empty literal matches NULL as well."""
    made = {
        bind("", text=f"title = {literal}").specialization for literal in ("'a'", "5", "''", "'7'")
    }

    assert len(made) == 4


def test_what_depends_on_the_subscriber_alone_is_decided_once() -> None:
    """All callers with the same verdict are then in one group."""
    rule = "@request.auth.id != '' && (published = 1 || @request.auth.verified = 1)"
    verified = replace(BOB, verified=True)

    assert bind(rule, ANN) == bind(rule, BOB)
    assert bind(rule, ANN).values == ()
    assert bind(rule, verified).specialization.formula is True
    assert COMPILER.bind_caller(POSTS, rule, RuleRequest(principal=GUEST)) == DenyAll("")


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        ("author = @request.auth.id", "", True),
        ("title = 'x' && @request.auth.id != ''", "", True),
        ("author = @request.auth.manager", "", True),
        ("title = @request.query.auth && author = @request.query.q", "", False),
        ("title = 'x'", "author != ''", False),
    ],
)
def test_what_asks_of_the_subscriber_is_marked(rule: str, text: str, *, expected: bool) -> None:
    """Rows that are read later aren't evaluated by it then, as the record may have been deleted."""
    assert bind(rule, text=text, auth="x", q="y").specialization.reads_caller is expected


def test_a_known_row_of_the_subscriber_s_own_is_a_value() -> None:
    rule = "@request.auth.name = 'Ann' && views > @request.auth.level"
    known = COMPILER.bind_caller(POSTS, rule, RuleRequest(principal=ANN), OWN)
    unknown = COMPILER.bind_caller(POSTS, rule, RuleRequest(principal=ANN))
    partly = COMPILER.bind_caller(
        POSTS, rule, RuleRequest(principal=ANN), {"id": "uann", "name": "Ann"}
    )

    assert isinstance(known, BoundPredicate)
    assert isinstance(unknown, BoundPredicate)
    assert known.values == ("uann", "there", "3")
    assert unknown.values == ("uann",)
    assert partly == unknown


def test_columns_that_rules_read_of_callers() -> None:
    """Only the caller's own row counts, not what it points to."""
    posts = replace(
        POSTS,
        list_rule="@request.auth.name = title && @request.auth.id = author",
        view_rule="@request.auth.manager.level > 1 || @request.auth.groups:each ?= status",
    )
    others = (c for c in COLLECTIONS.values() if c.name != "posts")

    assert caller_columns_read_by_rules(Collections((posts, *others))) == {
        "users": ("groups", "manager", "name")
    }


def test_superusers_pass_every_rule_and_no_filter() -> None:
    root = Superuser("root")

    assert bind(None, root).specialization.formula is True
    assert path_kinds(bind(None, root, text="title = 'x'")) == [("KEY", True, 0)]


def test_a_locked_rule_admits_no_user() -> None:
    assert isinstance(COMPILER.bind_caller(POSTS, None, RuleRequest(principal=ANN)), DenyAll)


def test_a_rule_that_is_bad_for_every_caller_is_an_error() -> None:
    with pytest.raises(RuleError):
        COMPILER.bind_caller(POSTS, "titel = 'x'", RuleRequest(principal=ANN))


def test_a_refused_filter_admits_no_caller() -> None:
    bound = COMPILER.bind_caller(
        POSTS, "", RuleRequest(principal=ANN, query={"filter": "internal = 'x'"})
    )

    assert isinstance(bound, DenyAll)
    assert bound.reason == 'the filter is refused: rule_name: field "internal" is hidden'


@pytest.mark.parametrize("word", ["@request.", "@collection."])
def test_a_refused_sort_refuses_its_filter(word: str) -> None:
    """As in PocketBase; without a filter, and for superusers, it is ignored."""
    sort = {"sort": f"-{word}x"}
    both = {"filter": "title = 'x'", **sort}

    assert isinstance(
        COMPILER.bind_caller(POSTS, "", RuleRequest(principal=ANN, query=both)), DenyAll
    )
    assert isinstance(reference_query(COLLECTIONS, POSTS, "", RuleRequest(query=both)), DenyAll)
    assert isinstance(
        COMPILER.bind_caller(POSTS, "", RuleRequest(principal=ANN, query=sort)), BoundPredicate
    )
    root = RuleRequest(principal=Superuser("root"), query=both)
    assert isinstance(COMPILER.bind_caller(POSTS, "", root), BoundPredicate)


def test_texts_are_put_in_order_by_postgres_where_bytes_are_no_code_points() -> None:
    """In LATIN9 the euro sign sorts before every accented letter."""
    compiler = RuleCompiler(Collections(tuple(COLLECTIONS.values()), server_encoding="LATIN9"))
    request = RuleRequest(principal=ANN, query={"q": "a"})
    bound = compiler.bind_caller(POSTS, "title < @request.query.q && views < 3", request)

    assert isinstance(bound, BoundPredicate)
    decided = {
        call.test.in_process is not None: call.test.column_names
        for call in each_test_call(bound.specialization.formula)
    }
    assert decided == {False: {"title"}, True: {"views"}}
