"""Which subscriptions form a group, which receive the same bytes, and what one client may use."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collections
from pgrealtime.errors import SubscriptionLimitError
from pgrealtime.hub.connections.connection import Connection, Subscription
from pgrealtime.hub.evaluation.filter_limits import REMOTE_FILTERS_PER_CONNECTION as REMOTE_FILTERS
from pgrealtime.hub.evaluation.filter_limits import UNINDEXED_FILTERS_PER_ADDRESS
from pgrealtime.hub.evaluation.filter_limits import VIEWS_PER_CONNECTION as VIEWS
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.protocol.topic import parse_topic
from pgrealtime.records.encode import View
from pgrealtime.rules.engine.batch_query import PairQuestion
from tests.engine_driving import evaluate_in_process
from tests.unit.hub.harness import COLLECTIONS, MemorySink
from tests.unit.rules.schema import COLLECTIONS as RELATED

NOW = datetime(2024, 5, 6, tzinfo=UTC)
VIEW = View(sees_hidden=False, sees_email=False, fields=None)


def make_matcher(list_rule: str = "", view_rule: str = "") -> Matcher:
    posts = replace(COLLECTIONS["posts"], list_rule=list_rule, view_rule=view_rule)
    others = (c for c in COLLECTIONS.values() if c.name != "posts")
    return Matcher(Collections((posts, *others)))


def connection(address: str = "") -> Connection:
    start = Cursor(LSN(0), 0)
    return Connection("c", MemorySink(), address=address, epoch="", cursor=start, now=0.0)


def subscribe(
    matcher: Matcher, name: str, user_id: str = "ann", on: Connection | None = None
) -> Subscription | str:
    """Return the subscription, or why it never receives events."""
    made = Subscription(on or connection(), parse_topic(name), VIEW, "")
    record = AuthRecord(collection_id="pbc_people", collection_name="people", id=user_id)
    try:
        reason = matcher.add(made, record)
    except SubscriptionLimitError as error:
        return error.limit_name
    made.connection.subscriptions[name] = made
    return reason or made


def put(matcher: Matcher, name: str, user_id: str = "ann") -> Subscription:
    """Return the subscription, which must be accepted."""
    made = subscribe(matcher, name, user_id)
    assert isinstance(made, Subscription)
    return made


def receivers(matcher: Matcher, record_id: str, title: str = "t") -> set[Subscription]:
    """Return the subscriptions that receive the update of a post."""
    row: Row = {"id": record_id, "title": title}
    event = Event(COLLECTIONS["posts"], "update", record_id, row, Cursor(LSN(8), 1), Xid(3))
    evaluation = evaluate_in_process(matcher, [event], NOW)
    assert evaluation.questions() == []
    return {
        one for group in evaluation.hits(0) for members in group.render_groups for one in members
    }


def filtered(text: str) -> str:
    """Return a topic of posts with a filter."""
    return f'posts/*?options={{"query":{{"filter":"{text}"}}}}'


def test_a_record_s_topic_receives_that_record_under_its_view_rule() -> None:
    """The topic of the whole collection is under the list rule."""
    matcher = make_matcher("title = 'listed'", "title = @request.auth.id")
    whole = put(matcher, "posts/*")
    ann, bob = put(matcher, "posts/a"), put(matcher, "posts/a", "bob")
    also_ann, other = put(matcher, "posts/a?x"), put(matcher, "posts/b")

    assert receivers(matcher, "a", "listed") == {whole}
    assert receivers(matcher, "a", "ann") == {ann, also_ann}
    assert receivers(matcher, "a", "bob") == {bob}
    assert receivers(matcher, "b", "ann") == {other}
    assert receivers(matcher, "c", "ann") == set()


def test_topics_that_differ_in_one_value_are_distinguished() -> None:
    """They differ in the query, the headers, or the caller, which the rule reads."""
    rule = "title = @request.query.a || title = @request.headers.b || title = @request.auth.id"
    matcher = make_matcher(rule, f"title = 'r' && ({rule})")
    made = {
        title: put(matcher, f'posts/{topic}?options={{"{part}":{{"{name}":"{title}"}}}}', user_id)
        for title, topic, part, name, user_id in (
            ("q", "*", "query", "a", "x"),
            ("q2", "*", "query", "a", "x"),
            ("h", "*", "headers", "b", "x"),
            ("h2", "*", "headers", "b", "x"),
            ("ann", "*", "query", "c", "ann"),
            ("bob", "*", "query", "c", "bob"),
            ("r", "r", "query", "c", "r"),
        )
    }

    for title, one in made.items():
        assert receivers(matcher, "r", title) == {one}


def test_a_caller_whose_row_has_changed_is_distinguished_from_its_former_values() -> None:
    """Two subscriptions of one account with different values of its row are two groups."""
    matcher = make_matcher("title = @request.auth.email:lower")
    record = AuthRecord(collection_id="pbc_people", collection_name="people", id="ann")
    made = [Subscription(connection(), parse_topic("posts/*"), VIEW, "") for _ in range(2)]
    for one, email in zip(made, ("A@X", "B@X"), strict=True):
        matcher.add(one, record, {"id": "ann", "email": email})

    assert [receivers(matcher, "r", title) for title in ("a@x", "b@x")] == [{one} for one in made]


def test_subscriptions_with_equal_conditions_are_evaluated_together() -> None:
    """Whatever their callers, where the rule reads nothing of them, and whatever they receive."""
    matcher = make_matcher("@request.auth.id != '' && title != 'secret'")
    ann, bob = put(matcher, "posts/*"), put(matcher, "posts", "bob")
    narrow = put(matcher, filtered("title='a'"))

    assert ann.group is not None
    assert ann.group is bob.group is not narrow.group
    assert [list(members) for members in ann.group.render_groups] == [[ann], [bob]]


def test_nothing_is_left_of_removed_subscriptions() -> None:
    """Neither groups nor indexes keep a removed subscription."""
    matcher = make_matcher("title = @request.auth.id || title ~ @request.auth.id", "title ~ 'x'")
    names = ("posts/*", "posts", "posts/a", "posts/a?x", "posts/b", filtered("title~'a'"))
    made = [put(matcher, name, user_id) for user_id in ("ann", "bob") for name in names]
    for one in made:
        matcher.remove(one)

    assert matcher._tables == {}
    assert not matcher._unindexed_filters
    assert all(one.group is None for one in made)


def test_a_connection_has_a_number_of_unindexed_filters() -> None:
    """Each change is evaluated against all of them; filters with an equality are indexed."""
    matcher, client = make_matcher(), connection()
    for n in range(50):
        assert isinstance(subscribe(matcher, filtered(f"title~'{n}'"), on=client), Subscription)
    refused = subscribe(matcher, filtered("title~'more'"), on=client)
    same = subscribe(matcher, filtered("title~'7'") + "&x", on=connection())

    assert refused == "unindexed_filters"
    assert isinstance(subscribe(matcher, filtered("title~'8'") + "&x", on=client), Subscription)
    assert isinstance(same, Subscription)
    assert isinstance(subscribe(matcher, filtered("title='more'"), on=client), Subscription)
    assert isinstance(subscribe(matcher, filtered("title~'mine'")), Subscription)


@pytest.mark.parametrize(
    ("address", "other_address"),
    [
        pytest.param("10.0.0.8", "10.0.0.9", id="IPv4"),
        pytest.param("2001:0db8::{:x}", "2001:0db8:0:1::1", id="IPv6 has it for each /64"),
    ],
)
def test_an_address_has_a_number_of_unindexed_filters(address: str, other_address: str) -> None:
    """However many connections it opens. A filter that it shares with others there counts once."""
    matcher = make_matcher()
    client = [connection(address.format(n)) for n in range(UNINDEXED_FILTERS_PER_ADDRESS // 50 + 1)]
    for n in range(UNINDEXED_FILTERS_PER_ADDRESS):
        made = subscribe(matcher, filtered(f"title~'{n}'"), on=client[n // 50])
        assert isinstance(made, Subscription)
    other = connection(other_address)

    assert (
        subscribe(matcher, filtered("title~'x'"), on=client[-1]) == "unindexed_filters_of_address"
    )
    assert subscribe(matcher, filtered("title=id"), on=client[-1]) == "unindexed_filters_of_address"
    assert isinstance(subscribe(matcher, filtered("title~'7'"), on=client[-1]), Subscription)
    assert isinstance(subscribe(matcher, filtered("title~'x'"), on=other), Subscription)
    matcher.remove(client[0].subscriptions[filtered("title~'1'")])
    assert isinstance(subscribe(matcher, filtered("title~'y'"), on=client[-1]), Subscription)


def test_rules_never_run_out() -> None:
    """6,000 subscriptions whose rule no index serves, from one address: rules aren't limited."""
    matcher = make_matcher("title ~ @request.auth.id")
    made = [put(matcher, "posts/*", f"u{n:04}") for n in range(6000)]

    assert all(one.group is not None for one in made)
    assert receivers(matcher, "a", "of u5999 and u0000") == {made[0], made[-1]}


