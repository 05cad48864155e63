"""A follower applies what the log says once, whatever becomes of the stream meanwhile."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

from pgrealtime.changelog.memory import Changelog, Entry, Gap
from pgrealtime.changes import Insert, TableName, Transaction
from pgrealtime.feed.frames import EntriesFrame, EraFrame, Frame
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.wire import encode_frame
from pgrealtime.history import Era, SystemIdentity, make_era
from pgrealtime.log.beat import Beat
from pgrealtime.log.follower import LogFollower
from pgrealtime.log.jetstream import LogStream, StoredMessage, StreamState
from pgrealtime.log.message import Chain, Kind
from pgrealtime.log.tasks import end_tasks
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, Xid
from tests.feed_follower import Follower

POSTS = TableName("public", "posts")
USERS = TableName("public", "users")


def era(*tables: TableName, system_id: str = "1", timeline: int = 1, restores: int = 0) -> Era:
    system = SystemIdentity(system_id=system_id, timeline=timeline, database_name="app")
    return make_era(system, tables or (POSTS,), restore_count=restores)


def rows(*ends: int) -> EntriesFrame:
    return EntriesFrame(
        tuple(
            Transaction(Xid(end), LSN(end), 0, (Insert(POSTS, {"id": str(end)}),), 100)
            for end in ends
        )
    )


@dataclass
class Log:
    """A stream in memory."""

    messages: list[StoredMessage] = field(default_factory=list)
    first: int = 1
    is_connected: bool = True
    on_message: Callable[[StoredMessage], Awaitable[None]] | None = None
    _clock: int = 0

    @property
    def last(self) -> int:
        return self.first + len(self.messages) - 1

    def store(self, payload: bytes) -> StoredMessage:
        self._clock += 1
        message = StoredMessage(self.last + 1, self.last, f"{self._clock:06}", payload)
        self.messages.append(message)
        return message

    def say(self, chain: Chain, *said: Frame | None) -> list[StoredMessage]:
        """Store frames; None is a fence."""
        stored = []
        for frame in said:
            kind = Kind.ERA if isinstance(frame, EraFrame) else Kind.ENTRIES
            body = b"" if frame is None else encode_frame(frame)
            for _, payload in chain.messages(Kind.FENCE if frame is None else kind, body):
                stored.append(self.store(payload))
        return stored

    def cut(self, count: int) -> None:
        del self.messages[-count:]

    def trim(self, count: int) -> None:
        del self.messages[:count]
        self.first += count

    async def ensure(self) -> StreamState:
        return StreamState(self.first, self.last)

    state = ensure

    async def get(self, sequence: int) -> StoredMessage | None:
        is_there = self.first <= sequence <= self.last
        return self.messages[sequence - self.first] if is_there else None

    async def get_all(self, sequences: Iterable[int]) -> list[StoredMessage | None]:
        return [await self.get(sequence) for sequence in sequences]


class Replica:
    """A follower with a changelog of its own."""

    def __init__(self, log: Log, *wanted: TableName) -> None:
        self.changelog = Changelog(LSN(0), max_bytes=1 << 20, max_age_seconds=300.0)
        self.hub = Follower(self.changelog, 5.0)
        intake = Intake(self.changelog, self.hub, max_size=1 << 20)
        self.follower = LogFollower(
            cast(LogStream, log),
            intake,
            max_bytes=1 << 20,
            own_database=("1", "app"),
            wanted_tables=lambda: set(wanted),
        )

    def entries(self) -> Sequence[Entry]:
        upto = Cursor(LSN(1 << 60), END_ORDINAL)
        return self.changelog.read(self.changelog.floor, upto, limit=1000)

    def ends(self) -> list[int | str]:
        """Return where entries end; a gap as its reason."""
        return [each.reason if isinstance(each, Gap) else each.end_lsn for each in self.entries()]


def owner(term: int = 1, *, salt: int = 1) -> Chain:
    return Chain(term, 0, salt=salt, max_payload=100_000)


async def test_what_is_missing_live_is_fetched() -> None:
    log, chain = Log(), owner()
    log.say(chain, None, EraFrame(era(), LSN(10)), rows(20))
    replica = Replica(log)
    await replica.follower.catch_up()
    *_, last = log.say(chain, rows(30), rows(40, 50), rows(60))
    await replica.follower._on_live(last)
    await replica.follower._on_live(last)
    assert replica.ends() == [20, 30, 40, 50, 60]
    assert replica.changelog.floor.lsn == 10
    assert replica.hub.said == [f"started {era().epoch}"]


async def test_a_stream_that_lost_its_end_is_read_anew_and_nothing_repeated() -> None:
    log, old = Log(), owner()
    log.say(old, None, EraFrame(era(), LSN(10)), rows(20), rows(30), rows(40))
    replica = Replica(log)
    await replica.follower.catch_up()
    log.cut(2)
    log.say(owner(2), None, EraFrame(era(), LSN(20)), rows(30), rows(40), rows(50))
    await replica.follower.catch_up()
    assert replica.ends() == [20, 30, 40, 50]
    assert replica.follower.log_head == 50


async def test_what_this_log_has_is_known_apart_from_what_the_replica_has() -> None:
    """A new owner goes on there; else what the log lost would never be appended again."""
    log, old = Log(), owner()
    log.say(old, None, EraFrame(era(), LSN(10)), rows(20), rows(30))
    replica = Replica(log)
    await replica.follower.catch_up()
    log.cut(1)
    await replica.follower.catch_up()
    assert (replica.follower.log_head, replica.changelog.end_cursor.lsn) == (20, 30)
    log.cut(3)
    await replica.follower.catch_up()
    assert (replica.follower.log_head, replica.changelog.end_cursor.lsn) == (None, 30)


async def test_an_earlier_history_in_a_log_that_is_read_anew_is_not_applied_again() -> None:
    """Its LSNs may be higher than those of the history in force."""
    log, chain = Log(), owner()
    restored = era(restores=1)
    log.say(chain, None, EraFrame(era(), LSN(10)), rows(20, 90))
    log.say(chain, EraFrame(restored, LSN(50), is_restart=True), rows(60))
    log.say(chain, rows(70))
    replica = Replica(log)
    await replica.follower.catch_up()
    log.cut(1)
    log.say(owner(2), None, EraFrame(restored, LSN(60)), rows(70), rows(80))
    await replica.follower.catch_up()
    assert replica.ends() == [60, 70, 80]
    assert replica.hub.said == [f"started {era().epoch}", f"started {restored.epoch}"]


async def test_an_era_of_other_tables_goes_on_and_an_old_one_does_not_come_back() -> None:
    log, chain = Log(), owner()
    wider = era(POSTS, USERS)
    log.say(chain, None, EraFrame(era(), LSN(10)), rows(20))
    log.say(chain, EraFrame(wider, LSN(20), is_continuation=True), rows(30), rows(40))
    replica = Replica(log)
    await replica.follower.catch_up()
    log.cut(1)
    log.say(owner(2), None, EraFrame(wider, LSN(30)), rows(40), rows(50))
    await replica.follower.catch_up()
    assert replica.ends() == [20, 30, 40, 50]
    assert replica.hub.said == [f"started {era().epoch}", f"continued {wider.epoch}"]


async def test_what_the_log_dropped_before_it_was_read_is_an_expired_gap() -> None:
    log, chain = Log(), owner()
    log.say(chain, None, EraFrame(era(), LSN(10)), rows(20))
    replica = Replica(log)
    await replica.follower.catch_up()
    log.say(chain, rows(30), rows(40), *[rows(n) for n in (50, 60, 70, 80)])
    log.say(chain, EraFrame(era(), LSN(80)), rows(90))
    log.trim(4)
    await replica.follower.catch_up()
    assert replica.ends() == [20, "expired", 90]


async def test_an_era_that_begins_beyond_the_head_is_a_gap() -> None:
    """The log ended before the slot's position: more was lost than the slot stays behind."""
    log = Log()
    log.say(owner(), None, EraFrame(era(), LSN(10)), rows(20))
    replica = Replica(log)
    await replica.follower.catch_up()
    log.say(owner(2), None, EraFrame(era(), LSN(60)), rows(70))
    await replica.follower.catch_up()
    assert replica.ends() == [20, "slot_lost", 70]


