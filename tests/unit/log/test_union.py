"""The owner streams what any replica wanted lately."""

from pgrealtime.changes import TableName
from pgrealtime.log.union import KEEP_SECONDS, WantedUnion

POSTS, USERS = TableName("public", "posts"), TableName("public", "users")


def test_a_table_is_kept_for_a_while_after_the_last_replica_that_wanted_it() -> None:
    union = WantedUnion()
    union.add([POSTS, USERS], 0.0)
    union.add([POSTS], 200.0)
    assert union.tables(KEEP_SECONDS - 1) == {POSTS, USERS}
    assert union.tables(KEEP_SECONDS) == {POSTS}


def test_the_columns_that_name_a_record_come_with_their_table() -> None:
    union = WantedUnion()
    union.add([POSTS, USERS], 0.0, [(POSTS, ("id",))])
    assert union.record_keys([POSTS, USERS]) == {POSTS: ("id",)}