def with_relations(list_rule: str = "") -> Matcher:
    """Return a matcher whose posts have authors."""
    posts = replace(RELATED["posts"], list_rule=list_rule, view_rule="")
    return Matcher(Collections((posts, *(c for c in RELATED.values() if c.name != "posts"))))


def remote_filter(text: str) -> str:
    """Return a topic whose filter only PostgreSQL can evaluate."""
    return filtered(f"author.name~'{text}'")


def test_a_connection_has_a_number_of_filters_that_need_postgres() -> None:
    """Filters evaluated in the process don't count, nor do those of other connections."""
    matcher, client = with_relations(), connection()
    for n in range(REMOTE_FILTERS):
        assert isinstance(subscribe(matcher, remote_filter(str(n)), on=client), Subscription)

    assert subscribe(matcher, remote_filter("more"), on=client) == "asking_filters"
    assert isinstance(subscribe(matcher, filtered("title='more'"), on=client), Subscription)
    assert isinstance(subscribe(matcher, "posts/*", on=client), Subscription)
    assert isinstance(subscribe(matcher, remote_filter("more")), Subscription)


def test_a_question_that_the_rule_needs_anyway_is_not_counted_for_the_filter() -> None:
    """A filter counts only if it needs PostgreSQL where its rule doesn't."""
    matcher, client = with_relations("author.name ~ title"), connection()
    names = [filtered(f"title={n}%26%26author.name~title") for n in range(REMOTE_FILTERS + 1)]
    for name in ("posts/*", "posts", *names):
        made = subscribe(matcher, name, on=client)
        assert isinstance(made, Subscription)
        assert made.group is not None


