"""What mirrors cost beside plain topics: updates by the rule ``owner = @request.auth.id``.

    python -m tests.bench.mirrors

In one process without a server: the same updates are evaluated for a thousand and for a hundred
thousand subscriptions, plain ones and mirrors; each change matches one of them.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from time import process_time

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.changelog.memory import Changelog
from pgrealtime.changelog.row_history import RowHistory
from pgrealtime.changes import Transaction, Update, WholeRow
from pgrealtime.collections.model import Collections
from pgrealtime.hub.connections.connection import Connection, MirrorState, Subscription
from pgrealtime.hub.evaluation.evaluator import SliceEvaluator
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.evaluation.toast import RowCompleter
from pgrealtime.hub.events.event import Event, transaction_events
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.protocol.topic import parse_topic
from pgrealtime.records.encode import View
from tests.unit.hub.harness import COLLECTIONS, POSTS, FakeDatabase, MemorySink

_CHANGES_IN_A_SLICE = 250
_START = Cursor(LSN(0), 0)


def main() -> None:
    """Print microseconds of processor a change, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subscriptions", type=int, nargs="*", default=[1_000, 100_000])
    parser.add_argument("--slices", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    micros: dict[tuple[int, str], float] = {}
    for count in arguments.subscriptions:
        kinds = {
            kind: _evaluator(count, is_mirror=kind == "mirrors") for kind in ("plain", "mirrors")
        }
        measured: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(arguments.rounds):  # by turns: the machine has other work too
            for kind, evaluator in kinds.items():
                measured[kind].append(_measure(evaluator, count, arguments.slices))
        for kind, rounds in measured.items():
            micros[count, kind] = statistics.median(rounds)
            print(f"{count:7} {kind:8}: {micros[count, kind]:6.1f} us a change")
        print(f"{count:7} mirrors / plain: {micros[count, 'mirrors'] / micros[count, 'plain']:.2f}")
    first, *_, last = arguments.subscriptions
    for kind in ("plain", "mirrors"):
        print(f"{kind}, {last} / {first}: {micros[last, kind] / micros[first, kind]:.2f}")


def _evaluator(count: int, *, is_mirror: bool) -> SliceEvaluator:
    posts = replace(COLLECTIONS["posts"], list_rule="title = @request.auth.id")
    others = (one for one in COLLECTIONS.values() if one.name != "posts")
    collections = Collections((posts, *others))
    matcher = Matcher(collections)
    topic = parse_topic("posts/*")
    for number in range(count):
        client = Connection("c", MemorySink(), address="", epoch="", cursor=_START, now=0.0)
        own = Subscription(client, topic, View(), "")
        own.set_mirror(MirrorState(is_told=True) if is_mirror else None)
        user = AuthRecord(collection_id="pbc_people", collection_name="people", id=f"u{number}")
        matcher.add(own, user)
    database = FakeDatabase()
    history = RowHistory(Changelog(LSN(0), max_bytes=1 << 30, max_age_seconds=1e9), None)
    return SliceEvaluator(database, matcher, RowCompleter(database.fetch_live_rows, history))


def _measure(evaluator: SliceEvaluator, count: int, slices: int) -> float:
    collections = COLLECTIONS
    batches = [list(_events(number, count, collections)) for number in range(slices)]

    async def evaluate() -> Counter[str]:
        seen: Counter[str] = Counter()
        for batch in batches:
            result = await evaluator.evaluate_in_chunks(batch)
            seen.update(event.action for event, hit in zip(batch, result.hits, strict=True) if hit)
        return seen

    began = process_time()
    seen = asyncio.run(evaluate())
    seconds = process_time() - began
    assert sum(seen.values()) >= slices * _CHANGES_IN_A_SLICE, seen
    return seconds / slices / _CHANGES_IN_A_SLICE * 1e6


def _events(number: int, count: int, collections: Collections) -> Iterator[Event]:
    """Yield updates that leave the owner alone, but one in ten, which gives the row to another."""
    for change in range(_CHANGES_IN_A_SLICE):
        place = (number * _CHANGES_IN_A_SLICE + change) * 7919
        owner = f"u{place % count}"
        other = f"u{(place + 1) % count}" if change % 10 == 0 else owner
        update = Update(
            POSTS,
            {"id": f"p{change}", "title": other},
            WholeRow({"id": f"p{change}", "title": owner}),
        )
        made = Transaction(Xid(1), LSN(8 + place), 0, (update,), 100)
        for event in transaction_events(made, collections):
            assert isinstance(event, Event)
            yield event


if __name__ == "__main__":
    main()
