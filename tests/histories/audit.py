"""Compares what clients were sent with what they may see and are owed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pgrealtime.changelog.base import Entry
from pgrealtime.changes import Change, Delete, Transaction, Truncate
from pgrealtime.lsn import Cursor
from tests.histories.ledger import (
    COLUMNS,
    Condition,
    Ledger,
    Version,
    condition,
    moments,
    outcomes,
)
from tests.histories.reader import Client, Message, Stream, Topic
from tests.histories.scene import DOCS, FILLER, Values, Who, sees_user

_OWN = ("PB_CONNECT", "PB_CURSOR", "PB_RESYNC")
_END_SECONDS = 4.0
"""A connection isn't ended within a second of its first answer, and then at the next tick."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A broken promise."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(slots=True)
class Findings:
    """What an audit found.

    Attributes:
        counts: Of what was owed, heard, left out, told and so on.
    """

    faults: list[Fault] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    stories: list[str] = field(default_factory=list)

    def fault(self, kind: str, *about: object) -> None:
        """Note a broken promise."""
        self.counts[f"FAULT {kind}"] += 1
        self.faults.append(Fault(kind, " | ".join(map(str, about))))


def learn_cursors(ledger: Ledger, entries: Iterable[Entry]) -> None:
    """Take the places of changes in the stream from the changelog, since ids are made of them."""
    commit = 0
    for entry in entries:
        if not isinstance(entry, Transaction):
            continue
        for ordinal, change in enumerate(entry.changes, start=1):
            for version in _versions_of(ledger, change, commit):
                version.cursor = Cursor(entry.end_lsn, ordinal)
                commit = version.commit
    for one, other in pairwise(ledger.log):
        if one.is_rename:
            one.cursor = other.cursor


def _versions_of(ledger: Ledger, change: Change, commit: int) -> list[Version]:
    """Return what a change of the stream is in the books; nothing if it isn't there.

    Args:
        ledger: The books.
        change: Of the stream.
        commit: That of the change before.
    """
    table = change.table.name
    if isinstance(change, Truncate):
        found = [
            one
            for one in ledger.log
            if (one.table, one.action, one.cursor) == (table, "truncate", None)
            and one.commit >= commit
        ]
        return [one for one in found if one.commit == found[0].commit]
    is_delete = isinstance(change, Delete)
    row = change.old.row if isinstance(change, Delete) else change.new
    for one in ledger.rows.get((table, row.get("id") or ""), ()):
        if (one.action == "delete") is is_delete and one.cursor is None and not one.is_rename:
            mark = row.get("mark")
            if mark is None or mark == one.values.get("mark"):
                return [one]
    return []


def version_of(ledger: Ledger, topic: Topic, message: Message) -> Version | None:
    """Return the version that a message tells of."""
    record, action = message.data["record"], message.data["action"]
    mark = record.get("mark")
    for one in reversed(ledger.rows.get((topic.collection, str(record.get("id"))), ())):
        if one.action == action and (mark is None or one.values.get("mark") == mark):
            return one
    return None


@dataclass(slots=True)
class _Heard:
    """A received message of a chain."""

    place: int
    message: Message
    stream: Stream


@dataclass(frozen=True, slots=True)
class _Gap:
    """A PB_RESYNC of a chain.

    Attributes:
        reach: Up to where it speaks; None if it has no id.
    """

    place: int
    message: Message
    reach: Cursor | None

    def claims(self, version: Version) -> bool | None:
        """Whether it speaks of the version; None if nobody knows."""
        names = self.message.data["collections"]
        if names and version.table not in names:
            return False
        if self.reach is None or version.cursor is None:
            return None
        return self.reach >= version.cursor


def _gaps_in(chain: Sequence[_Heard]) -> list[_Gap]:
    """Return the gaps that were told.

    One that is told together with another at the end of the same stretch leaves the id where it
    was, since who breaks off in between has to be told again, and speaks up to that other's.
    """
    found: list[_Gap] = []
    for one, before in zip(reversed(chain), [*reversed(chain[:-1]), None], strict=True):
        message = one.message
        if message.event != "PB_RESYNC":
            continue
        reach = message.position
        is_held = before is not None and before.message.position == reach
        if is_held and message.data["collections"] and found and found[-1].place == one.place + 1:
            reach = found[-1].reach
        found.append(_Gap(one.place, message, reach))
    return found[::-1]


