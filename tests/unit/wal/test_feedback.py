"""Status updates confirm only what is kept, and have a flush LSN only to advance the slot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.lsn import LSN
from pgrealtime.wal.feedback import CONFIRM_SECONDS, KEEPALIVE_REQUEST_SECONDS, Feedback
from pgrealtime.wal.wire import StandbyStatusUpdate

START = LSN(100)
NOWHERE = LSN(0)


def started_feedback() -> Feedback:
    """Return a Feedback whose first status update was sent."""
    feedback = Feedback(START, interval=20.0, now=0.0)
    assert feedback.due(0.0) == (status(START, asks=True),)
    return feedback


def status(written: LSN, *, asks: bool = False) -> StandbyStatusUpdate:
    """Return a status update without a flush LSN."""
    return StandbyStatusUpdate(written, NOWHERE, reply_requested=asks)


def test_status_is_due_each_interval_and_requests_a_reply() -> None:
    """It requests a reply, so that a dead connection is noticed."""
    feedback = started_feedback()

    assert feedback.due(19.9) == ()
    assert feedback.due(20.0) == (status(START, asks=True),)
    assert feedback.due(39.9) == ()


def test_status_is_due_at_once_when_the_server_asks() -> None:
    """A server that gets no reply within wal_sender_timeout closes the connection."""
    feedback = started_feedback()
    feedback.record_received(LSN(150))
    feedback.record_reply_request()

    assert feedback.due(0.1) == (status(LSN(150)),)
    assert feedback.due(0.2) == ()


def test_slot_moves_by_a_flush_directly_followed_by_none() -> None:
    """A lasting flush LSN would make us a synchronous standby, or delay the server's shutdown."""
    feedback = started_feedback()
    feedback.record_transaction(LSN(200))
    feedback.confirm(LSN(200))

    assert feedback.due(CONFIRM_SECONDS) == (
        StandbyStatusUpdate(LSN(200), LSN(200)),
        status(LSN(200)),
    )
    assert feedback.due(CONFIRM_SECONDS + 0.1) == ()


def test_move_claims_nothing_beyond_itself() -> None:
    """A commit with synchronous_commit = remote_write may wait for what was only received."""
    feedback = started_feedback()
    feedback.record_transaction(LSN(200))
    feedback.confirm(LSN(200))
    feedback.record_received(LSN(300))

    assert feedback.due(CONFIRM_SECONDS) == (
        StandbyStatusUpdate(LSN(200), LSN(200)),
        status(LSN(300)),
    )


def test_slot_moves_no_further_than_its_bound() -> None:
    """``limit_confirmation`` bounds the confirmed flush LSN."""
    feedback = started_feedback()
    feedback.limit_confirmation(LSN(150))
    feedback.record_transaction(LSN(200))
    feedback.confirm(LSN(200))
    assert feedback.confirmable_lsn == LSN(150)

    feedback.limit_confirmation(LSN(500))
    assert feedback.confirmable_lsn == LSN(200)


def test_slot_does_not_move_over_what_is_only_received() -> None:
    """Only confirmed transactions count."""
    feedback = started_feedback()
    feedback.record_transaction(LSN(200))
    feedback.record_transaction(LSN(300))
    feedback.confirm(LSN(200))

    assert feedback.confirmable_lsn == LSN(200)


def test_slot_moves_with_keepalives_while_nothing_is_ours() -> None:
    """Otherwise a quiet table in a busy cluster would retain WAL without bound."""
    feedback = started_feedback()
    feedback.record_quiet(LSN(500))

    assert feedback.confirmable_lsn == LSN(500)


def test_keepalive_counts_once_all_before_it_is_kept() -> None:
    """A keepalive's LSN is confirmed only with every transaction before it."""
    feedback = started_feedback()
    feedback.record_transaction(LSN(200))
    feedback.record_quiet(LSN(500))
    assert feedback.confirmable_lsn == START

    feedback.confirm(LSN(200))
    assert feedback.confirmable_lsn == LSN(500)