def test_bound_again_the_same_topics_fit() -> None:
    """After a change of caller, a reload, or the same call again, nothing is counted twice."""
    matcher, client = with_relations(), connection()
    for n in range(REMOTE_FILTERS):
        subscribe(matcher, remote_filter(str(n)), on=client)
    made = list(client.subscriptions.values())
    record = AuthRecord(collection_id="pbc_people", collection_name="people", id="bob")
    for one in made:
        matcher.remove(one)
        matcher.add(one, record)
    next_matcher = with_relations()
    for one in made:
        one.group = None
        next_matcher.add(one, record)
    assert all(one.group is not None for one in made)

    for one in made[:1]:
        next_matcher.remove(one)
        del client.subscriptions[one.topic.text]
    assert isinstance(subscribe(next_matcher, remote_filter("new"), on=client), Subscription)
    assert subscribe(next_matcher, remote_filter("newer"), on=client) == "asking_filters"


def test_a_connection_has_a_number_of_characters_of_filters() -> None:
    """Compiling them delays other connections; equal texts are compiled once and counted once."""
    matcher, client = make_matcher(), connection()
    texts = [f"title={n}||title='{'x' * 1000}'" for n in range(40)]
    accepted = [
        isinstance(subscribe(matcher, filtered(text), on=client), Subscription) for text in texts
    ]
    known = filtered(texts[3]) + "&again"

    assert accepted == [len("".join(texts[: n + 1])) <= 32 * 1024 for n in range(40)]
    assert subscribe(matcher, filtered(texts[-1]), on=client) == "filter_characters"
    assert isinstance(subscribe(matcher, "posts/*", on=client), Subscription)
    assert isinstance(subscribe(matcher, known, on=client), Subscription)