async def test_the_log_of_another_database_is_not_applied() -> None:
    log = Log()
    log.say(owner(), None, EraFrame(era(system_id="2"), LSN(10)), rows(20))
    replica = Replica(log)
    await replica.follower.catch_up()
    assert (replica.ends(), replica.follower.error_code) == ([], "log_foreign")
    log.say(owner(2), None, EraFrame(era(), LSN(10)), rows(20))
    await replica.follower.catch_up()
    assert (replica.ends(), replica.follower.error_code) == ([20], "")


def beat(chain: Chain, sequence: int, head: int) -> Beat:
    return Beat(
        term=chain.term,
        salt=chain.salt,
        tag="owner",
        sequence=sequence,
        head_lsn=LSN(head),
        wal_end=LSN(head),
        deaf_seconds=0.0,
        is_streaming=True,
    )


async def test_messages_that_the_server_lost_in_the_middle_are_a_gap() -> None:
    """Read anew once, in case it was another stream; then what follows the hole counts."""
    log, chain = Log(), owner()
    log.say(chain, None, EraFrame(era(), LSN(10)), rows(20), rows(30), rows(40))
    lost = log.messages.pop(3)
    log.messages[3:] = [
        StoredMessage(lost.sequence, lost.before, m.stored_at, m.payload) for m in log.messages[3:]
    ]
    replica = Replica(log)
    await replica.follower.catch_up()
    assert replica.ends() == [20]
    for _ in range(2):
        replica.follower._compare(beat(chain, log.last, 40))
        await replica.follower.catch_up()
    assert replica.ends() == [20, "slot_lost", 40]
    replica.follower._compare(beat(chain, log.last, 40))
    assert "catching_up" not in replica.follower.not_ready_reasons


