"""Frames: what arrives in another process is what the reader put out."""

import random

import msgspec
import pytest

from pgrealtime.changelog.memory import Changelog, Entry, Gap, Watermark
from pgrealtime.changes import (
    Change,
    Delete,
    Insert,
    Key,
    OversizedTransaction,
    Row,
    RowShape,
    TableName,
    Transaction,
    Truncate,
    Update,
    WholeRow,
)
from pgrealtime.errors import FrameError
from pgrealtime.feed.frames import AwayFrame, EntriesFrame, EraFrame, FrameIntake
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.wire import FrameDecoder, encode_entries, encode_frame
from pgrealtime.history import Era, SystemIdentity, make_era
from pgrealtime.lsn import LSN, Xid
from tests.feed_follower import Follower

TABLES = [TableName("public", "posts"), TableName('odd "schema"', "tâble")]
SHAPES = tuple(
    RowShape(table, leaf, (("id", 23), ("títle", 25)), count)
    for table in TABLES
    for leaf, count in ((None, 0), (TABLES[0], -1))
)
HERE = SystemIdentity(system_id="7301", timeline=3, database_name="app")


def random_row(rng: random.Random) -> Row:
    """Return a row that lacks columns, has NULLs, and texts of any kind and length."""
    texts = [None, "", "1", "é🙂\n\0"[: rng.randrange(5)], "x" * rng.choice([1, 300, 70_000])]
    names = rng.sample(["id", "títle", "a b", "owner"], rng.randrange(5))
    return {name: rng.choice(texts) for name in names}


def random_change(rng: random.Random) -> Change:
    table, row = rng.choice(TABLES), random_row(rng)
    old = Key(row) if rng.random() < 0.5 else WholeRow(row)
    changes: list[Change] = [
        Insert(table, row),
        Update(table, random_row(rng), old),
        Delete(table, old),
        Truncate(table),
    ]
    return rng.choice(changes)


def random_entries(rng: random.Random) -> list[Entry]:
    entries: list[Entry] = []
    lsn = rng.randrange(1 << 63)
    for _ in range(rng.randrange(20)):
        lsn += rng.randrange(1, 1000)
        end_lsn, xid, tables = LSN(lsn), Xid(rng.randrange(1 << 32)), frozenset(TABLES)
        changes = tuple(random_change(rng) for _ in range(rng.randrange(5)))
        shapes = tuple(rng.sample(SHAPES, rng.randrange(3)))
        made: list[Entry] = [
            Transaction(xid, end_lsn, rng.randrange(1 << 50), changes, 99, shapes),
            OversizedTransaction(xid, end_lsn, 5, tables),
            Gap(end_lsn, "schema", rng.choice([None, tables])),
            Watermark(end_lsn),
        ]
        entries.append(rng.choice(made))
    return entries


@pytest.mark.parametrize("seed", range(200))
def test_entries_arrive_as_they_were(seed: int) -> None:
    entries = random_entries(random.Random(seed))
    assert FrameDecoder().decode(encode_entries(entries)) == EntriesFrame(tuple(entries))


@pytest.mark.parametrize(
    "frame",
    [
        EraFrame(make_era(HERE, TABLES, restore_count=2, plugin="pgoutput"), LSN(1 << 63)),
        EraFrame(make_era(HERE, []), LSN(0), is_restart=True),
        EraFrame(make_era(HERE, TABLES), LSN(9), is_continuation=True),
        AwayFrame(),
    ],
)
def test_eras_and_losses_arrive_as_they_were(frame: EraFrame | AwayFrame) -> None:
    assert FrameDecoder().decode(encode_frame(frame)) == frame


def test_rows_and_shapes_share_what_they_have_in_common() -> None:
    """A window of many rows needs no memory for column names; row shapes are compared often."""
    decoder = FrameDecoder()
    entries = [
        Transaction(Xid(1), LSN(n), 0, (Insert(TABLES[0], {"id": str(n)}),), 9, SHAPES[:1])
        for n in (1, 2, 3)
    ]
    read = [decoder.decode(encode_entries([entry])) for entry in entries[:2]]
    described: list[RowShape] = []
    rows: list[Insert] = []
    for frame in read:
        assert isinstance(frame, EntriesFrame)
        (entry,) = frame.entries
        assert isinstance(entry, Transaction)
        (change,) = entry.changes
        assert isinstance(change, Insert)
        described += entry.row_shapes
        rows.append(change)
    assert described[0] is described[1]
    assert rows[0].table is rows[1].table
    assert next(iter(rows[0].new)) is next(iter(rows[1].new))


@pytest.mark.parametrize("seed", range(50))
def test_bytes_that_are_no_frame_are_an_error(seed: int) -> None:
    """Cut off, or changed at one place, they are a frame or a ``FrameError``, never another one."""
    rng = random.Random(seed)
    data = bytearray(encode_entries(random_entries(rng)))
    outcomes = set()
    for _ in range(200):
        broken = data[: rng.randrange(len(data))]
        if rng.random() < 0.5:
            broken = data[:]
            broken[rng.randrange(min(len(broken), 500))] = rng.randrange(256)
        try:
            FrameDecoder().decode(bytes(broken))
        except FrameError as error:
            outcomes.add(error.error_code)
    assert outcomes == {"frame_undecodable"}


@pytest.mark.parametrize("value", [[], [9], 5, "text", [1], [2, [], [], [[7]]], [2, [], [], [[]]]])
def test_other_messages_are_an_error(value: object) -> None:
    with pytest.raises(FrameError):
        FrameDecoder().decode(msgspec.msgpack.encode(value))


# Applying frames


def era(*, tables: int = 2, restore_count: int = 0) -> Era:
    return make_era(HERE, TABLES[:tables], restore_count=restore_count)


async def test_frames_do_to_a_changelog_what_the_reader_does() -> None:
    changelog = Changelog(LSN(0), max_bytes=1 << 20, max_age_seconds=1e9)
    follower = Follower(changelog, 10.0)
    frames = FrameIntake(Intake(changelog, follower, max_size=1 << 20))

    def lsns() -> list[int]:
        read = changelog.read(changelog.floor, changelog.end_cursor, 1 << 20)
        return [entry.end_lsn for entry in read]

    # The first era begins the changelog where it says, whatever it was to those before.
    await frames.apply(EraFrame(era(tables=1), LSN(100), is_continuation=True))
    assert changelog.floor.lsn == 100
    await frames.apply(EntriesFrame((Watermark(LSN(110)), Gap(LSN(120), "schema"))))
    # Another stream continues it; what is sent once more is skipped.
    await frames.apply(EraFrame(era(), LSN(120), is_continuation=True))
    await frames.apply(EntriesFrame((Gap(LSN(120), "schema"), Watermark(LSN(130)))))
    assert lsns() == [110, 120, 130]
    # A break, the same history again: nothing is removed.
    await frames.apply(AwayFrame())
    await frames.apply(EraFrame(era(), LSN(130)))
    assert lsns() == [110, 120, 130]
    # Another history may have lower positions.
    await frames.apply(EraFrame(era(restore_count=1), LSN(50), is_restart=True))
    await frames.apply(EntriesFrame((Watermark(LSN(60)),)))
    assert lsns() == [60]
    assert changelog.era == era(restore_count=1)
    epochs = [era(tables=1).epoch, era().epoch, era().epoch, era(restore_count=1).epoch]
    words = ["started", "continued", "lost", "started", "started"]
    heard = [f"{word} {epochs.pop(0)}" if word != "lost" else word for word in words]
    assert follower.said == heard
