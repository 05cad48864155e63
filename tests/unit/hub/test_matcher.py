"""Groups: who is judged together, who receives the same, and what one client may ask for."""

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
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.evaluation.quotas import REMOTE_FILTERS_PER_CONNECTION as COSTLY
from pgrealtime.hub.evaluation.quotas import UNINDEXED_FILTERS_PER_ADDRESS
from pgrealtime.hub.evaluation.quotas import VIEWS_PER_CONNECTION as VIEWS
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.protocol.topic import parse_topic
from pgrealtime.records.encode import View
from pgrealtime.rules.engine.batch_query import PairQuestion
from tests.engine_driving import evaluate_in_process
from tests.unit.hub.room import COLLECTIONS, MemorySink
from tests.unit.rules.schema import COLLECTIONS as RELATED

NOW = datetime(2024, 5, 6, tzinfo=UTC)
VIEW = View(sees_hidden=False, sees_email=False, fields=None)


def matcher(list_rule: str = "", view_rule: str = "") -> Matcher:
    posts = replace(COLLECTIONS["posts"], list_rule=list_rule, view_rule=view_rule)
    others = (c for c in COLLECTIONS.values() if c.name != "posts")
    return Matcher(Collections((posts, *others)))


def connection(address: str = "") -> Connection:
    start = Cursor(LSN(0), 0)
    return Connection("c", MemorySink(), address=address, epoch="", cursor=start, now=0.0)


def subscribe(
    there: Matcher, name: str, who: str = "ann", on: Connection | None = None
) -> Subscription | str:
    """The subscription, or why it hears nothing."""
    made = Subscription(on or connection(), parse_topic(name), VIEW, "")
    record = AuthRecord(collection_id="pbc_people", collection_name="people", id=who)
    try:
        reason = there.add(made, record)
    except SubscriptionLimitError as error:
        return error.limit_name
    made.connection.subscriptions[name] = made
    return reason or made


def put(there: Matcher, name: str, who: str = "ann") -> Subscription:
    made = subscribe(there, name, who)
    assert isinstance(made, Subscription)
    return made


def hearing(there: Matcher, record_id: str, title: str = "t") -> set[Subscription]:
    """Who hears of a change."""
    row: Row = {"id": record_id, "title": title}
    event = Event(COLLECTIONS["posts"], "update", record_id, row, Cursor(LSN(8), 1), Xid(3))
    evaluation = evaluate_in_process(there, [event], NOW)
    assert evaluation.questions() == []
    return {
        one for group in evaluation.hits(0) for audience in group.render_groups for one in audience
    }


def filtered(text: str) -> str:
    return f'posts/*?options={{"query":{{"filter":"{text}"}}}}'


def test_a_record_s_topic_hears_of_that_record_under_its_view_rule() -> None:
    there = matcher("title = 'listed'", "title = @request.auth.id")
    whole = put(there, "posts/*")
    ann, bob = put(there, "posts/a"), put(there, "posts/a", "bob")
    also_ann, other = put(there, "posts/a?x"), put(there, "posts/b")

    assert hearing(there, "a", "listed") == {whole}
    assert hearing(there, "a", "ann") == {ann, also_ann}
    assert hearing(there, "a", "bob") == {bob}
    assert hearing(there, "b", "ann") == {other}
    assert hearing(there, "c", "ann") == set()


