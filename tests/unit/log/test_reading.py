"""Two owners, lost acknowledgements, streams wiped and set back: every reader reads the same."""

from collections.abc import Sequence

import pytest

from pgrealtime.log.message import HEAD_BYTES, WIRE_VERSION, Chain, Kind
from pgrealtime.log.reading import LogReading, Verdict
from tests.unit.log.log_model import run

_SEEDS = 150


def chain(term: int, sequence: int, *, salt: int = 7, payload: int = 1000) -> Chain:
    return Chain(term, sequence, salt=salt, max_payload=payload)


def message(of: Chain, kind: Kind, body: bytes = b"") -> bytes:
    ((_, payload),) = of.messages(kind, body)
    return payload


def read_all(messages: Sequence[bytes], *, first: int = 1) -> list[tuple[Verdict, bytes | None]]:
    reading = LogReading(max_bytes=1000)
    reading.skip_to(first)
    taken = [reading.take(first + n, payload) for n, payload in enumerate(messages)]
    return [(one.verdict, one.body) for one in taken]


@pytest.mark.parametrize("faults", [False, True], ids=["two owners", "streams lost too"])
def test_every_reader_has_every_entry_once_and_in_order(*, faults: bool) -> None:
    """Whatever is under way when another owner begins, and whatever tail the server loses."""
    for seed in range(_SEEDS):
        readers = run(seed, faults=faults)
        assert [reader.missed for reader in readers if reader.missed] == [], seed
        assert {reader.head for reader in readers} == {readers[0].head}, seed


def test_without_the_rule_entries_are_missed() -> None:
    """The model can fail: the expected sequence alone loses entries in most runs."""
    runs = [run(seed, obeys=False, faults=False) for seed in range(50)]
    assert sum(any(reader.missed for reader in readers) for readers in runs) > 10


def test_what_an_old_owner_had_under_way_is_void() -> None:
    old, new = chain(1, 0), chain(2, 1)
    fence, _refused, stored = (message(old, Kind.FENCE), *_entries(old, b"a", b"b"))
    assert read_all([fence, message(new, Kind.FENCE), stored, *_entries(new, b"a")]) == [
        (Verdict.COUNTS, b""),
        (Verdict.COUNTS, b""),
        (Verdict.VOID, None),
        (Verdict.COUNTS, b"a"),
    ]


def test_what_follows_a_hole_is_void_until_the_next_fence() -> None:
    """The owner was refused there, too: it begins another term with what the hole lacks."""
    broken, next_term = chain(1, 0), chain(2, 3)
    fence, _refused, b, c = (message(broken, Kind.FENCE), *_entries(broken, b"a", b"b", b"c"))
    taken = read_all([fence, b, c, message(next_term, Kind.FENCE), *_entries(next_term, b"a")])
    assert [verdict for verdict, _ in taken] == [
        *(Verdict.COUNTS, Verdict.VOID, Verdict.VOID, Verdict.COUNTS, Verdict.COUNTS)
    ]


def test_a_term_begun_twice_is_two_terms() -> None:
    """The server lost the first fence; what that owner had under way is still not the other's."""
    lost, begun_again = chain(2, 0, salt=1), chain(2, 0, salt=2)
    message(lost, Kind.FENCE)
    taken = read_all([message(begun_again, Kind.FENCE), message(lost, Kind.ENTRIES, b"a")])
    assert [verdict for verdict, _ in taken] == [Verdict.COUNTS, Verdict.VOID]


def test_holes_are_passed_when_the_server_lost_messages_for_good() -> None:
    owner = chain(1, 0)
    fence, _lost, b = (message(owner, Kind.FENCE), *_entries(owner, b"a", b"b"))
    reading = LogReading(max_bytes=1000)
    reading.restart(passes_holes=True)
    reading.take(1, fence)
    assert reading.take(2, b)[:1] + reading.take(3, _entries(owner, b"c")[0])[2:3] == (
        *(Verdict.DAMAGED, b"c"),
    )


def test_a_reader_in_the_middle_begins_at_an_era_that_surely_counts() -> None:
    """An old owner's era may lie within four messages behind the fence that is trimmed."""
    old, new = chain(1, 0), chain(2, 5)
    message(new, Kind.FENCE)
    messages = [
        message(old, Kind.ERA, b"void"),
        *_entries(new, b"a", b"b", b"c"),
        *_entries(new, b"d"),
        message(new, Kind.ERA, b"era"),
        *_entries(new, b"e"),
    ]
    assert read_all(messages, first=7) == [
        *[(Verdict.EARLY, None)] * 5,
        (Verdict.COUNTS, b"era"),
        (Verdict.COUNTS, b"e"),
    ]


