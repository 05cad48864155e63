"""What paths mean, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.errors import RuleError, RuleNameError, RuleSyntaxError, RuleUnsupportedError
from pgrealtime.rules.language import predicate
from pgrealtime.rules.language.parameters import Lifted, Literal, Macro, RequestValue
from pgrealtime.rules.language.request import Request
from pgrealtime.rules.language.resolve import resolve_filter, resolve_rule
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.sql.reference import Nobody, Reference, reference, validate
from tests.unit.rules.schema import COLLECTIONS, COMMENTS, POSTS, TEAMS, USERS

HERE = predicate.Place(predicate.Here("posts"))
AUTHOR = HERE.to(predicate.ToOne(POSTS.by_name["author"], "users"))
REVIEWS = HERE.to(predicate.Items(POSTS.by_name["reviewers"]))
REVIEWERS = REVIEWS.to(predicate.ToItem("users"))
SELF = predicate.Place(predicate.AuthRow("users"))


def _left(path: str, auth: Collection | None = USERS) -> predicate.Term:
    where = resolve_rule(f"{path} = 'x'", COLLECTIONS, POSTS, auth).where
    assert isinstance(where, predicate.Comparison)
    return where.left


def _own(name: str, part: predicate.Part = predicate.Part.WHOLE) -> predicate.FieldValue:
    return predicate.FieldValue(HERE, POSTS.by_name[name], part)


@pytest.mark.parametrize(
    ("path", "term"),
    [
        ("title", _own("title")),
        ("title:lower", _own("title", predicate.Part.LOWER)),
        ("author", _own("author")),
        ("author.id", _own("author")),
        (
            "author.id:lower",
            predicate.FieldValue(AUTHOR, USERS.by_name["id"], predicate.Part.LOWER),
        ),
        ("author.name", predicate.FieldValue(AUTHOR, USERS.by_name["name"])),
        ("author.pin", predicate.FieldValue(AUTHOR, USERS.by_name["pin"])),
        ("reviewers", _own("reviewers")),
        ("reviewers.id", predicate.FieldValue(REVIEWERS, USERS.by_name["id"])),
        ("reviewers:each", predicate.Item(REVIEWS)),
        ("reviewers:length", _own("reviewers", predicate.Part.LENGTH)),
        ("author:each", _own("author", predicate.Part.EACH)),
        ("status:length", _own("status", predicate.Part.LENGTH)),
        # modifiers that a field doesn't have are ignored
        ("title:length", _own("title")),
        ("title:isset", _own("title")),
        ("views:each", _own("views")),
        # json and points
        ("data", predicate.JsonValue(HERE, POSTS.by_name["data"], ())),
        ("data:each", predicate.JsonValue(HERE, POSTS.by_name["data"], ())),
        ("data.a.0", predicate.JsonValue(HERE, POSTS.by_name["data"], ("a", "0"))),
        ("data.a:lower", predicate.JsonValue(HERE, POSTS.by_name["data"], ("alower",))),
        ("loc.lon", predicate.JsonValue(HERE, POSTS.by_name["loc"], ("lon",))),
        ("loc", _own("loc")),
        # back relations
        (
            "comments_via_post.score",
            predicate.FieldValue(
                HERE.to(predicate.Back("comments", COMMENTS.by_name["post"], is_unique=False)),
                COMMENTS.by_name["score"],
            ),
        ),
        # other collections
        (
            "@collection.teams:x.name",
            predicate.FieldValue(
                predicate.Place(predicate.AllRows("teams", "x")), TEAMS.by_name["name"]
            ),
        ),
        (
            "@collection.Teams.name",
            predicate.FieldValue(
                predicate.Place(predicate.AllRows("teams", None)), TEAMS.by_name["name"]
            ),
        ),
        (
            "@collection.pbc_teams.name",
            predicate.FieldValue(
                predicate.Place(predicate.AllRows("teams", None)), TEAMS.by_name["name"]
            ),
        ),
        # the subscriber
        ("@request.auth.id", predicate.Constant(RequestValue(("auth", "id")))),
        ("@request.auth.name", predicate.FieldValue(SELF, USERS.by_name["name"])),
        (
            "@request.auth.id:lower",
            predicate.FieldValue(SELF, USERS.by_name["id"], predicate.Part.LOWER),
        ),
        ("@request.auth.nope", predicate.Keyword(None)),
        ("@request.auth.nope.deeper", predicate.Keyword(None)),
        ("@request.auth.posts_via_nope.id", predicate.Keyword(None)),
        ("@request.query.k", predicate.Constant(RequestValue(("query", "k")))),
        (
            "@request.query.views",
            predicate.Constant(RequestValue(("query", "views"), as_number=True)),
        ),
        ("@request.query.k:isset", predicate.Constant(RequestValue(("query", "k"), is_set=True))),
        (
            "@request.headers.k:lower",
            predicate.Constant(RequestValue(("headers", "k"), is_lower=True)),
        ),
        ("@request.context", predicate.Constant(RequestValue(("context",)))),
        ("@request.body.title", predicate.Keyword(None)),
        ("@request.body.title:lower", predicate.Constant(Literal(""))),
        ("@request.body.tags:length", predicate.Keyword(False)),
        ("@request.body.tags:each", predicate.NoItem(is_multiple=True)),
        # macros before fields, fields before keywords
        ("@now", predicate.Constant(Macro.NOW)),
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
    """Rules are shared by guests and several auth collections: nothing there is an error."""
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
        (
            "@collection.teams:x.id = @collection.users:x.id",
            RuleUnsupportedError,
            (25, 47),
            "",
        ),
    ],
)
def test_bad_rule_is_refused_where_it_is_bad(
    rule: str, error: type[RuleError], place: tuple[int, int], hint: str
) -> None:
    """At start an operator reads what is wrong, where, and what was probably meant."""
    with pytest.raises(error) as refused:
        validate(COLLECTIONS, POSTS, rule)
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
    """Types that don't fit and requests that lack a key are no mistakes of the language."""
    validate(COLLECTIONS, POSTS, rule)


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
    """Hidden fields, locked collections and the words @request. and @collection. are refused."""
    with pytest.raises(RuleError):
        resolve_filter(text, COLLECTIONS, POSTS, USERS)


