"""Compares what clients were sent with what they may see and must receive."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pgrealtime.changelog.memory import Entry
from pgrealtime.changes import Change, Delete, Transaction, Truncate
from pgrealtime.lsn import Cursor
from tests.histories.ledger import COLUMNS, Condition, Ledger, Version, condition, moments, outcomes
from tests.histories.reader import Client, Message, Stream, Topic
from tests.histories.scene import DOCS, FILLER, CallerState, Values, sees_user

_OWN = ("PB_CONNECT", "PB_CURSOR", "PB_RESYNC")
_END_SECONDS = 4.0
"""A connection stays open for a second after its first answer, and ends at the next tick."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A violated guarantee."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(slots=True)
class Findings:
    """The results of audits.

    Attributes:
        counts: Numbers of events owed, received, left out, notified as gaps and so on.
    """

    faults: list[Fault] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    stories: list[str] = field(default_factory=list)

    def fault(self, kind: str, *about: object) -> None:
        """Record a violated guarantee."""
        self.counts[f"FAULT {kind}"] += 1
        self.faults.append(Fault(kind, " | ".join(map(str, about))))


def learn_cursors(ledger: Ledger, entries: Iterable[Entry]) -> None:
    """Set the cursors of versions from the changelog, since message ids are made of them."""
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
    """Return the ledger's versions that a change of the stream made, none if there is none.

    Args:
        ledger: All that was written.
        change: A change of the stream.
        commit: The commit of the change before.
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
    """Return the version that a message is the event of."""
    record, action = message.data["record"], message.data["action"]
    mark = record.get("mark")
    for one in reversed(ledger.rows.get((topic.collection, str(record.get("id"))), ())):
        if one.action == action and (mark is None or one.values.get("mark") == mark):
            return one
    return None


@dataclass(slots=True)
class _Received:
    """A received message of a chain."""

    place: int
    message: Message
    stream: Stream


@dataclass(frozen=True, slots=True)
class _Gap:
    """A PB_RESYNC of a chain.

    Attributes:
        reach: The cursor up to which it covers changes; None if it has no id.
    """

    place: int
    message: Message
    reach: Cursor | None

    def claims(self, version: Version) -> bool | None:
        """Return whether it covers the version; None if that is unknown."""
        names = self.message.data["collections"]
        if names and version.table not in names:
            return False
        if self.reach is None or version.cursor is None:
            return None
        return self.reach >= version.cursor


def _gaps_in(chain: Sequence[_Received]) -> list[_Gap]:
    """Return the gaps that the chain was notified of.

    A gap that is sent together with another one at the end of a slice repeats the id before it,
    since a client that disconnects in between must receive it again. It covers changes up to the
    cursor of that other gap.
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


def _untaken(chain: Sequence[_Received]) -> list[_Received]:
    """Return what the last connection of a chain was sent after its client had disconnected.

    That includes a gap after the events of its own slice, if the client disconnected in between.
    """
    if not chain:
        return []
    stream, place = chain[-1].stream, chain[-1].place + 1
    rest = stream.messages[len(stream.received) :]
    return [_Received(place + at, message, stream) for at, message in enumerate(rest)]