def test_topics_in_a_row_that_differ_in_one_thing_are_told_apart() -> None:
    """By the rule, the query, the headers, and who asks."""
    rule = "title = @request.query.a || title = @request.headers.b || title = @request.auth.id"
    there = matcher(rule, f"title = 'r' && ({rule})")
    made = {
        title: put(there, f'posts/{topic}?options={{"{part}":{{"{name}":"{title}"}}}}', who)
        for title, topic, part, name, who in (
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
        assert hearing(there, "r", title) == {one}


def test_a_caller_whose_row_has_changed_is_told_from_what_it_was() -> None:
    there = matcher("title = @request.auth.email:lower")
    record = AuthRecord(collection_id="pbc_people", collection_name="people", id="ann")
    made = [Subscription(connection(), parse_topic("posts/*"), VIEW, "") for _ in range(2)]
    for one, email in zip(made, ("A@X", "B@X"), strict=True):
        there.add(one, record, {"id": "ann", "email": email})

    assert [hearing(there, "r", title) for title in ("a@x", "b@x")] == [{one} for one in made]


def test_who_asks_the_same_is_judged_together() -> None:
    """Whoever they are, if the rule doesn't ask for it, and whatever they receive."""
    there = matcher("@request.auth.id != '' && title != 'secret'")
    ann, bob = put(there, "posts/*"), put(there, "posts", "bob")
    narrow = put(there, filtered("title='a'"))

    assert ann.group is not None
    assert ann.group is bob.group is not narrow.group
    assert [list(audience) for audience in ann.group.render_groups] == [[ann], [bob]]


def test_nothing_is_left_of_who_has_gone() -> None:
    there = matcher("title = @request.auth.id || title ~ @request.auth.id", "title ~ 'x'")
    names = ("posts/*", "posts", "posts/a", "posts/a?x", "posts/b", filtered("title~'a'"))
    made = [put(there, name, who) for who in ("ann", "bob") for name in names]
    for one in made:
        there.remove(one)

    assert there._tables == {}
    assert not there._unindexed_filters
    assert all(one.group is None for one in made)


def test_a_client_has_a_share_of_what_is_tried_one_by_one() -> None:
    """Each change tries every one of them; those with an equality cost nothing."""
    there, mine = matcher(), connection()
    for n in range(50):
        assert isinstance(subscribe(there, filtered(f"title~'{n}'"), on=mine), Subscription)
    refused = subscribe(there, filtered("title~'more'"), on=mine)
    same = subscribe(there, filtered("title~'7'") + "&x", on=connection())

    assert refused == "unindexed_filters"
    assert isinstance(subscribe(there, filtered("title~'8'") + "&x", on=mine), Subscription)
    assert isinstance(same, Subscription)
    assert isinstance(subscribe(there, filtered("title='more'"), on=mine), Subscription)
    assert isinstance(subscribe(there, filtered("title~'mine'")), Subscription)


@pytest.mark.parametrize(
    ("address", "another"),
    [
        pytest.param("10.0.0.8", "10.0.0.9", id="IPv4"),
        pytest.param("2001:0db8::{:x}", "2001:0db8:0:1::1", id="IPv6 has it for each /64"),
    ],
)
def test_an_address_has_a_share_of_what_is_tried_one_by_one(address: str, another: str) -> None:
    """However many connections it opens; what others there ask as well costs nothing more."""
    there = matcher()
    mine = [connection(address.format(n)) for n in range(UNINDEXED_FILTERS_PER_ADDRESS // 50 + 1)]
    for n in range(UNINDEXED_FILTERS_PER_ADDRESS):
        made = subscribe(there, filtered(f"title~'{n}'"), on=mine[n // 50])
        assert isinstance(made, Subscription)
    other = connection(another)

    assert subscribe(there, filtered("title~'x'"), on=mine[-1]) == "unindexed_filters_of_address"
    assert subscribe(there, filtered("title=id"), on=mine[-1]) == "unindexed_filters_of_address"
    assert isinstance(subscribe(there, filtered("title~'7'"), on=mine[-1]), Subscription)
    assert isinstance(subscribe(there, filtered("title~'x'"), on=other), Subscription)
    there.remove(mine[0].subscriptions[filtered("title~'1'")])
    assert isinstance(subscribe(there, filtered("title~'y'"), on=mine[-1]), Subscription)


def test_rules_never_run_out() -> None:
    """6,000 people whom no index tells apart, from one address, hear what their rule admits."""
    there = matcher("title ~ @request.auth.id")
    made = [put(there, "posts/*", f"u{n:04}") for n in range(6000)]

    assert all(one.group is not None for one in made)
    assert hearing(there, "a", "of u5999 and u0000") == {made[0], made[-1]}


def with_relations(list_rule: str = "") -> Matcher:
    """Posts have authors here."""
    posts = replace(RELATED["posts"], list_rule=list_rule, view_rule="")
    return Matcher(Collections((posts, *(c for c in RELATED.values() if c.name != "posts"))))


def asking(text: str) -> str:
    """A topic whose filter nobody but Postgres can decide."""
    return filtered(f"author.name~'{text}'")


def test_a_connection_has_a_number_of_filters_that_postgres_is_asked_for() -> None:
    """One client's bombs are few; everybody else, and whatever is decided here, isn't counted."""
    there, mine = with_relations(), connection()
    for n in range(COSTLY):
        assert isinstance(subscribe(there, asking(str(n)), on=mine), Subscription)

    assert subscribe(there, asking("more"), on=mine) == "asking_filters"
    assert isinstance(subscribe(there, filtered("title='more'"), on=mine), Subscription)
    assert isinstance(subscribe(there, "posts/*", on=mine), Subscription)
    assert isinstance(subscribe(there, asking("more")), Subscription)


def test_what_the_rule_asks_anyway_is_not_the_filter_s_doing() -> None:
    there, mine = with_relations("author.name ~ title"), connection()
    names = [filtered(f"title={n}%26%26author.name~title") for n in range(COSTLY + 1)]
    for name in ("posts/*", "posts", *names):
        made = subscribe(there, name, on=mine)
        assert isinstance(made, Subscription)
        assert made.group is not None


def test_bound_again_the_same_topics_fit() -> None:
    """Another caller, a reload, the same call once more: nothing counts twice."""
    there, mine = with_relations(), connection()
    for n in range(COSTLY):
        subscribe(there, asking(str(n)), on=mine)
    made = list(mine.subscriptions.values())
    record = AuthRecord(collection_id="pbc_people", collection_name="people", id="bob")
    for one in made:
        there.remove(one)
        there.add(one, record)
    another = with_relations()
    for one in made:
        one.group = None
        another.add(one, record)
    assert all(one.group is not None for one in made)

    for one in made[:1]:
        another.remove(one)
        del mine.subscriptions[one.topic.text]
    assert isinstance(subscribe(another, asking("new"), on=mine), Subscription)
    assert subscribe(another, asking("newer"), on=mine) == "asking_filters"


def test_a_connection_has_a_number_of_characters_of_filters() -> None:
    """Compiling takes time that others wait for; the same text is compiled once."""
    there, mine = matcher(), connection()
    texts = [f"title={n}||title='{'x' * 1000}'" for n in range(40)]
    heard = [isinstance(subscribe(there, filtered(text), on=mine), Subscription) for text in texts]
    known = filtered(texts[3]) + "&again"

    assert heard == [len("".join(texts[: n + 1])) <= 32 * 1024 for n in range(40)]
    assert subscribe(there, filtered(texts[-1]), on=mine) == "filter_characters"
    assert isinstance(subscribe(there, "posts/*", on=mine), Subscription)
    assert isinstance(subscribe(there, known, on=mine), Subscription)


def test_a_connection_has_a_number_of_ways_to_see_records() -> None:
    """Each is made for it at every event; the same ones for many records are one."""
    there, mine = matcher(), connection()

    def made(topic: str, on: Connection, **query: str) -> Subscription | str:
        return subscribe(there, f"{topic}?options={json.dumps({'query': query})}", on=on)

    for n in range(VIEWS // 2):
        for more in ({"fields": f"id,title:excerpt({n})"}, {"fields": "id", "expand": f"e{n}"}):
            assert isinstance(made("posts/*", mine, **more), Subscription)
    assert made("posts/*", mine, fields="more") == "views"
    assert isinstance(made("posts/r", mine, fields="id,title:excerpt(7)"), Subscription)
    assert isinstance(made("posts/r", mine, filter="title='a'"), Subscription)
    assert isinstance(made("posts/*", connection(), fields="more"), Subscription)


@pytest.mark.parametrize("name", ["nothing/*", "", "posts/*\n"])
def test_a_topic_of_no_collection_hears_nothing(name: str) -> None:
    there = matcher()
    made = put(there, name)

    assert made.group is None
    there.remove(made)


@pytest.mark.parametrize("more", [{}, {"heading": "b"}], ids=["toast", "renamed"])
def test_a_row_that_lacks_a_column_is_denied_to_rules_that_read_it(more: Row) -> None:
    """An unchanged TOASTed value isn't NULL: nobody knows what it is."""
    there = matcher("title != 'secret'")
    put(there, "posts/*")
    row = {"id": "a", **more}
    event = Event(COLLECTIONS["posts"], "update", "a", row, Cursor(LSN(8), 1), Xid(3))
    evaluation = evaluate_in_process(there, [event], NOW)

    assert not evaluation.hits(0)


@pytest.mark.parametrize("collection", ["posts/*", "posts/a"])
def test_events_don_t_find_filters_of_isolated_connections(collection: str) -> None:
    """Their questions aren't put for everybody; who asks the same and isn't isolated is found."""
    there, mine, other = with_relations(), connection(), connection()
    topic = asking("x").replace("posts/*", collection)
    made = subscribe(there, topic, on=mine)
    assert isinstance(made, Subscription)
    assert isinstance(subscribe(there, asking("y").replace("posts/*", collection)), Subscription)

    def asked() -> int:
        row: Row = dict.fromkeys((c.name for c in RELATED["posts"].table.columns), "1")
        event = Event(RELATED["posts"], "update", "a", row, Cursor(LSN(8), 1), Xid(3))
        evaluation = evaluate_in_process(there, [event], NOW, has_remote_filter=True)
        alone = evaluate_in_process(
            there, [event], NOW, [made.group] if made.group else [], has_remote_filter=True
        )
        assert len(alone.questions()) == 1
        return sum(len(i.pairs) for i in evaluation.questions() if isinstance(i, PairQuestion))

    assert asked() == 2
    there.set_isolated(mine, is_isolated=True)
    assert asked() == 1
    same = subscribe(there, topic, on=other)
    assert isinstance(same, Subscription)
    assert same.group is made.group
    assert asked() == 2
    there.remove(same)
    assert asked() == 1
    new = subscribe(there, asking("z").replace("posts/*", collection), on=mine)
    assert isinstance(new, Subscription)
    assert asked() == 1
    there.set_isolated(mine, is_isolated=False)
    assert asked() == 3


def test_who_goes_while_isolated_leaves_nothing_behind() -> None:
    there, mine = with_relations(), connection()
    there.set_isolated(mine, is_isolated=True)
    made = [subscribe(there, asking(text), on=mine) for text in "xy"]
    for one in made:
        assert isinstance(one, Subscription)
        there.remove(one)

    assert (there._tables, there._remote_filter_tables) == ({}, {})
    assert not there._unindexed_filters


def test_many_who_share_a_slow_filter_are_isolated_in_time_by_their_number() -> None:
    """All at once, and everybody waits for it."""

    def seconds(count: int) -> float:
        there = matcher()
        clients = [put(there, filtered("title ~ 'x'")).connection for _ in range(count)]
        began = time.process_time()
        for one in clients:
            there.set_isolated(one, is_isolated=True)
        took = time.process_time() - began
        assert not hearing(there, "a", "x")
        return took

    few = min(seconds(500) for _ in range(3))

    assert seconds(8000) < 48 * few + 0.02