def test_filter_joins_only_what_can_be_listed() -> None:
    """A collection's list rule is demanded of every row of it that the filter reads."""
    guarded = Collections((_with_rule(USERS, "level > 0"), TEAMS, POSTS, COMMENTS))
    leaf = predicate.Comparison(
        predicate.FieldValue(AUTHOR, USERS.by_name["name"]),
        Op.EQ,
        False,
        predicate.Constant(Literal("x")),
    )
    missing = predicate.Comparison(
        predicate.FieldValue(AUTHOR, USERS.by_name["id"]),
        Op.EQ,
        True,
        predicate.Constant(Literal("")),
    )
    level = predicate.FieldValue(predicate.Place(predicate.Here("users")), USERS.by_name["level"])
    rule = predicate.Comparison(level, Op.GT, False, predicate.Constant(Literal(0.0)))

    found = resolve_filter("author.name = 'x'", guarded, POSTS, None)

    demanded = predicate.Disjunction((missing, predicate.Nested(AUTHOR, rule)))
    assert found.where == predicate.Conjunction((leaf, demanded))


def _with_rule(collection: Collection, rule: str | None) -> Collection:
    return replace(collection, list_rule=rule)


def test_filter_finds_an_address_only_where_it_is_shown() -> None:
    """Each comparison with an e-mail address asks for emailVisibility of the same row."""
    where = resolve_filter("email != ''", COLLECTIONS, USERS, None).where
    here = predicate.Place(predicate.Here("users"))
    assert where == predicate.Conjunction(
        (
            predicate.Comparison(
                predicate.FieldValue(here, USERS.by_name["email"]),
                Op.NE,
                False,
                predicate.Constant(Literal("")),
            ),
            predicate.Comparison(
                predicate.FieldValue(here, USERS.by_name["emailVisibility"]),
                Op.EQ,
                True,
                predicate.Keyword(True),
            ),
        )
    )


def test_filters_that_differ_in_literals_share_a_predicate() -> None:
    """What is compiled once per shape has no literal in it; a format's text stays."""
    one = resolve_filter("title = 'a' && views > 1", COLLECTIONS, POSTS, None)
    other = resolve_filter("title  =  'b' && views > 22", COLLECTIONS, POSTS, None)

    assert one != other
    assert predicate.lifted(one)[0] == predicate.lifted(other)[0]
    assert predicate.lifted(other)[1] == ("b", 22.0)
    assert predicate.parameters(predicate.lifted(one)[0].where) == (Lifted(0), Lifted(1))


# --- what comes of it


def test_rule_that_fails_for_one_kind_of_subscriber_admits_none_of_them() -> None:
    """At save time rules are checked as a guest; what only shows later denies and isn't raised."""
    ann = AuthRecord(collection_id="pbc_users", collection_name="users", id="uann")
    rule = "@request.auth.level.x = 1 || id != ''"

    validate(COLLECTIONS, POSTS, rule)
    asked = reference(COLLECTIONS, POSTS, rule, Request(principal=ann))
    assert isinstance(asked, Nobody)
    assert isinstance(reference(COLLECTIONS, POSTS, rule, Request()), Reference)


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
    """Whatever stands in a configuration or comes from a client: a RuleError or a translation."""
    try:
        validate(COLLECTIONS, POSTS, text)
    except RuleError as error:
        assert 0 <= error.start <= error.end <= len(text)  # noqa: PT017 (most texts are refused)
