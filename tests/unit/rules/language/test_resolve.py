"""The resolver: what each kind of path becomes, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.errors import RuleError, RuleNameError, RuleSyntaxError, RuleUnsupportedError
from pgrealtime.rules.language import predicate
from pgrealtime.rules.language.parameters import (
    LiftedLiteral,
    LiteralParameter,
    Macro,
    RequestValue,
)
from pgrealtime.rules.language.predicate import DenyAll
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.resolve import resolve_filter, resolve_rule
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.sql.reference import ReferenceQuery, check_rule, reference_query
from tests.unit.rules.schema import COLLECTIONS, COMMENTS, POSTS, TEAMS, USERS

HERE = predicate.RowPath(predicate.ScopeRow("posts"))
AUTHOR = HERE.extended_by(predicate.ToOne(POSTS.fields_by_name["author"], "users"))
REVIEWS = HERE.extended_by(predicate.EachValue(POSTS.fields_by_name["reviewers"]))
REVIEWERS = REVIEWS.extended_by(predicate.ToEach("users"))
SELF = predicate.RowPath(predicate.CallerRow("users"))


def _left(path: str, auth: Collection | None = USERS) -> predicate.Term:
    where = resolve_rule(f"{path} = 'x'", COLLECTIONS, POSTS, auth).where
    assert isinstance(where, predicate.Comparison)
    return where.left


def _own(name: str, part: predicate.Modifier = predicate.Modifier.WHOLE) -> predicate.FieldValue:
    return predicate.FieldValue(HERE, POSTS.fields_by_name[name], part)


@pytest.mark.parametrize(
    ("path", "term"),
    [
        ("title", _own("title")),
        ("title:lower", _own("title", predicate.Modifier.LOWER)),
        ("author", _own("author")),
        ("author.id", _own("author")),
        (
            "author.id:lower",
            predicate.FieldValue(AUTHOR, USERS.fields_by_name["id"], predicate.Modifier.LOWER),
        ),
        ("author.name", predicate.FieldValue(AUTHOR, USERS.fields_by_name["name"])),
        ("author.pin", predicate.FieldValue(AUTHOR, USERS.fields_by_name["pin"])),
        ("reviewers", _own("reviewers")),
        ("reviewers.id", predicate.FieldValue(REVIEWERS, USERS.fields_by_name["id"])),
        ("reviewers:each", predicate.EachTerm(REVIEWS)),
        ("reviewers:length", _own("reviewers", predicate.Modifier.LENGTH)),
        ("author:each", _own("author", predicate.Modifier.EACH)),
        ("status:length", _own("status", predicate.Modifier.LENGTH)),
        # modifiers that a field doesn't have are ignored
        ("title:length", _own("title")),
        ("title:isset", _own("title")),
        ("views:each", _own("views")),
        # json and points
        ("data", predicate.JsonValue(HERE, POSTS.fields_by_name["data"], ())),
        ("data:each", predicate.JsonValue(HERE, POSTS.fields_by_name["data"], ())),
        ("data.a.0", predicate.JsonValue(HERE, POSTS.fields_by_name["data"], ("a", "0"))),
        ("data.a:lower", predicate.JsonValue(HERE, POSTS.fields_by_name["data"], ("alower",))),
        ("loc.lon", predicate.JsonValue(HERE, POSTS.fields_by_name["loc"], ("lon",))),
        ("loc", _own("loc")),
        # back relations
        (
            "comments_via_post.score",
            predicate.FieldValue(
                HERE.extended_by(
                    predicate.BackRelation(
                        "comments", COMMENTS.fields_by_name["post"], is_unique=False
                    )
                ),
                COMMENTS.fields_by_name["score"],
            ),
        ),
        # other collections
        (
            "@collection.teams:x.name",
            predicate.FieldValue(
                predicate.RowPath(predicate.CollectionRows("teams", "x")),
                TEAMS.fields_by_name["name"],
            ),
        ),
        (
            "@collection.Teams.name",
            predicate.FieldValue(
                predicate.RowPath(predicate.CollectionRows("teams", None)),
                TEAMS.fields_by_name["name"],
            ),
        ),
        (
            "@collection.pbc_teams.name",
            predicate.FieldValue(
                predicate.RowPath(predicate.CollectionRows("teams", None)),
                TEAMS.fields_by_name["name"],
            ),
        ),
        # the subscriber
        ("@request.auth.id", predicate.ParameterTerm(RequestValue(("auth", "id")))),
        ("@request.auth.name", predicate.FieldValue(SELF, USERS.fields_by_name["name"])),
        (
            "@request.auth.id:lower",
            predicate.FieldValue(SELF, USERS.fields_by_name["id"], predicate.Modifier.LOWER),
        ),
        ("@request.auth.nope", predicate.Keyword(None)),
        ("@request.auth.nope.deeper", predicate.Keyword(None)),
        ("@request.auth.posts_via_nope.id", predicate.Keyword(None)),
        ("@request.query.k", predicate.ParameterTerm(RequestValue(("query", "k")))),
        (
            "@request.query.views",
            predicate.ParameterTerm(RequestValue(("query", "views"), is_read_as_number=True)),
        ),
        (
            "@request.query.k:isset",
            predicate.ParameterTerm(RequestValue(("query", "k"), is_isset=True)),
        ),
        (
            "@request.headers.k:lower",
            predicate.ParameterTerm(RequestValue(("headers", "k"), is_lower=True)),
        ),
        ("@request.context", predicate.ParameterTerm(RequestValue(("context",)))),
        ("@request.body.title", predicate.Keyword(None)),
        ("@request.body.title:lower", predicate.ParameterTerm(LiteralParameter(""))),
        ("@request.body.tags:length", predicate.Keyword(False)),
        ("@request.body.tags:each", predicate.AbsentEach(is_multiple=True)),
        # macros before fields, fields before keywords
        ("@now", predicate.ParameterTerm(Macro.NOW)),
        ("true", _own("true")),
        ("True", predicate.Keyword(True)),
        ("NULL", predicate.Keyword(None)),
    ],
)
def test_path_means(path: str, term: predicate.Term) -> None:
    """Every kind of path, as PocketBase resolves it."""
    assert _left(path) == term


@pytest.mark.parametrize(
    "path", ["@request.auth.name", "@request.auth.id:isset", "@request.auth.nope.x"]
)
def test_paths_of_a_guest_are_null(path: str) -> None:
    """A rule serves guests and several auth collections, so an unknown name there is no error."""
    assert _left(path, None) == predicate.Keyword(None)


@pytest.mark.parametrize(
    ("rule", "error", "place", "hint"),
    [
        ("titel = 1", RuleNameError, (0, 5), 'Perhaps you meant "title".'),
        ("id = '1' && author.nam ~ 'x'", RuleNameError, (12, 22), 'Perhaps you meant "name".'),
        (
            "1 = coment_via_post.id",
            RuleNameError,
            (4, 22),
            'Perhaps you meant "comments_via_post".',
        ),
        (
            "comment_via_post.id = 1",
            RuleNameError,
            (0, 19),
            'Perhaps you meant "comments_via_post".',
        ),
        ("@collection.team.id = 1", RuleNameError, (0, 19), 'Perhaps you meant "teams".'),
        ("strftim('x') = 1", RuleNameError, (0, 12), 'Perhaps you meant "strftime".'),
        ("title:lowr = 1", RuleNameError, (0, 10), 'Perhaps you meant "lower".'),
        ("@yesterdy = 1", RuleNameError, (0, 9), 'Perhaps you meant "@yesterday".'),
        ("nil = 1", RuleNameError, (0, 3), ""),
        ("Title = 1", RuleNameError, (0, 5), 'Perhaps you meant "title".'),
        ("tags:each:lower = 1", RuleNameError, (0, 15), ""),
        ("@request.foo = 1", RuleNameError, (0, 12), ""),
        ("@request.auth = 1", RuleNameError, (0, 13), ""),
        ("@request.data.x = 1", RuleNameError, (0, 15), ""),
        ("@request.method:lower = 1", RuleNameError, (0, 21), ""),
        ("collectionName = 1", RuleNameError, (0, 14), ""),
        ("title.x = 1", RuleSyntaxError, (0, 7), ""),
        ("comments_via_score.id = 1", RuleSyntaxError, (0, 21), ""),
        ("users_via_groups.id = 1", RuleSyntaxError, (0, 19), ""),
        (
            "comments_via_post = 1",
            RuleNameError,
            (0, 17),
            'Perhaps you meant "comments_via_post.id".',
        ),
        ("@request.query.k:each = 1", RuleSyntaxError, (0, 21), ""),
        ("@request.body.nope:changed = 1", RuleSyntaxError, (0, 26), ""),
        ("@request.body.title:length = 1", RuleSyntaxError, (0, 26), ""),
        ("author" + ".manager" * 6 + ".name = 1", RuleSyntaxError, (0, 59), ""),
        ("geoDistance(1,2,3) = 1", RuleSyntaxError, (0, 18), ""),
        ("geoDistance('1',2,3,4) = 1", RuleSyntaxError, (0, 22), ""),
        ("strftime() = 1", RuleSyntaxError, (0, 10), ""),
        ("strftime(title) = 1", RuleSyntaxError, (0, 15), ""),
        ("strftime('%Y', strftime('%Y')) = 1", RuleSyntaxError, (0, 30), ""),
        ("strftime('%Y', title, views) = 1", RuleSyntaxError, (0, 28), ""),
        ("strftime('%Y', title, 'localtime') = 1", RuleUnsupportedError, (0, 38), ""),
        ("strftime('%J', title) = 1", RuleUnsupportedError, (0, 25), ""),
        ("blob = 1", RuleUnsupportedError, (0, 4), ""),
        ("@collection.teams:x.id = @collection.users:x.id", RuleUnsupportedError, (25, 47), ""),
    ],
)
def test_bad_rule_is_refused_where_it_is_bad(
    rule: str, error: type[RuleError], place: tuple[int, int], hint: str
) -> None:
    """The error has the cause, its position, and the nearest known name."""
    with pytest.raises(error) as refused:
        check_rule(COLLECTIONS, POSTS, rule)
    assert (refused.value.start, refused.value.end) == place
    assert refused.value.hint == hint


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "1 = 2",
        "title > views && published = 'x'",
        "@request.auth.nope = @request.query.whatever.x",
        "@request.body.nope.deep = null",
        "author" + ".manager" * 5 + ".name = 1",
    ],
)
def test_nonsense_that_is_no_error_is_accepted(rule: str) -> None:
    """Operands of different types and missing keys of a request are no errors."""
    check_rule(COLLECTIONS, POSTS, rule)


# --- filters


@pytest.mark.parametrize(
    "text",
    [
        "title = '@request.'",
        "title = '@collection.x'",
        "internal = 'x'",
        "author.pin = '1'",
        "author.password = 'x'",
        "author.tokenKey != ''",
        "secrets_via_post.id != ''",
        "nope = 1",
        "title = '" + "x" * 3500 + "'",
    ],
)
def test_filter_is_held_to_what_its_sender_may_see(text: str) -> None:
    """Hidden fields, collections without list rule, @request. and @collection. are refused."""
    with pytest.raises(RuleError):
        resolve_filter(text, COLLECTIONS, POSTS, USERS)


def test_filter_joins_only_what_can_be_listed() -> None:
    """Every row that a filter joins must meet its collection's list rule."""
    guarded = Collections((_with_rule(USERS, "level > 0"), TEAMS, POSTS, COMMENTS))
    leaf = predicate.Comparison(
        predicate.FieldValue(AUTHOR, USERS.fields_by_name["name"]),
        Op.EQ,
        False,
        predicate.ParameterTerm(LiteralParameter("x")),
    )
    missing = predicate.Comparison(
        predicate.FieldValue(AUTHOR, USERS.fields_by_name["id"]),
        Op.EQ,
        True,
        predicate.ParameterTerm(LiteralParameter("")),
    )
    level = predicate.FieldValue(
        predicate.RowPath(predicate.ScopeRow("users")), USERS.fields_by_name["level"]
    )
    rule = predicate.Comparison(level, Op.GT, False, predicate.ParameterTerm(LiteralParameter(0.0)))

    found = resolve_filter("author.name = 'x'", guarded, POSTS, None)

    demanded = predicate.Disjunction((missing, predicate.NestedRule(AUTHOR, rule)))
    assert found.where == predicate.Conjunction((leaf, demanded))