def _untaken(chain: Sequence[_Heard]) -> list[_Heard]:
    """Return what the last connection of a chain was sent when its client had left.

    A gap that follows events of its own stretch is among it, if the client left in between.
    """
    if not chain:
        return []
    stream, place = chain[-1].stream, chain[-1].place + 1
    rest = stream.messages[len(stream.received) :]
    return [_Heard(place + at, message, stream) for at, message in enumerate(rest)]


class Audit:
    """Of one client.

    Args:
        ledger: What was written.
        client: Who heard of it.
        first: The number of the first commit that counts.
        findings: Where faults are noted.
    """

    def __init__(self, ledger: Ledger, client: Client, first: int, findings: Findings) -> None:
        self._ledger, self._client, self._first, self._into = ledger, client, first, findings
        self._conditions: dict[str, Condition] = {
            text: condition(topic.collection, self._rule(topic), topic.filter)
            for text, topic in client.by_text.items()
        }

    def _rule(self, topic: Topic) -> Any:
        if topic.collection not in DOCS:
            return None
        return self._ledger.scene.rule(topic.collection, is_list=not topic.record_id)

    def run(self) -> None:
        """Check everything."""
        before = len(self._into.faults)
        for stream in self._client.streams:
            self._check_stream(stream)
        self._check_chains()
        if len(self._into.faults) > before:
            self._into.stories.append("\n".join(self.story()))

    def _check_chains(self) -> None:
        chains: list[list[Stream]] = []
        for stream in self._client.streams:
            if stream.upto is not None:
                if not chains or not stream.goes_on:
                    chains.append([])
                chains[-1].append(stream)
        for chain in chains:
            self._check_chain(chain, is_whole=chain is chains[-1])

    # --- what was written to it

    def _check_stream(self, stream: Stream) -> None:
        last = (0, -1)
        seen: set[tuple[str, int]] = set()
        for message in stream.messages:
            if message.event in _OWN:
                continue
            topic = self._client.by_text.get(message.event)
            if topic is None:
                self._fault("unknown topic", message)
                continue
            version = version_of(self._ledger, topic, message)
            if version is None:
                self._fault("no such version", message.event, _short(message.data))
                continue
            if version.commit < self._first:
                self._into.counts["of earlier histories"] += 1
                continue
            self._into.counts["messages"] += 1
            place = version.commit, version.order
            if place < last:
                self._fault("disorder", version, message.id)
            last = max(last, place)
            if (message.event, id(version)) in seen:
                self._fault("duplicate", version, message.event)
            seen.add((message.event, id(version)))
            if not stream.goes_on and version.commit <= stream.after:
                self._fault("seen before the call", version, stream.after)
            self._check_message(topic, version, message, stream)

    def _check_message(
        self, topic: Topic, version: Version, message: Message, stream: Stream
    ) -> None:
        holds = self._conditions[message.event]
        found = self._outcomes(holds, version, message.begun)
        if True not in found:
            self._fault("LEAK of an event", version, message.event, f"sent after {message.begun}")
        record = message.data["record"]
        if not isinstance(record, dict):
            self._fault("no record", message.data)
            return
        is_told = self._is_told_after(stream, message, version)
        self._check_values(topic, version, message, record, is_told=is_told)
        if (
            topic.expand
            and version.table in DOCS
            and (not topic.fields or "expand" in topic.fields)
        ):
            self._check_expand(topic, version, message, record.get("expand", {}), is_told=is_told)

    def _outcomes(self, holds: Condition, version: Version, last: int) -> set[bool]:
        return outcomes(self._ledger, holds, version, self._client.person, last)

    def _check_values(
        self,
        topic: Topic,
        version: Version,
        message: Message,
        record: Mapping[str, Any],
        *,
        is_told: bool,
    ) -> None:
        table = version.table
        columns = COLUMNS[table] - {"note"}
        if topic.fields:
            extra = set(record) - set(topic.fields) - {"expand"}
            if extra:
                self._fault("fields that were not asked for", version, extra)
            columns &= set(topic.fields)
        if "note" in record:
            self._check_hidden(version, message)
        for name in sorted(columns):
            if table == "users" and name == "email":
                self._check_email(version, message, record)
            elif name not in record:
                self._note_left_out(version, name, message, is_told=is_told)
            elif record[name] != version.values[name]:
                self._check_other(topic, version, message, name, record[name])
        if table in DOCS and (not topic.fields or "liked_by" in topic.fields):
            self._check_links(topic, version, message, record, is_told=is_told)

    def _check_hidden(self, version: Version, message: Message) -> None:
        if not self._is_superuser():
            self._fault("LEAK of a hidden field", version, message.event)

    def _is_superuser(self) -> bool:
        return self._client.person == "root"

    def _note_left_out(
        self, version: Version, name: str, message: Message, *, is_told: bool
    ) -> None:
        if name in version.in_wal:
            self._fault("withheld", version, name)
        elif version.action != "delete":
            self._into.counts[f"left out: {_how(name)}"] += 1
            if (
                not is_told
                and not self._is_proof_lost(version, message)
                and next(self._later(version, message.begun), None) is None
            ):
                self._fault("left out though nothing is newer", version, name, message.event)

    def _is_proof_lost(self, version: Version, message: Message) -> bool:
        """Whether the stream may not have come in time to what a proof needs.

        Events don't wait for that for long, and what can't be proved is left out: while the stream
        is away, or for a moment after the table was altered; and when a transaction is open, whose
        WAL the server may not flush before the next commit. Which WAL was flushed when nobody else
        knows, nor when the program had the stream back.
        """
        return any(
            one.kind in ("walsender", "decoder")
            or (one.kind, one.table) == ("alter", version.table)
            or (
                one.kind == "open"
                and one.since <= message.begun
                and (one.upto is None or one.upto >= version.commit)
            )
            for one in self._ledger.happenings
        )

    def _is_told_after(self, stream: Stream, message: Message, version: Version) -> bool:
        """Whether the stream says, from that message on, that the collection must be loaded."""
        place = stream.messages.index(message)
        return stream.is_ended or any(
            one.event == "PB_RESYNC"
            and (not one.data["collections"] or version.table in one.data["collections"])
            for one in stream.messages[place:]
        )

    def _check_email(self, version: Version, message: Message, record: Mapping[str, Any]) -> None:
        if "email" not in record:
            if "email" in version.in_wal and version.values["emailVisibility"]:
                self._fault("withheld", version, "email")
            return
        people = self._ledger.people_at(self._client.person, version.commit, message.begun)
        may = version.values["emailVisibility"] or any(
            who.is_superuser or who.role == "admin" or who.id == version.record_id for who in people
        )
        if not may or record["email"] != version.values["email"]:
            self._fault("LEAK of an address", version, message.event)

    def _check_other(
        self, topic: Topic, version: Version, message: Message, name: str, value: object
    ) -> None:
        """A value that isn't the version's must be of a later one that the person may see."""
        if name in version.in_wal:
            self._fault("wrong value", version, name, _short(value), _short(version.values[name]))
            return
        holders = [
            one
            for one in self._later(version, message.begun)
            if one.action != "delete" and one.values.get(name) == value
        ]
        if not holders:
            self._fault("STALE value", version, name, _short(value), _short(version.values[name]))
            return
        holds = condition(topic.collection, self._rule(topic), None)
        if not any(self._may_see(holds, one, message.begun) for one in holders):
            about = version, name, _short(value), f"of {holders[0]}", self._rule_text(topic)
            self._fault("LEAK of a value", *about, f"sent after {message.begun}")
        self._into.counts["later values shown"] += 1

    def _rule_text(self, topic: Topic) -> str:
        rule = self._rule(topic)
        return "" if rule is None else rule.text

    def _later(self, version: Version, last: int) -> Iterator[Version]:
        for one in self._ledger.rows[version.table, version.record_id]:
            place = one.commit, one.order
            if place > (version.commit, version.order) and one.commit <= last:
                yield one

    def _may_see(self, holds: Condition, version: Version, last: int) -> bool:
        return True in self._outcomes(holds, version, last)

    def _check_links(
        self,
        topic: Topic,
        version: Version,
        message: Message,
        record: Mapping[str, Any],
        *,
        is_told: bool,
    ) -> None:
        states = list(moments(self._ledger, version, message.begun))
        if version.is_rename or version.action == "delete":
            states += [self._ledger.at(commit) for commit in self._span(version, message)]
        possible = [at.likes(version.table, version.record_id) for at in states]
        if "liked_by" not in record:
            if (
                self._ledger.is_untouched_since(version, message.begun)
                and not is_told
                and not self._is_proof_lost(version, message)
                and version.action != "delete"
            ):
                self._fault("ids left out", version, message.event)
            self._into.counts["left out: liked_by"] += 1
            return
        shown = frozenset(record["liked_by"])
        if shown in (possible[0], self._ledger.likes_at(version)):
            return
        if shown not in possible:
            self._fault("wrong ids", version, sorted(shown), [sorted(one) for one in possible])
            return
        if version.action == "delete" or self._is_superuser():
            return
        holds = condition(topic.collection, self._rule(topic), None)
        rows = [
            self._ledger.version(version.table, version.record_id, at.commit)
            for at, one in zip(states, possible, strict=True)
            if one == shown
        ]
        people = self._ledger.people_at(self._client.person, version.commit, message.begun)
        is_seen = any(
            row is not None
            and row.action in ("create", "update")
            and any(
                holds(row.table, row.values, who, at)
                for who in people
                for at in states
                if at.commit >= row.commit
            )
            for row in rows
        )
        if not is_seen:
            self._fault("LEAK of ids", version, sorted(shown), f"sent after {message.begun}")
        self._into.counts["later ids shown"] += 1

    def _span(self, version: Version, message: Message) -> range:
        return range(version.commit - 1, message.begun + 1)

    def _check_expand(
        self,
        topic: Topic,
        version: Version,
        message: Message,
        expand: Mapping[str, Any],
        *,
        is_told: bool,
    ) -> None:
        begun = message.begun
        for name, of in (("owner", "users"), ("team", "teams")):
            target = str(version.values[name])
            shown = expand.get(name)
            if shown is None:
                if target and name in version.in_wal and self._is_owed(of, target, version, begun):
                    self._into.counts["left out: expand"] += 1
                    if not is_told:
                        self._fault("expand missing", version, name, target, topic.text)
                continue
            if version.action != "delete" and shown.get("id") != target:
                self._fault("wrong expand", version, name, _short(shown))
            self._check_related(of, version, begun, shown)
        for shown in expand.get("liked_by", ()):
            self._check_related("users", version, begun, shown)

    def _live(self, of: str, target: str, version: Version, last: int) -> list[Version]:
        """Return the versions of a related record that could be read for an event."""
        first = version.commit - (version.action == "delete")
        spans = [self._ledger.version(of, target, at) for at in range(first, last + 1)]
        if version.action == "delete":  # which shows what there was at that very change
            written = self._ledger.rows.get((of, target), ())
            spans += [one for one in written if one.commit == version.commit]
        return list({id(one): one for one in spans if one is not None}.values())

    def _is_owed(self, of: str, target: str, version: Version, last: int) -> bool:
        """Whether the related record was there and to be seen all the time, and the same."""
        live = self._live(of, target, version, last)
        if version.action == "delete" or len(live) != 1 or live[0].action == "delete":
            return False
        people = self._ledger.people_at(self._client.person, version.commit, last)
        return all(_sees(of, live[0].values, who) for who in people)

    def _check_related(
        self, of: str, version: Version, last: int, shown: Mapping[str, Any]
    ) -> None:
        found = self._ledger.by_mark.get(str(shown.get("mark")))
        live = self._live(of, str(shown.get("id")), version, last)
        if found is None or found not in live:
            self._fault("STALE expand", version, _short(shown), [str(one) for one in live])
            return
        people = self._ledger.people_at(self._client.person, version.commit, last)
        if version.action == "delete":
            people |= self._ledger.people_at(self._client.person, version.commit - 1, last)
        if not any(_sees(of, found.values, who) for who in people):
            self._fault("LEAK by expand", version, found, f"sent after {last}")
        for name in COLUMNS[of] & set(shown):
            if shown[name] != found.values[name]:
                self._fault("wrong value in expand", version, name, _short(shown[name]))
        if "email" in shown and not _may_have_address(found, people):
            self._fault("LEAK of an address by expand", version, found)
        if found.commit <= version.commit or version.action == "delete":
            return
        # Written since: it is shown to who has the right to it still.
        later = self._ledger.people_at(self._client.person, found.commit, last)
        if not any(_sees(of, found.values, who) for who in later) or (
            "email" in shown and not _may_have_address(found, later)
        ):
            self._fault("LEAK by expand, of a later version", version, found, f"sent after {last}")

    # --- what was received, and what was owed

    def _check_chain(self, streams: Sequence[Stream], *, is_whole: bool) -> None:
        if not streams or streams[0].upto is None:
            return
        chain = [
            _Heard(place, message, stream)
            for place, (message, stream) in enumerate(
                (message, stream) for stream in streams for message in stream.received
            )
        ]
        heard = self._heard(chain)
        self._check_repeats(chain)
        gaps = _gaps_in([*chain, *_untaken(chain)])
        self._class_gaps(gaps)
        ended = self._ledger.begun
        if not is_whole:
            told = [
                version.commit
                for one in chain
                if (version := self._version(one.message)) is not None
            ]
            ended = max(told, default=0) - 1
        for text, topic in self._client.by_text.items():
            for version in self._ledger.log:
                if version.commit <= streams[0].upto or version.commit > ended:
                    continue
                if version.table == topic.collection and topic.record_id in (
                    "",
                    version.record_id,
                ):
                    self._check_owed(text, version, chain, heard, gaps)

    def _version(self, message: Message) -> Version | None:
        topic = self._client.by_text.get(message.event)
        return None if topic is None else version_of(self._ledger, topic, message)

    def _heard(self, chain: Sequence[_Heard]) -> dict[tuple[str, int], int]:
        found: dict[tuple[str, int], int] = {}
        for one in chain:
            version = self._version(one.message)
            if version is not None:
                found.setdefault((one.message.event, id(version)), one.place)
        return found

    def _check_repeats(self, chain: Sequence[_Heard]) -> None:
        """What lies before the position that a stream goes on from isn't sent again."""
        position, stream, start = None, None, None
        for one in chain:
            if one.stream is not stream:
                stream, start = one.stream, position
            version = self._version(one.message)
            if (
                version is not None
                and version.cursor is not None
                and start is not None
                and version.cursor <= start
            ):
                self._fault("repeated after its id", version, one.message.event)
            position = one.message.position or position

    def _check_owed(
        self,
        text: str,
        version: Version,
        chain: Sequence[_Heard],
        heard: Mapping[tuple[str, int], int],
        gaps: Sequence[_Gap],
    ) -> None:
        counts = self._into.counts
        cursor = version.cursor
        passed = next(
            (
                one
                for one in chain
                if cursor and one.message.position and one.message.position >= cursor
            ),
            None,
        )
        last = self._ledger.begun if passed is None else passed.message.begun
        if version.action == "truncate":
            self._check_told_in_time(version, text, gaps, None)
            if self._covered(version, gaps) is None and self._is_told_of_gaps():
                told = [one.message for one in gaps if one.message.begun >= version.commit]
                self._fault("truncate untold", version, text, told)
            return
        reads = self._reads(text, version)
        if version.action == "delete" and not reads <= version.in_wal:
            return
        if self._outcomes(self._conditions[text], version, last) != {True}:
            return
        counts["owed"] += 1
        place = heard.get((text, id(version)))
        self._check_told_in_time(version, text, gaps, place)
        covered = self._covered(version, gaps)
        if covered is None and self._is_covered_by_end(version, chain):
            covered = len(chain)
        if not reads <= version.in_wal:
            counts["owed unproved"] += 1
            counts["heard unproved"] += place is not None
        known = [one for one in (place, covered) if one is not None]
        is_passed = passed is not None and bool(known) and passed.place < min(known)
        # A gap that is told later speaks of more than what was denied here.
        is_late = (not known or is_passed) and self._is_timed_out(reads, version, last)
        how = "heard" if place is not None else "told as gap" if known else "lost"
        counts["denied by a time-out" if is_late else how] += 1
        if is_late:
            return
        if not known:
            kind = "" if reads <= version.in_wal else " (unproved)"
            self._fault(f"owed and not heard{kind}", version, text, self._why(text))
        elif passed is not None and is_passed:
            kind = "" if reads <= version.in_wal else " (unproved)"
            self._fault(f"an id claims too much{kind}", version, text, passed.message.id)

    def _reads(self, text: str, version: Version) -> frozenset[str]:
        """Return the columns that decide whether the version is heard of."""
        topic = self._client.by_text[text]
        found = frozenset[str]() if topic.filter is None else topic.filter.reads
        if self._is_superuser():
            return found
        if version.table == "users":
            return found | {"shown"}
        rule = self._rule(topic)
        return found if rule is None else found | rule.reads

    def _is_timed_out(self, reads: frozenset[str], version: Version, last: int) -> bool:
        """Whether a rule's question about other tables ran into statement_timeout.

        That denies, says the configuration: it may be the rule that is slow.
        """
        return bool(reads & {"team", "id"}) and any(
            one.kind == "lock"
            and one.table not in DOCS
            and one.since <= last
            and (one.upto is None or one.upto >= version.commit)
            for one in self._ledger.happenings
        )

    def _why(self, text: str) -> str:
        rule = self._rule(self._client.by_text[text])
        kinds = [one.kind for one in self._ledger.happenings if one.since >= self._first]
        return f"rule {rule.text if rule else ''}; {kinds}"

    def story(self) -> list[str]:
        """Tell what the client was sent, and what happened to the person, for who looks into it."""
        lines = [f"--- {self._client}"]
        lines += [
            f"person: {version} role={version.values['role']!r}"
            for version in self._ledger.rows.get(("users", self._client.person), ())
        ]
        for number, stream in enumerate(self._client.streams):
            lines.append(
                f"stream {number}: after={stream.after} upto={stream.upto} taken={stream.taken}"
                f" of {len(stream.messages)} ended={stream.is_ended}"
            )
            for message in stream.messages:
                told = self._version(message)
                what = _short(message.data) if told is None else f"{told} {told.cursor}"
                lines.append(f"  {message.begun} {message.event[:24]} {what} {message.id[-32:]}")
        return lines

    def _is_told_of_gaps(self) -> bool:
        return self._client.kind != "plain"

    def _covered(self, version: Version, gaps: Sequence[_Gap]) -> int | None:
        """Return the place of the first gap after which readers found what became of a version."""
        return next(
            (
                gap.place
                for gap in gaps
                if gap.claims(version) is not False and gap.message.visible >= version.commit
            ),
            None,
        )

    def _check_told_in_time(
        self, version: Version, text: str, gaps: Sequence[_Gap], place: int | None
    ) -> None:
        """The gap that stands for a version is told once readers see that.

        Versions that were heard before it are none of its causes.
        """
        first = next((gap for gap in gaps if gap.claims(version)), None)
        if first is None or (place is not None and place < first.place):
            return
        if first.message.visible < version.commit:
            self._fault("a gap told before it can be seen", version, text, first.message)

    def _is_covered_by_end(self, version: Version, chain: Sequence[_Heard]) -> bool:
        """Whether a connection that can't be told was ended for it; a second may pass before."""
        stream = chain[-1].stream
        if self._is_told_of_gaps() or not stream.is_ended:
            return False
        later = [
            one.message.at
            for one in chain
            if (told := self._version(one.message)) is not None and told.commit > version.commit
        ]
        return stream.ended_at - min(later, default=stream.ended_at) < _END_SECONDS

    def _class_gaps(self, gaps: Sequence[_Gap]) -> None:
        for one in gaps:
            message = one.message
            reason, names = message.data["reason"], message.data["collections"]
            cause = self._cause_of(reason, names, message.begun)
            self._into.counts[f"gap {reason}: {cause}"] += 1
            if cause == "nothing":
                self._fault("a gap told for nothing", message, self._client)

    def _cause_of(self, reason: str, names: Sequence[str], begun: int) -> str:
        if reason == "schema" and names:
            # One row that doesn't fit makes a gap of all that is left of its transaction.
            names = sorted(self._written_with(names))
        kinds = {
            one.kind
            for one in self._ledger.happenings
            if self._first - 1 <= one.since <= begun
            and (one.kind == "lock" or not names or one.table in (*names, ""))
        }
        wanted = {
            "truncate": ("truncate",),
            "slot_lost": ("walsender", "decoder"),
            "expired": ("walsender",),
            "schema": ("alter",),
            "unknown": ("queries", "lock", "alter", "walsender", "truncate"),
        }.get(reason, ())
        found = sorted(kinds & set(wanted))
        if found:
            return "+".join(found)
        if reason == "unknown" and self._has_unproved(names, begun):
            return "unproved"
        if reason == "unknown" and self._has_lost_sight(names, begun):
            return "rights"
        return "nothing"

    def _written_with(self, names: Iterable[str]) -> set[str]:
        """Return the tables that transactions wrote which wrote some of these, too."""
        tables: dict[int, set[str]] = defaultdict(set)
        for version in self._ledger.log:
            tables[version.commit].add(version.table)
        return set(names).union(*(some for some in tables.values() if not some.isdisjoint(names)))

    def _has_lost_sight(self, names: Sequence[str], begun: int) -> bool:
        """Whether the person expands what it sees by who it was, and became somebody else."""
        is_expanding = any(
            topic.expand and (not names or topic.collection in names)
            for topic in self._client.topics
        )
        people = self._ledger.people_at(self._client.person, self._first + 1, begun)
        return is_expanding and len(people) > 1

    def _has_unproved(self, names: Sequence[str], begun: int) -> bool:
        """Whether something of the collections can't be judged or shown as it was."""
        for topic in self._client.topics:
            rule = self._rule(topic)
            reads = (rule.reads if rule else frozenset()) | (
                topic.filter.reads if topic.filter else frozenset()
            )
            for version in self._ledger.log:
                if version.commit > begun or version.commit < self._first:
                    continue
                if version.table not in (names or (version.table,)):
                    continue
                if not reads <= version.in_wal or (topic.expand and self._has_lost_rows(version)):
                    return True
            if topic.expand and topic.collection in (names or (topic.collection,)):
                # Who is behind isn't shown related records of after that.
                people = {
                    self._ledger.who(self._client.person, n) for n in range(self._first, begun + 1)
                }
                if len(people) > 1:
                    return True
        return False

    def _has_lost_rows(self, version: Version) -> bool:
        """Whether what a deleted record led to was written with it, and the old row isn't kept."""
        if version.action != "delete" or self._ledger.scene.identity("users") == "full":
            return False
        return any(
            one.table == "users" and one.commit == version.commit and one.action != "create"
            for one in self._ledger.log
        )

    def _fault(self, kind: str, *about: object) -> None:
        self._into.fault(kind, *about, f"[{self._client}]")


def _sees(of: str, row: Values, who: Who) -> bool:
    if who.is_superuser:
        return True
    return sees_user(row, who) if of == "users" else bool(row["open"])


def _may_have_address(row: Version, people: Iterable[Who]) -> bool:
    return bool(row.values.get("emailVisibility", True)) or any(
        who.is_superuser or who.role == "admin" or who.id == row.record_id for who in people
    )


def _how(name: str) -> str:
    return "generated" if name in ("gen", "is_open") else "TOASTed"


def _short(value: object) -> str:
    return str(value).replace(FILLER, "x…")