async def test_a_replica_is_ready_once_it_has_what_a_beat_says() -> None:
    log, chain = Log(), owner()
    log.say(chain, None, EraFrame(era(), LSN(10)), rows(20))
    replica = Replica(log)
    reasons = [replica.follower.not_ready_reasons]
    replica.follower.hear(beat(chain, 3, 20))
    reasons.append(replica.follower.not_ready_reasons)
    assert replica.follower.lag_messages == 3
    await replica.follower.catch_up()
    replica.follower._compare(beat(chain, 3, 20))
    reasons.append(replica.follower.not_ready_reasons)
    log.is_connected = False
    reasons.append(replica.follower.not_ready_reasons)
    assert reasons == [("owner_away",), ("catching_up",), (), ("log_away",)]


async def test_somebody_who_waits_for_a_message_goes_on_once_it_was_read() -> None:
    log, chain = Log(), owner()
    log.say(chain, None, EraFrame(era(), LSN(10)), rows(20))
    replica = Replica(log)
    waiting = [asyncio.create_task(replica.follower.wait_for(3, 5.0)) for _ in range(2)]
    assert not await replica.follower.wait_for(3, 0.01)
    await replica.follower.catch_up()
    assert await asyncio.gather(*waiting) == [True, True]


async def test_nobody_is_served_before_the_log_has_the_tables() -> None:
    """Else changes of a table that no other replica has would be missed after a 204."""
    log, chain = Log(), owner()
    log.say(chain, None, EraFrame(era(POSTS), LSN(10)), rows(20))
    replica = Replica(log, POSTS, USERS)
    follower, said = replica.follower, replica.hub.said
    await follower.catch_up()
    assert said == [f"started {era(POSTS).epoch}", "lost"]
    assert (follower.is_up, follower.awaits_tables) == (False, True)

    (last,) = log.say(chain, EraFrame(era(POSTS, USERS), LSN(20)))
    await follower.catch_up()
    follower.hear(beat(chain, last.sequence, 20))
    watching = asyncio.create_task(follower._watch())
    both = era(POSTS, USERS).epoch
    await replica.hub.until(lambda: said[2:] == [f"continued {both}", f"started {both}"])
    assert (follower.is_up, follower.awaits_tables) == (True, False)

    log.say(chain, EraFrame(era(POSTS), LSN(20)))
    await follower.catch_up()
    assert not follower.awaits_tables
    await end_tasks([watching])