@pytest.mark.parametrize("text", ["reviewers.name = 'x'", "reviewers.email != 'x'"])
def test_a_superuser_s_filter_decides_as_in_pocketbase(text: str) -> None:
    """There is nothing to hide from one: ``strict`` restricts other clients only."""
    guarded = (_with_rule(USERS, "level > 0"), TEAMS, POSTS, COMMENTS)
    open_, strict = Collections(guarded), Collections(guarded, is_strict=True)

    def resolved(collections: Collections, *, is_superuser: bool) -> predicate.Predicate:
        return resolve_filter(text, collections, POSTS, None, is_superuser=is_superuser)

    exact = resolved(open_, is_superuser=True)
    assert resolved(strict, is_superuser=True) == exact
    assert resolved(strict, is_superuser=False) != exact


def _with_rule(collection: Collection, rule: str | None) -> Collection:
    return replace(collection, list_rule=rule)


def test_filter_finds_an_address_only_where_it_is_shown() -> None:
    """Each comparison with an e-mail address requires emailVisibility of the same row."""
    where = resolve_filter("email != ''", COLLECTIONS, USERS, None).where
    here = predicate.RowPath(predicate.ScopeRow("users"))
    assert where == predicate.Conjunction(
        (
            predicate.Comparison(
                predicate.FieldValue(here, USERS.fields_by_name["email"]),
                Op.NE,
                False,
                predicate.ParameterTerm(LiteralParameter("")),
            ),
            predicate.Comparison(
                predicate.FieldValue(here, USERS.fields_by_name["emailVisibility"]),
                Op.EQ,
                True,
                predicate.Keyword(True),
            ),
        )
    )