def test_later_transaction_does_not_undo_an_earlier_keepalive() -> None:
    """The keepalive's LSN is before the later transaction."""
    feedback = started_feedback()
    feedback.record_transaction(LSN(200))
    feedback.record_quiet(LSN(500))
    feedback.record_transaction(LSN(600))
    feedback.confirm(LSN(200))

    assert feedback.confirmable_lsn == LSN(500)


def test_moves_are_spaced_out() -> None:
    """The slot advances once in CONFIRM_SECONDS at most."""
    feedback = started_feedback()
    for end in (LSN(200), LSN(300)):
        feedback.record_transaction(end)
        feedback.confirm(end)
        feedback.due(CONFIRM_SECONDS)

    assert feedback.due(CONFIRM_SECONDS * 1.5) == ()
    assert feedback.due(CONFIRM_SECONDS * 2)[0] == StandbyStatusUpdate(LSN(300), LSN(300))


def test_last_word_moves_the_slot_to_what_is_kept() -> None:
    """The last status update of a stream confirms what is kept, once."""
    feedback = started_feedback()
    feedback.record_transaction(LSN(200))
    feedback.confirm(LSN(200))

    assert feedback.final_updates() == (StandbyStatusUpdate(LSN(200), LSN(200)),)
    assert feedback.final_updates() == ()


def test_keeping_what_never_came_is_refused() -> None:
    """The server would remove all WAL up to there without an error."""
    feedback = started_feedback()
    feedback.record_received(LSN(400))

    with pytest.raises(ValueError, match="nothing was received beyond"):
        feedback.confirm(LSN(300))


@given(
    st.lists(
        st.tuples(st.sampled_from(["handed", "quiet", "kept", "reply", "wait"]), st.integers(1, 50))
    )
)
def test_no_order_of_events_moves_the_slot_over_something_unkept(
    events: list[tuple[str, int]],
) -> None:
    """Any sequence of received transactions, keepalives, confirmations and pauses."""
    feedback = Feedback(START, interval=20.0, now=0.0)
    now, position, unkept = 0.0, int(START), [int(START)]
    flushed_lsns: list[int] = []
    for event, step in events:
        match event:
            case "handed":
                position += step
                unkept.append(position)
                feedback.record_transaction(LSN(position))
            case "quiet":
                position += step
                feedback.record_quiet(LSN(position))
            case "kept":
                kept = unkept[: step % len(unkept) + 1][-1]
                unkept = [end for end in unkept if end >= kept]
                feedback.confirm(LSN(kept))
            case "reply":
                feedback.record_reply_request()
            case _:
                now += step / 10
        updates = feedback.due(now)
        flushes = [int(update.flushed) for update in updates if update.flushed]
        flushed_lsns += flushes
        assert len(flushes) <= 1
        assert not updates or updates[-1].flushed == NOWHERE
        assert all(update.written <= position for update in updates)
        # unkept[0] is kept; the rest isn't.
        assert all(flushed < unkept[1] for flushed in flushes if len(unkept) > 1)
    assert flushed_lsns == sorted(flushed_lsns)


def test_a_reply_is_requested_at_once_when_a_keepalive_is_needed() -> None:
    """Frequent requests are joined, and the interval counts from the last one."""
    feedback = started_feedback()
    feedback.request_keepalive(5.0)
    assert feedback.due(5.0) == (status(START, asks=True),)
    feedback.request_keepalive(5.0 + KEEPALIVE_REQUEST_SECONDS / 2)
    assert feedback.due(5.0 + KEEPALIVE_REQUEST_SECONDS / 2) == ()
    feedback.request_keepalive(5.0 + KEEPALIVE_REQUEST_SECONDS)
    assert feedback.due(5.0 + KEEPALIVE_REQUEST_SECONDS) == (status(START, asks=True),)
    assert feedback.due(24.9) == ()
    assert feedback.due(25.1) == (status(START, asks=True),)
