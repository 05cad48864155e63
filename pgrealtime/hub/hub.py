"""The hub: what feed, API and service call, and how its parts are put together.

Everything here runs on one event loop. The dispatcher delivers to the LIVE connections; every other
one reads on from the changelog by itself.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence

from pgrealtime.auth.principal import Caller
from pgrealtime.changelog.memory import Changelog
from pgrealtime.changelog.row_history import RowHistory, WaitForLSN
from pgrealtime.collections.model import Collections
from pgrealtime.collections.streamed_tables import reachable_tables, streamed_collections
from pgrealtime.config.model import CollectionLoginConfig
from pgrealtime.hub.catchup.tasks import CatchUpTasks
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.connections.output import ResponseWriter
from pgrealtime.hub.dispatcher import Dispatcher
from pgrealtime.hub.entry_checks import EntryChecks
from pgrealtime.hub.events.event import GapNotice
from pgrealtime.hub.state.gaps import GapNotifier
from pgrealtime.hub.state.generation import Generation
from pgrealtime.hub.state.loads import ListReader, MirrorLoads
from pgrealtime.hub.state.progress import DispatchProgress, HubSettings, ResumableEpochs
from pgrealtime.hub.state.read_positions import BegunRead, ReadPositions
from pgrealtime.hub.state.registry import ConnectionRegistry, ConnectionTimeouts, HubCounters
from pgrealtime.hub.state.resyncs import MirrorResyncs
from pgrealtime.hub.state.visibility import VisibilityTracker
from pgrealtime.hub.subscribe import SubscribeCalls
from pgrealtime.lsn import Cursor
from pgrealtime.rule_queries.executor import QueryExecutor
from pgrealtime.rules.engine.admission import AdmissionRules


class Hub:
    """Delivers the changelog to connections, by ``collections`` until the first reload.

    The feed and the reload, built after it, are reached by callbacks: ``on_schema_mismatch`` is
    called when a row doesn't have the shape that the catalogue says, ``wait_for_changelog`` waits
    until the changelog holds what was committed up to an LSN, and ``refresh_schema`` returns once
    the current schema, or a later one, is in force; False if it wasn't read. ``list_reader`` reads
    lists for the clients of mirrors.
    """

    def __init__(
        self,
        changelog: Changelog,
        executor: QueryExecutor,
        collections: Collections,
        settings: HubSettings,
        *,
        on_schema_mismatch: Callable[[], None] = lambda: None,
        wait_for_changelog: WaitForLSN | None = None,
        refresh_schema: Callable[[], Awaitable[bool]] | None = None,
        list_reader: ListReader | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters = HubCounters()
        self.stream_began_at: float | None = None
        """When the first stream began, by the clock."""
        self._clock = clock
        self._changelog = changelog
        self._executor = executor
        self._settings = settings
        self._on_schema_mismatch = on_schema_mismatch
        self._row_history = RowHistory(changelog, wait_for_changelog)
        self._progress = progress = DispatchProgress(
            changelog.end_cursor, self._make_generation(collections)
        )
        self._epochs = ResumableEpochs(settings.epoch, changelog, can_resume=settings.can_resume)
        self._visibility = visibility = VisibilityTracker(
            executor.fetch_read_point, progress, clock
        )
        self._registry = registry = ConnectionRegistry(
            progress, self._epochs, settings, self.counters, clock
        )
        registry.callers.admission = AdmissionRules(collections)
        self._read_positions = ReadPositions(
            changelog,
            progress,
            self._epochs,
            registry,
            visibility,
            wait_for_changelog=wait_for_changelog,
        )
        self._timeouts = ConnectionTimeouts(progress, registry, settings.limits, clock)
        self._gap_notifier = gap_notifier = GapNotifier(progress, registry, clock)
        loads = MirrorLoads(
            progress,
            visibility,
            registry.callers,
            list_reader,
            settings.mirrors,
            max_bytes=settings.limits.send_buffer,
            clock=clock,
        )
        self._resyncs = resyncs = MirrorResyncs(
            progress, registry, visibility, loads, settings.mirrors, clock
        )
        self._catch_up = CatchUpTasks(
            changelog,
            progress,
            registry,
            visibility,
            gap_notifier,
            resyncs=resyncs,
            settings=settings,
            clock=clock,
        )
        self._entry_checks = EntryChecks(executor, progress, visibility, refresh_schema)
        checks, catch_up = self._entry_checks, self._catch_up
        self._dispatcher = Dispatcher(
            changelog,
            progress,
            registry,
            visibility,
            checks,
            gap_notifier,
            resyncs,
            catch_up,
            clock,
        )
        self._subscribe_calls = SubscribeCalls(
            changelog, progress, registry, visibility, catch_up, settings.limits, clock
        )

    def _make_generation(self, collections: Collections) -> Generation:
        streamed = streamed_collections(collections, ())
        self._row_history.set_streamed_tables(reachable_tables(streamed))
        return Generation(
            self._executor,
            collections,
            nulls=self._settings.nulls,
            hidden_fields=self._settings.hidden_fields,
            on_schema_mismatch=self._on_schema_mismatch,
            row_history=self._row_history,
            incomplete_records=self.counters.incomplete_records,
        )

    # --- called by the feed -------------------------------------------------------------------

    @property
    def head(self) -> Cursor:
        """Everything up to here was delivered to the LIVE connections."""
        return self._progress.head

    @property
    def progressed(self) -> asyncio.Event:
        """Set whenever the head has moved."""
        return self._dispatcher.progressed

    def wake(self) -> None:
        """Deliver what was appended to the changelog."""
        self._dispatcher.wake()

    def stream_started(self, epoch: str) -> None:
        """Connect the connections that waited: the replication stream is being read.

        If the epoch is another one, the changelog was emptied and another history begins.
        """
        if epoch != self._epochs.epoch:
            self._begin_history(epoch)
        self._registry.is_stream_up = True
        if self.stream_began_at is None:
            self.stream_began_at = self._clock()
        self._registry.connect_waiting()

    def stream_lost(self) -> None:
        """Hold back PB_CONNECT and refuse subscribe calls: the stream is not being read."""
        self._registry.is_stream_up = False

    def stream_continued(self, epoch: str) -> None:
        """Continue under another epoch: a new stream continues exactly where the last one ended."""
        self._epochs.continue_epoch(epoch)
        for connection in self._registry.connections:
            connection.continue_epoch(epoch)

    def _begin_history(self, epoch: str) -> None:
        """Begin another history: earlier positions, snapshots and results are void."""
        # No await: nobody may read the cursors of one history together with another's changelog.
        # The revision changes before connections are notified: results in evaluation are dropped.
        head = self._changelog.end_cursor
        self._epochs.start_epoch(epoch)
        self._progress.begin_history(head)
        self._dispatcher.restart()
        self._visibility.clear()
        self._row_history.clear()
        self._registry.clear_read_points()
        self._registry.callers.forget_changes_upto(head.lsn)
        for connection in list(self._registry.connections):
            if connection.restart(epoch, head):
                self._gap_notifier.notify(connection, GapNotice(None, "unknown", head))
        self._dispatcher.settle()

    # --- called by the API --------------------------------------------------------------------

    def open_connection(
        self,
        writer: ResponseWriter,
        *,
        address: str,
        last_event_id: str | None,
        position: str | None,
    ) -> Connection:
        """Add a connection whose response head was sent; see ``ConnectionRegistry.open``."""
        return self._registry.open(
            writer, address=address, last_event_id=last_event_id, position=position
        )

    def remove_connection(self, connection: Connection) -> None:
        """Remove a connection whose client has gone. Idempotent."""
        self._registry.remove(connection, "client")

    async def subscribe(
        self, client_id: str, topics: Sequence[str], caller: Caller, address: str
    ) -> None:
        """Replace a connection's topics and caller; see ``SubscribeCalls.subscribe``."""
        await self._subscribe_calls.subscribe(client_id, topics, caller, address)

    def unmatchable_topics(self, client_id: str) -> frozenset[str]:
        """Return the topics of a connection that no event can match for its caller now."""
        return self._subscribe_calls.unmatchable_topics(client_id)

    async def wait_for_delivered(self) -> None:
        """Return once new snapshots see every event delivered before, or after a few seconds."""
        await self._visibility.wait_for_delivered()

    def begin_read(self) -> BegunRead:
        """Note what is delivered, before a read takes its snapshot; it has a position then."""
        return self._read_positions.begin_read()

    # --- called by the service ----------------------------------------------------------------

    @property
    def connections(self) -> Collection[Connection]:
        """The open connections."""
        return self._registry.connections

    @property
    def progress(self) -> DispatchProgress:
        """How far the dispatcher is, and the generation in force; to be read only."""
        return self._progress

    @property
    def gaps_notified(self) -> Mapping[str, int]:
        """Gaps of which connections were notified, by reason."""
        return self._gap_notifier.notified

    @property
    def mirror_frames_sent(self) -> Mapping[str, int]:
        """Events sent to mirrors, by action."""
        counts = Counter(self.counters.mirror_frames_sent_to_closed)
        for connection in self.connections:
            counts.update(connection.mirror_frames or {})
        return counts

    @property
    def resyncs_written(self) -> Mapping[str, int]:
        """Resyncs that mirrors were told, by reason."""
        return self._resyncs.written

    @property
    def subscription_counts(self) -> Mapping[str, int]:
        """Numbers of subscriptions that an event can match, by collection."""
        return self._progress.generation.subscription_counts

    @property
    def is_stream_up(self) -> bool:
        """Whether the replication stream is being read."""
        return self._registry.is_stream_up

    @property
    def is_closing(self) -> bool:
        """Whether ``shutdown`` was called."""
        return self._registry.is_closing

    def set_waits_for_visibility(self, *, waits: bool) -> None:
        """Set whether events wait until their transactions are visible to readers."""
        self._entry_checks.waits_for_visibility = waits

    async def replace_generation(
        self,
        collections: Collections,
        revalidate_caller: Callable[[Caller], Caller],
        *,
        logins: Mapping[str, CollectionLoginConfig] | None = None,
        allows_guests: bool = True,
    ) -> None:
        """Evaluate and render by other collections; return once they are in force.

        Connections and their topics stay. Each topic is bound to the new collections, which may
        have none of its name. ``revalidate_caller`` and ``logins`` are as ``CallerTracker`` has
        them.
        """
        replaced = asyncio.get_running_loop().create_future()

        def replace() -> None:
            # Settings of callers and generation before rebinding: both decide into which group a
            # subscription goes.
            try:
                previous = self._progress.generation
                generation = self._make_generation(collections)
                self._registry.callers.replace_settings(
                    logins or {}, revalidate_caller, allows_guests=allows_guests
                )
                self._registry.callers.admission = AdmissionRules(collections)
                self._progress.replace_generation(generation)
                self._registry.rebind(previous)
            except Exception as error:  # noqa: BLE001 (raised where it is awaited)
                if not replaced.done():
                    replaced.set_exception(error)
            if not replaced.done():
                replaced.set_result(None)

        self._progress.when_idle(replace)
        await replaced

    async def run(self) -> None:
        """Deliver changes until cancelled."""
        await self._dispatcher.run()

    async def run_timers(self) -> None:
        """Apply timeouts, send heartbeats and forget visible transactions, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._timeouts.watch(), name="limits")
            group.create_task(self._visibility.watch(), name="visibility")
            group.create_task(self._resyncs.watch(self._wake_for_resyncs), name="resyncs")
            group.create_task(self._row_history.trim_periodically(), name="row history")

    def _wake_for_resyncs(self, connections: Iterable[Connection]) -> None:
        self._dispatcher.wake()
        for connection in connections:
            if connection.is_catching_up():
                self._catch_up.start_task(connection)

    async def shutdown(self, grace_seconds: float) -> None:
        """Close every connection within ``grace_seconds``, a few at a time."""
        self._registry.is_closing = True
        await self._timeouts.shutdown(grace_seconds)