def test_a_connection_has_a_number_of_ways_to_see_records() -> None:
    """Each combination of fields and expand is rendered for every event, and counted once."""
    matcher, client = make_matcher(), connection()

    def made(topic: str, on: Connection, **query: str) -> Subscription | str:
        return subscribe(matcher, f"{topic}?options={json.dumps({'query': query})}", on=on)

    for n in range(VIEWS // 2):
        for more in ({"fields": f"id,title:excerpt({n})"}, {"fields": "id", "expand": f"e{n}"}):
            assert isinstance(made("posts/*", client, **more), Subscription)
    assert made("posts/*", client, fields="more") == "views"
    assert isinstance(made("posts/r", client, fields="id,title:excerpt(7)"), Subscription)
    assert isinstance(made("posts/r", client, filter="title='a'"), Subscription)
    assert isinstance(made("posts/*", connection(), fields="more"), Subscription)


@pytest.mark.parametrize("name", ["nothing/*", "", "posts/*\n"])
def test_a_topic_of_no_collection_receives_nothing(name: str) -> None:
    """It is accepted, as PocketBase accepts it, and belongs to no group."""
    matcher = make_matcher()
    made = put(matcher, name)

    assert made.group is None
    matcher.remove(made)


@pytest.mark.parametrize("more", [{}, {"heading": "b"}], ids=["toast", "renamed"])
def test_a_row_that_lacks_a_column_is_denied_to_rules_that_read_it(more: Row) -> None:
    """An unchanged TOASTed value isn't NULL: its value isn't known."""
    matcher = make_matcher("title != 'secret'")
    put(matcher, "posts/*")
    row = {"id": "a", **more}
    event = Event(COLLECTIONS["posts"], "update", "a", row, Cursor(LSN(8), 1), Xid(3))
    evaluation = evaluate_in_process(matcher, [event], NOW)

    assert not evaluation.hits(0)


@pytest.mark.parametrize("collection", ["posts/*", "posts/a"])
def test_events_don_t_find_filters_of_isolated_connections(collection: str) -> None:
    """The shared evaluation asks nothing for them; equal filters of other connections are found."""
    matcher, client, other = with_relations(), connection(), connection()
    topic = remote_filter("x").replace("posts/*", collection)
    made = subscribe(matcher, topic, on=client)
    assert isinstance(made, Subscription)
    assert isinstance(
        subscribe(matcher, remote_filter("y").replace("posts/*", collection)), Subscription
    )

    def pairs_asked() -> int:
        row: Row = dict.fromkeys((c.name for c in RELATED["posts"].table.columns), "1")
        event = Event(RELATED["posts"], "update", "a", row, Cursor(LSN(8), 1), Xid(3))
        evaluation = evaluate_in_process(matcher, [event], NOW, has_remote_filter=True)
        alone = evaluate_in_process(
            matcher, [event], NOW, [made.group] if made.group else [], has_remote_filter=True
        )
        assert len(alone.questions()) == 1
        return sum(len(i.pairs) for i in evaluation.questions() if isinstance(i, PairQuestion))

    assert pairs_asked() == 2
    matcher.set_isolated(client, is_isolated=True)
    assert pairs_asked() == 1
    same = subscribe(matcher, topic, on=other)
    assert isinstance(same, Subscription)
    assert same.group is made.group
    assert pairs_asked() == 2
    matcher.remove(same)
    assert pairs_asked() == 1
    new = subscribe(matcher, remote_filter("z").replace("posts/*", collection), on=client)
    assert isinstance(new, Subscription)
    assert pairs_asked() == 1
    matcher.set_isolated(client, is_isolated=False)
    assert pairs_asked() == 3


def test_a_subscription_removed_while_isolated_leaves_nothing_behind() -> None:
    """Removing an isolated subscription leaves nothing in the matcher."""
    matcher, client = with_relations(), connection()
    matcher.set_isolated(client, is_isolated=True)
    made = [subscribe(matcher, remote_filter(text), on=client) for text in "xy"]
    for one in made:
        assert isinstance(one, Subscription)
        matcher.remove(one)

    assert (matcher._tables, matcher._remote_filter_tables) == ({}, {})
    assert not matcher._unindexed_filters


def test_isolating_many_connections_of_a_slow_filter_takes_linear_time() -> None:
    """They are isolated all at once, while every connection waits, so the time must be linear."""

    def seconds(count: int) -> float:
        matcher = make_matcher()
        clients = [put(matcher, filtered("title ~ 'x'")).connection for _ in range(count)]
        began = time.process_time()
        for one in clients:
            matcher.set_isolated(one, is_isolated=True)
        took = time.process_time() - began
        assert not receivers(matcher, "a", "x")
        return took

    few = min(seconds(500) for _ in range(3))

    assert seconds(8000) < 48 * few + 0.02