def test_a_body_in_parts_is_joined() -> None:
    owner, body = chain(1, 0, payload=HEAD_BYTES + 4), b"0123456789"
    messages = [message(owner, Kind.FENCE), *(m for _, m in owner.messages(Kind.ENTRIES, body))]
    assert read_all(messages) == [
        (Verdict.COUNTS, b""),
        (Verdict.UNFINISHED, None),
        (Verdict.UNFINISHED, None),
        (Verdict.COUNTS, body),
    ]


def test_parts_are_bounded() -> None:
    owner = chain(1, 0, payload=HEAD_BYTES + 400)
    parts = [payload for _, payload in owner.messages(Kind.ENTRIES, b"x" * 2000)]
    reading = LogReading(max_bytes=1000)
    reading.take(1, message(chain(1, 0), Kind.FENCE))
    # The fence's number is 0, too: as if the entries followed it.
    taken = [reading.take(2 + n, payload) for n, payload in enumerate(parts[1:])]
    assert taken[0].verdict is Verdict.DAMAGED


def test_a_fence_drops_what_was_unfinished() -> None:
    owner, other = chain(1, 0, payload=HEAD_BYTES + 2), chain(2, 2, payload=HEAD_BYTES + 2)
    begun = [message(owner, Kind.FENCE), owner.messages(Kind.ENTRIES, b"abcd")[0][1]]
    taken = read_all([*begun, message(other, Kind.FENCE), *_entries(other, b"xy")])
    assert taken[-1] == (Verdict.COUNTS, b"xy")


def test_a_term_without_fence_is_another_log_once() -> None:
    """The stream was replaced under the reader; if it says so again, the fence is lost."""
    one, two = chain(1, 0), chain(2, 0)
    message(two, Kind.FENCE)
    stray = message(two, Kind.ERA)
    reading = LogReading(max_bytes=1000)
    verdicts = []
    for _ in range(2):
        reading.restart()
        for sequence, payload in enumerate([message(chain(1, 0), Kind.FENCE), stray], start=1):
            verdicts.append(reading.take(sequence, payload).verdict)
    assert verdicts == [Verdict.COUNTS, Verdict.OTHER_LOG, Verdict.COUNTS, Verdict.VOID]
    assert one.term < two.term


def test_each_term_without_fence_is_another_log_once() -> None:
    """A stream that was replaced may be shorter; one fence that was lost says nothing of others."""
    reading, verdicts = LogReading(max_bytes=1000), []
    for sequence, salt in ((900, 1), (3, 2), (3, 1), (3, 2)):
        reading.restart()
        reading.take(1, message(chain(1, 0), Kind.FENCE))
        stray = chain(2, 0, salt=salt)
        message(stray, Kind.FENCE)
        verdicts.append(reading.take(sequence, message(stray, Kind.ERA)).verdict)
    assert verdicts == [*[Verdict.OTHER_LOG] * 2, *[Verdict.VOID] * 2]


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", "log_unreadable"),
        (b"not one of ours", "log_unreadable"),
        (b"\x01\x09" + bytes(14), "log_unreadable"),
        (b"\x01\x02\x00\x05\x00\x05" + bytes(10), "log_unreadable"),
        (b"\x02\x00" + bytes(14), "log_newer"),
    ],
    ids=["empty", "short", "unknown kind", "part beyond parts", "later version"],
)
def test_a_message_that_cannot_be_read_is_void_and_says_why(payload: bytes, code: str) -> None:
    taken = LogReading(max_bytes=1000).take(1, payload)
    assert taken.verdict is Verdict.VOID
    assert taken.error is not None
    assert taken.error.error_code == code


def test_a_message_of_an_earlier_version_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later program reads on where an earlier one has written."""
    fence, entries = message(owner := chain(1, 0), Kind.FENCE), _entries(owner, b"a")
    monkeypatch.setattr("pgrealtime.log.message.WIRE_VERSION", WIRE_VERSION + 1)
    later = message(chain(2, 2), Kind.FENCE)
    assert (fence[0], later[0]) == (WIRE_VERSION, WIRE_VERSION + 1)
    assert read_all([fence, *entries, later]) == [
        *[(Verdict.COUNTS, b""), (Verdict.COUNTS, b"a"), (Verdict.COUNTS, b"")]
    ]


def _entries(of: Chain, *bodies: bytes) -> list[bytes]:
    return [payload for body in bodies for _, payload in of.messages(Kind.ENTRIES, body)]