class Audit:
    """Checks what one client received.

    Args:
        ledger: What was written.
        client: The client.
        first: The number of the first commit that counts.
        findings: Receives the faults.
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
        is_notified = self._is_notified_after(stream, message, version)
        self._check_values(topic, version, message, record, is_notified=is_notified)
        if (
            topic.expand
            and version.table in DOCS
            and (not topic.fields or "expand" in topic.fields)
        ):
            self._check_expand(
                topic, version, message, record.get("expand", {}), is_notified=is_notified
            )

    def _outcomes(self, holds: Condition, version: Version, last: int) -> set[bool]:
        return outcomes(self._ledger, holds, version, self._client.person, last)

    def _check_values(
        self,
        topic: Topic,
        version: Version,
        message: Message,
        record: Mapping[str, Any],
        *,
        is_notified: bool,
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
                self._note_left_out(version, name, message, is_notified=is_notified)
            elif record[name] != version.values[name]:
                self._check_other(topic, version, message, name, record[name])
        if table in DOCS and (not topic.fields or "liked_by" in topic.fields):
            self._check_links(topic, version, message, record, is_notified=is_notified)

    def _check_hidden(self, version: Version, message: Message) -> None:
        if not self._is_superuser():
            self._fault("LEAK of a hidden field", version, message.event)

    def _is_superuser(self) -> bool:
        return self._client.person == "root"

    def _note_left_out(
        self, version: Version, name: str, message: Message, *, is_notified: bool
    ) -> None:
        if name in version.in_wal:
            self._fault("withheld", version, name)
        elif version.action != "delete":
            self._into.counts[f"left out: {_how(name)}"] += 1
            if (
                not is_notified
                and not self._is_proof_lost(version, message)
                and next(self._later(version, message.begun), None) is None
            ):
                self._fault("left out though nothing is newer", version, name, message.event)

    def _is_proof_lost(self, version: Version, message: Message) -> bool:
        """Return whether the stream may have been too late at a position that a proof needs.

        Events wait only shortly for that, and what can't be proved is left out: while the stream is
        disconnected, for a moment after the table was altered, and while a transaction is open,
        whose WAL the server need not flush before the next commit. Neither the time of that flush
        is known here nor when the program had the stream back.
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

    def _is_notified_after(self, stream: Stream, message: Message, version: Version) -> bool:
        """Return whether the stream notifies a gap of the collection, from that message on."""
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
        callers = self._ledger.callers_between(self._client.person, version.commit, message.begun)
        may = version.values["emailVisibility"] or any(
            caller.is_superuser or caller.role == "admin" or caller.id == version.record_id
            for caller in callers
        )
        if not may or record["email"] != version.values["email"]:
            self._fault("LEAK of an address", version, message.event)

    def _check_other(
        self, topic: Topic, version: Version, message: Message, name: str, value: object
    ) -> None:
        """Check that a value that isn't the version's is of a later one that the caller may see."""
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
        is_notified: bool,
    ) -> None:
        states = list(moments(self._ledger, version, message.begun))
        if version.is_rename or version.action == "delete":
            states += [self._ledger.at(commit) for commit in self._span(version, message)]
        possible = [at.likes(version.table, version.record_id) for at in states]
        if "liked_by" not in record:
            if (
                self._ledger.is_untouched_since(version, message.begun)
                and not is_notified
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
        callers = self._ledger.callers_between(self._client.person, version.commit, message.begun)
        is_seen = any(
            row is not None
            and row.action in ("create", "update")
            and any(
                holds(row.table, row.values, caller, at)
                for caller in callers
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
        is_notified: bool,
    ) -> None:
        begun = message.begun
        for name, of in (("owner", "users"), ("team", "teams")):
            target = str(version.values[name])
            shown = expand.get(name)
            if shown is None:
                if target and name in version.in_wal and self._is_owed(of, target, version, begun):
                    self._into.counts["left out: expand"] += 1
                    if not is_notified:
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
        if version.action == "delete":  # it shows the state at that very change
            written = self._ledger.rows.get((of, target), ())
            spans += [one for one in written if one.commit == version.commit]
        return list({id(one): one for one in spans if one is not None}.values())

    def _is_owed(self, of: str, target: str, version: Version, last: int) -> bool:
        """Return whether the related record existed, was visible and unchanged all the time."""
        live = self._live(of, target, version, last)
        if version.action == "delete" or len(live) != 1 or live[0].action == "delete":
            return False
        callers = self._ledger.callers_between(self._client.person, version.commit, last)
        return all(_sees(of, live[0].values, caller) for caller in callers)

    def _check_related(
        self, of: str, version: Version, last: int, shown: Mapping[str, Any]
    ) -> None:
        found = self._ledger.by_mark.get(str(shown.get("mark")))
        live = self._live(of, str(shown.get("id")), version, last)
        if found is None or found not in live:
            self._fault("STALE expand", version, _short(shown), [str(one) for one in live])
            return
        callers = self._ledger.callers_between(self._client.person, version.commit, last)
        if version.action == "delete":
            callers |= self._ledger.callers_between(self._client.person, version.commit - 1, last)
        if not any(_sees(of, found.values, caller) for caller in callers):
            self._fault("LEAK by expand", version, found, f"sent after {last}")
        for name in COLUMNS[of] & set(shown):
            if shown[name] != found.values[name]:
                self._fault("wrong value in expand", version, name, _short(shown[name]))
        if "email" in shown and not _may_have_address(found, callers):
            self._fault("LEAK of an address by expand", version, found)
        if found.commit <= version.commit or version.action == "delete":
            return
        # Written since: it is shown to callers that still have the right.
        later = self._ledger.callers_between(self._client.person, found.commit, last)
        if not any(_sees(of, found.values, caller) for caller in later) or (
            "email" in shown and not _may_have_address(found, later)
        ):
            self._fault("LEAK by expand, of a later version", version, found, f"sent after {last}")

    # --- what was received, and what had to be

    def _check_chain(self, streams: Sequence[Stream], *, is_whole: bool) -> None:
        if not streams or streams[0].upto is None:
            return
        chain = [
            _Received(place, message, stream)
            for place, (message, stream) in enumerate(
                (message, stream) for stream in streams for message in stream.received
            )
        ]
        received = self._received(chain)
        self._check_repeats(chain)
        gaps = _gaps_in([*chain, *_untaken(chain)])
        self._class_gaps(gaps)
        ended = self._ledger.begun
        if not is_whole:
            events = [
                version.commit
                for one in chain
                if (version := self._version(one.message)) is not None
            ]
            ended = max(events, default=0) - 1
        for text, topic in self._client.by_text.items():
            for version in self._ledger.log:
                if version.commit <= streams[0].upto or version.commit > ended:
                    continue
                if version.table == topic.collection and topic.record_id in ("", version.record_id):
                    self._check_owed(text, version, chain, received, gaps)

    def _version(self, message: Message) -> Version | None:
        topic = self._client.by_text.get(message.event)
        return None if topic is None else version_of(self._ledger, topic, message)

    def _received(self, chain: Sequence[_Received]) -> dict[tuple[str, int], int]:
        found: dict[tuple[str, int], int] = {}
        for one in chain:
            version = self._version(one.message)
            if version is not None:
                found.setdefault((one.message.event, id(version)), one.place)
        return found

    def _check_repeats(self, chain: Sequence[_Received]) -> None:
        """Check that nothing before the position that a stream resumes from is sent again."""
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
        chain: Sequence[_Received],
        received: Mapping[tuple[str, int], int],
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
            self._check_gap_is_timely(version, text, gaps, None)
            if self._covered(version, gaps) is None and self._receives_gaps():
                events = [one.message for one in gaps if one.message.begun >= version.commit]
                self._fault("truncate not notified", version, text, events)
            return
        reads = self._reads(text, version)
        if version.action == "delete" and not reads <= version.in_wal:
            return
        if self._outcomes(self._conditions[text], version, last) != {True}:
            return
        counts["owed"] += 1
        place = received.get((text, id(version)))
        self._check_gap_is_timely(version, text, gaps, place)
        covered = self._covered(version, gaps)
        if covered is None and self._is_covered_by_end(version, chain):
            covered = len(chain)
        if not reads <= version.in_wal:
            counts["owed unproved"] += 1
            counts["received unproved"] += place is not None
        known = [one for one in (place, covered) if one is not None]
        is_passed = passed is not None and bool(known) and passed.place < min(known)
        # A gap that is notified later covers more than what was denied here.
        is_late = (not known or is_passed) and self._is_timed_out(reads, version, last)
        how = "received" if place is not None else "notified as gap" if known else "lost"
        counts["denied by a time-out" if is_late else how] += 1
        if is_late:
            return
        if not known:
            kind = "" if reads <= version.in_wal else " (unproved)"
            self._fault(f"owed and not received{kind}", version, text, self._why(text))
        elif passed is not None and is_passed:
            kind = "" if reads <= version.in_wal else " (unproved)"
            self._fault(f"an id claims too much{kind}", version, text, passed.message.id)

    def _reads(self, text: str, version: Version) -> frozenset[str]:
        """Return the columns that decide whether the version is received."""
        topic = self._client.by_text[text]
        found = frozenset[str]() if topic.filter is None else topic.filter.reads
        if self._is_superuser():
            return found
        if version.table == "users":
            return found | {"shown"}
        rule = self._rule(topic)
        return found if rule is None else found | rule.reads

    def _is_timed_out(self, reads: frozenset[str], version: Version, last: int) -> bool:
        """Return whether a rule's query of other tables ran into statement_timeout.

        That denies, as the configuration documents: the rule itself may be slow.
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
        """Return what the client was sent and what happened to its user, to analyse a fault."""
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
                events = self._version(message)
                what = _short(message.data) if events is None else f"{events} {events.cursor}"
                lines.append(f"  {message.begun} {message.event[:24]} {what} {message.id[-32:]}")
        return lines

    def _receives_gaps(self) -> bool:
        return self._client.kind != "plain"

    def _covered(self, version: Version, gaps: Sequence[_Gap]) -> int | None:
        """Return the index of the first gap after which readers see the version's result."""
        return next(
            (
                gap.place
                for gap in gaps
                if gap.claims(version) is not False and gap.message.visible >= version.commit
            ),
            None,
        )

    def _check_gap_is_timely(
        self, version: Version, text: str, gaps: Sequence[_Gap], place: int | None
    ) -> None:
        """Check that the gap of a version is sent only when readers see the version's commit.

        Versions received before the gap are none of its causes.
        """
        first = next((gap for gap in gaps if gap.claims(version)), None)
        if first is None or (place is not None and place < first.place):
            return
        if first.message.visible < version.commit:
            self._fault("a gap notified before its cause is visible", version, text, first.message)

    def _is_covered_by_end(self, version: Version, chain: Sequence[_Received]) -> bool:
        """Return whether a client without gap messages was disconnected instead, in time."""
        stream = chain[-1].stream
        if self._receives_gaps() or not stream.is_ended:
            return False
        later = [
            one.message.at
            for one in chain
            if (events := self._version(one.message)) is not None and events.commit > version.commit
        ]
        return stream.ended_at - min(later, default=stream.ended_at) < _END_SECONDS

    def _class_gaps(self, gaps: Sequence[_Gap]) -> None:
        for one in gaps:
            message = one.message
            reason, names = message.data["reason"], message.data["collections"]
            cause = self._cause_of(reason, names, message.begun)
            self._into.counts[f"gap {reason}: {cause}"] += 1
            if cause == "nothing":
                self._fault("a gap without a cause", message, self._client)

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
        """Return these tables and all that were written in a transaction with one of them."""
        tables: dict[int, set[str]] = defaultdict(set)
        for version in self._ledger.log:
            tables[version.commit].add(version.table)
        return set(names).union(*(some for some in tables.values() if not some.isdisjoint(names)))

    def _has_lost_sight(self, names: Sequence[str], begun: int) -> bool:
        """Return whether the client requests expand, and its user's rights changed."""
        is_expanding = any(
            topic.expand and (not names or topic.collection in names)
            for topic in self._client.topics
        )
        callers = self._ledger.callers_between(self._client.person, self._first + 1, begun)
        return is_expanding and len(callers) > 1

    def _has_unproved(self, names: Sequence[str], begun: int) -> bool:
        """Return whether an event of the collections can't be evaluated or shown as of its time."""
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
                # A client that catches up isn't shown related records of later versions.
                callers = {
                    self._ledger.caller_at(self._client.person, n)
                    for n in range(self._first, begun + 1)
                }
                if len(callers) > 1:
                    return True
        return False

    def _has_lost_rows(self, version: Version) -> bool:
        """Return whether a deleted record's related row was written with it, without old image."""
        if version.action != "delete" or self._ledger.scene.identity("users") == "full":
            return False
        return any(
            one.table == "users" and one.commit == version.commit and one.action != "create"
            for one in self._ledger.log
        )

    def _fault(self, kind: str, *about: object) -> None:
        self._into.fault(kind, *about, f"[{self._client}]")


def _sees(of: str, row: Values, caller: CallerState) -> bool:
    if caller.is_superuser:
        return True
    return sees_user(row, caller) if of == "users" else bool(row["open"])


def _may_have_address(row: Version, callers: Iterable[CallerState]) -> bool:
    return bool(row.values.get("emailVisibility", True)) or any(
        caller.is_superuser or caller.role == "admin" or caller.id == row.record_id
        for caller in callers
    )


def _how(name: str) -> str:
    return "generated" if name in ("gen", "is_open") else "TOASTed"


def _short(value: object) -> str:
    return str(value).replace(FILLER, "x…")