def test_filters_that_differ_in_literals_share_a_predicate() -> None:
    """A filter is compiled without its literals; the format of strftime stays."""
    one = resolve_filter("title = 'a' && views > 1", COLLECTIONS, POSTS, None)
    other = resolve_filter("title  =  'b' && views > 22", COLLECTIONS, POSTS, None)

    assert one != other
    assert predicate.lift_literals(one)[0] == predicate.lift_literals(other)[0]
    assert predicate.lift_literals(other)[1] == ("b", 22.0)
    assert predicate.condition_parameters(predicate.lift_literals(one)[0].where) == (
        LiftedLiteral(0),
        LiftedLiteral(1),
    )


# --- what comes of it


def test_rule_that_fails_for_one_kind_of_subscriber_admits_none_of_them() -> None:
    """PocketBase checks a rule as a guest when it is saved; what fails only later denies."""
    ann = AuthRecord(collection_id="pbc_users", collection_name="users", id="uann")
    rule = "@request.auth.level.x = 1 || id != ''"

    check_rule(COLLECTIONS, POSTS, rule)
    query = reference_query(COLLECTIONS, POSTS, rule, RuleRequest(principal=ann))
    assert isinstance(query, DenyAll)
    assert isinstance(reference_query(COLLECTIONS, POSTS, rule, RuleRequest()), ReferenceQuery)


_WORDS = st.sampled_from(
    [
        *("title", "views", "data.a.0", "loc.lon", "reviewers.name", "tags:each", "author.id"),
        *("comments_via_post.score", "@collection.teams.name", "@request.auth.name", "@now"),
        *("@request.query.views", "@request.body.tags:each", "null", "true", "nope", "'x'", "5"),
        *("strftime('%Y-%q', pub_date, '+1 month')", "geoDistance(1, 2, loc.lon, title)"),
        *("=", "?!=", "~", "!~", ">", "?<=", "&&", "||", "(", ")", ":lower", ".x", "//"),
    ]
)


@given(st.one_of(st.text(), st.lists(_WORDS, max_size=14).map(" ".join)))
@settings(max_examples=300)
def test_any_text_is_validated_or_refused_with_a_place(text: str) -> None:
    """Any text gives a RuleError or a translation, never another exception."""
    try:
        check_rule(COLLECTIONS, POSTS, text)
    except RuleError as error:
        assert 0 <= error.start <= error.end <= len(text)  # noqa: PT017 (most texts are refused)
