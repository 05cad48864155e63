"""Answers list and view requests: rows, total and related records in one snapshot.

``api.records`` calls it. Nothing of it waits for realtime or keeps it waiting: it has a pool of its
own, and its work on the event loop is done in short pieces.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

import psycopg
import structlog
from psycopg_pool import PoolTimeout

from pgrealtime.auth.principal import AuthRecord, Caller, Superuser
from pgrealtime.caches import WeightedCache
from pgrealtime.catalog.model import canonical_id
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections, unpadded_id
from pgrealtime.config.model import HiddenFieldsMode
from pgrealtime.errors import DatabaseUnreachableError, PgRealtimeError, ReadError, RuleError
from pgrealtime.expand.batch import LoadBatch
from pgrealtime.expand.node import RecordNode
from pgrealtime.expand.plan import ExpandCompiler, ExpandViewer, JunctionHops, junction_hops
from pgrealtime.expand.render import ExpandRenderer, ExpandTooLargeError
from pgrealtime.fairness import YieldTimer
from pgrealtime.postgres.rows import RowsTooLargeError
from pgrealtime.reads.compiler import BoundList, ListCompiler
from pgrealtime.reads.list_parameters import ListParameters, parse_list_parameters
from pgrealtime.reads.throttle import GuessThrottle
from pgrealtime.records.encode import RecordEncoder, View, compile_encoder
from pgrealtime.records.fields import parse_fields
from pgrealtime.rule_queries.session import ReadSession, ReadSessionFactory
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.list_query import reserved_word
from pgrealtime.rules.language.parameters import MacroValues
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.snapshot import ReadPoint

log = structlog.get_logger(__name__)

_MAX_UNSTREAMED_ROWS: Final = 100
"""Larger pages are read row by row, so that they can be given up. Others are prepared, which saves
a fraction of a millisecond."""
_GRACE_SECONDS: Final = 0.1
"""Lets PostgreSQL itself end a statement that takes all the seconds of a request."""
_MAX_ENCODER_CHARACTERS: Final = 256 * 1024
"""Length together of the options ``fields`` whose encoders are cached."""
_MIN_ENCODER_CHARACTERS: Final = 256
"""As so many a shorter text counts: an encoder without it takes some kilobytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """Bounds of one request."""

    max_joined_rows: int = 1_000_000
    """Combinations of joined rows that a sort by several values may go through."""
    max_answer_bytes: int = 64 * 1024 * 1024
    max_seconds: float = 5.0
    """From the snapshot until the records are encoded: of all statements together."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The body of an answer, and which commits its snapshot saw."""

    body: bytes
    read_point: ReadPoint
    item_count: int


@dataclass(frozen=True, slots=True)
class RecordSet:
    """All records that a caller may see, and which commits their snapshot saw."""

    records: list[bytes]
    read_point: ReadPoint
    delay_seconds: float
    """How long it is to be held back: without records it may answer a guess."""


class RecordReader:
    """Reads records for callers, by the collections in force.

    Args:
        sessions: Opens the snapshots to read in.
        collections: The collections in force.
        nulls: How NULL is shown.
        hidden: Whether clients may expand hidden relations.
        limits: Bounds of one request.
    """

    def __init__(
        self,
        sessions: ReadSessionFactory,
        collections: Collections,
        *,
        nulls: Literal["null", "zero"],
        hidden: HiddenFieldsMode = "strict",
        limits: ReadLimits = ReadLimits(),
    ) -> None:
        self._sessions = sessions
        self._nulls: Literal["null", "zero"] = nulls
        self._hidden: HiddenFieldsMode = hidden
        self._limits = limits
        self.guesses = GuessThrottle()
        """Lists without records, by network, sent ones too."""
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """Requests by kind, ``list``, ``view`` or ``load``, and result: ok, or the error code."""
        self.replace_collections(collections)

    def replace_collections(self, collections: Collections) -> None:
        """Use other collections from now on; requests under way end by those before."""
        self._compiled = _CompiledCollections(collections, nulls=self._nulls, hidden=self._hidden)

    def find_collection(self, name_or_id: str) -> Collection | None:
        """Return the collection of an id, or of a name whose case doesn't matter."""
        return self._compiled.collections.find_ignoring_case(name_or_id)

    async def list_records(
        self, collection: Collection, caller: Caller, request: RuleRequest, *, network: str = ""
    ) -> Answer:
        """Return a page of a collection's records, as the query of the request asks for it.

        Networks take turns where work is done for one request at a time.

        Raises:
            ReadError: The request is refused.
            DatabaseUnreachableError: PostgreSQL doesn't answer, or every connection is in use.
        """
        with self._outcome_counted("list", collection):
            compiled = self._compiled
            collection = compiled.current(collection)
            bound = await compiled.bind_list(collection, request, network)
            page = parse_list_parameters(request.query)
            async with self._session(ReadError("the request took too long")) as session:
                rows, total = await self._fetch_page(
                    session,
                    collection,
                    bound,
                    page,
                    is_last=not compiled.queries_more(collection, request),
                )
                read_point = await session.fetch_read_point()
                items = await compiled.encode_records(
                    session,
                    collection,
                    rows,
                    caller,
                    request,
                    max_bytes=self._limits.max_answer_bytes,
                )
            return Answer(_list_body(items, page, total), read_point, len(rows))

    async def read_set(
        self,
        collection: Collection,
        record_id: str | None,
        caller: Caller,
        request: RuleRequest,
        *,
        max_rows: int,
        max_bytes: int,
        network: str = "",
    ) -> RecordSet:
        """Return what a topic's caller may see: of the collection, or of one record of it.

        By the filter of the request's query, without its page or sort.

        Raises:
            ReadError: It has more than ``max_rows`` or ``max_bytes``, or is refused.
            DatabaseUnreachableError: PostgreSQL doesn't answer, or every connection is in use.
        """
        with self._outcome_counted("load", collection):
            compiled = self._compiled
            collection = compiled.current(collection)
            bound = await compiled.bind_set(collection, record_id, request, network)
            statement = bound.sql.page
            more: dict[str, object] = {"limit": max_rows + 1, "offset": 0}
            key = canonical_id(record_id or "", collection.key.type)
            if record_id is not None:
                # An id that the key can't have is compared with NULL.
                statement, more = bound.sql.row, {"id": key if key == record_id else None}
            async with self._session(ReadError("the list took too long")) as session:
                rows = await _fetch_rows(
                    session,
                    bound,
                    statement,
                    more,
                    is_last=not compiled.queries_more(collection, request),
                    max_characters=(
                        self._limits.max_answer_bytes if max_rows > _MAX_UNSTREAMED_ROWS else None
                    ),
                )
                if rows is None:
                    raise ReadError("the query failed")
                if len(rows) > max_rows:
                    raise ReadError("the list is too long")
                read_point = await session.fetch_read_point()
                records = await compiled.encode_records(
                    session, collection, rows, caller, request, max_bytes=max_bytes
                )
        # As for a list on request.
        rule = collection.list_rule if record_id is None else collection.view_rule
        is_filtered = bool(rule and request.query.get("filter"))
        delay = 0.0
        if is_filtered and not records and not isinstance(request.principal, Superuser):
            delay = self.guesses.delay_seconds(network, collection.name, time.monotonic())
        return RecordSet(records, read_point, delay)

    async def view_record(
        self, collection: Collection, record_id: str, caller: Caller, request: RuleRequest
    ) -> Answer:
        """Return one record; there is none either if the database fails to evaluate the rule.

        Raises:
            ReadError: The request is refused, or there is no such record for the caller.
            DatabaseUnreachableError: PostgreSQL doesn't answer, or every connection is in use.
        """
        with self._outcome_counted("view", collection):
            compiled = self._compiled
            collection = compiled.current(collection)
            bound = await compiled.bind_view(collection, request)
            key = canonical_id(record_id, collection.key.type)
            if key is None or key != record_id:
                raise _unknown_record()
            async with self._session(_unknown_record()) as session:
                rows = await _fetch_rows(
                    session,
                    bound,
                    bound.sql.row,
                    {"id": key},
                    is_last=not compiled.queries_more(collection, request),
                )
                if not rows:
                    raise _unknown_record()
                read_point = await session.fetch_read_point()
                (record,) = await compiled.encode_records(
                    session,
                    collection,
                    rows[:1],
                    caller,
                    request,
                    max_bytes=self._limits.max_answer_bytes,
                )
            return Answer(record, read_point, 1)

    @contextmanager
    def _outcome_counted(self, kind: str, collection: Collection) -> Iterator[None]:
        """Count how a request ends, and log why it is refused: its answer doesn't say."""
        try:
            yield
        except PgRealtimeError as error:
            code = error.error_code
            self.outcomes[kind, code] += 1
            log.debug("read.refused", collection=collection.name, code=code, reason=error.message)
            raise
        self.outcomes[kind, "ok"] += 1

    @asynccontextmanager
    async def _session(self, too_late: ReadError) -> AsyncIterator[ReadSession]:
        """Open a snapshot; raise ``too_late`` if it isn't left in time: a running query ends."""
        is_answering = False
        try:
            async with self._sessions.read_session(frozenset()) as session:
                deadline = asyncio.timeout(self._limits.max_seconds + _GRACE_SECONDS)
                try:
                    async with deadline:
                        yield session
                finally:
                    # A query that doesn't end when it is cancelled is given up with its connection.
                    is_answering = deadline.expired() and not session.is_broken
        except (psycopg.Error, PoolTimeout, TimeoutError) as error:
            if is_answering:
                raise too_late from error
            raise DatabaseUnreachableError("records can't be read now") from error
        except RowsTooLargeError as error:
            raise ReadError("the rows are too large") from error

    async def _fetch_page(
        self,
        session: ReadSession,
        collection: Collection,
        bound: BoundList,
        page: ListParameters,
        *,
        is_last: bool,
    ) -> tuple[list[Row], int]:
        """Return the rows of a page, and how many there are on all pages, or -1.

        ``is_last``: nothing else will be asked in the session.
        """
        rows: list[Row] = []
        offset = page.offset
        if offset is not None:
            limits = {
                "limit": page.per_page,
                "offset": offset,
                "max_joined_rows": self._limits.max_joined_rows + 1,
            }
            if bound.sql.joined_count is not None:
                await self._require_few_joined_rows(session, bound, limits)
            found = await _fetch_rows(
                session,
                bound,
                bound.sql.page,
                limits,
                is_last=is_last and page.skips_total,
                max_characters=(
                    self._limits.max_answer_bytes if page.per_page > _MAX_UNSTREAMED_ROWS else None
                ),
            )
            if found is None:
                raise ReadError("the query failed")
            rows = found
        if page.skips_total:
            return rows, -1
        is_last_page = offset is not None and 0 < len(rows) < page.per_page
        if collection.has_unique_key and (is_last_page or (offset == 0 and not rows)):
            assert offset is not None
            return rows, offset + len(rows)
        counted = await session.fetch_texts_once(bound.sql.count, bound.params, is_last=is_last)
        if counted is None:
            raise ReadError("the count failed")
        return rows, int(counted[0][0] or 0)

    async def _require_few_joined_rows(
        self, session: ReadSession, bound: BoundList, limits: Mapping[str, int]
    ) -> None:
        assert bound.sql.joined_count is not None
        counted = await session.fetch_texts_once(bound.sql.joined_count, {**bound.params, **limits})
        if counted is None:
            raise ReadError("the query failed")
        if int(counted[0][0] or 0) > self._limits.max_joined_rows:
            raise ReadError("the sort joins too many rows")


class _CompiledCollections:
    """One generation's collections, and what is compiled for reading their records."""

    def __init__(
        self,
        collections: Collections,
        *,
        nulls: Literal["null", "zero"],
        hidden: HiddenFieldsMode,
    ) -> None:
        self.collections = collections
        self._nulls: Literal["null", "zero"] = nulls
        self._list_compiler = ListCompiler(collections)
        self._rule_compiler = RuleCompiler(collections)
        self._expand_compiler = ExpandCompiler(collections, self._rule_compiler, hidden=hidden)
        self._junction_hops: JunctionHops = {
            collection.name: junction_hops(collections, collection)
            for collection in collections.values()
        }
        self._encoders: WeightedCache[tuple[str, View], RecordEncoder] = WeightedCache(
            _MAX_ENCODER_CHARACTERS
        )

    def current(self, collection: Collection) -> Collection:
        """Return the collection as it is in force: a request may have waited before it reads.

        Raises:
            ReadError: There is none of the name any more.
        """
        found = self.collections.get(collection.name)
        if found is None:
            raise ReadError("there is no such collection any more", code="read_collection_unknown")
        return found

    async def bind_list(
        self, collection: Collection, request: RuleRequest, network: str
    ) -> BoundList:
        """Return the statements of a list under its rule, filter and sort.

        Raises:
            ReadError: One of them is refused.
        """
        rule, query = _require_rule(collection.list_rule, request), request.query
        filter_text, sort_text = query.get("filter", ""), query.get("sort", "")
        _refuse_reserved_words(filter_text, sort_text, request)
        try:
            return await self._list_compiler.bind(
                collection,
                rule,
                request,
                filter_text=filter_text,
                sort_text=sort_text,
                network=network,
            )
        except RuleError as error:
            raise ReadError(error.message, hint=error.hint) from error

    async def bind_view(self, collection: Collection, request: RuleRequest) -> BoundList:
        """Return the statements of a list under the view rule.

        Raises:
            ReadError: Only superusers may view, or the rule can't be compiled for the request.
        """
        rule = _require_rule(collection.view_rule, request)
        try:
            return await self._list_compiler.bind(collection, rule, request)
        except RuleError as error:
            raise _unknown_record() from error

    async def bind_set(
        self, collection: Collection, record_id: str | None, request: RuleRequest, network: str
    ) -> BoundList:
        """Return the statements of the rows under the rule and the filter of a topic.

        Raises:
            ReadError: One of them is refused.
        """
        rule = collection.list_rule if record_id is None else collection.view_rule
        filter_text = request.query.get("filter", "")
        _refuse_reserved_words(filter_text, "", request)
        try:
            return await self._list_compiler.bind(
                collection,
                _require_rule(rule, request),
                request,
                filter_text=filter_text,
                network=network,
            )
        except RuleError as error:
            raise ReadError(error.message, hint=error.hint) from error

    def queries_more(self, collection: Collection, request: RuleRequest) -> bool:
        """Whether ``encode_records`` queries the database: for related records, or managers."""
        return (
            bool(self._junction_hops[collection.name])
            or bool(request.query.get("expand"))
            or (
                collection.type == "auth"
                and collection.manage_rule is not None
                and not isinstance(request.principal, Superuser)
            )
        )

    async def encode_records(
        self,
        session: ReadSession,
        collection: Collection,
        rows: Sequence[Row],
        caller: Caller,
        request: RuleRequest,
        *,
        max_bytes: int,
    ) -> list[bytes]:
        """Return rows as records, with all that the caller may see of them.

        Raises:
            ReadError: The option ``fields`` can't be read, or the records are too large.
        """
        fields = request.query.get("fields", "")
        if parse_fields(fields) is None:
            raise ReadError("fields can't be read")
        encoders = [
            self._encoder(
                collection.name,
                View(
                    sees_hidden=isinstance(request.principal, Superuser),
                    sees_email=sees_email,
                    fields=fields or None,
                ),
            )
            for sees_email in (False, True)
        ]
        if collection.type != "auth" and not self.queries_more(collection, request):
            return await _collect(map(encoders[0], rows), max_bytes)
        nodes = [
            RecordNode(collection, unpadded_id(collection, row[collection.key.name] or ""), row)
            for row in rows
        ]
        viewer = self._viewer(collection, caller, request)
        batch = LoadBatch(session, self._junction_hops, max_characters=max_bytes)
        if self._junction_hops[collection.name]:
            await batch.load_junction_ids(nodes)
        if viewer is not None:
            await batch.load_expands([(node, viewer) for node in nodes])
            if batch.has_left_out_rows:
                raise ReadError("expand leads to too many records")
        shows_email = await self._emails_shown(session, collection, nodes, caller, request)
        renderer = (
            None
            if viewer is None
            else ExpandRenderer(nodes, viewer, self._render_node, max_bytes=max_bytes)
        )
        try:
            if renderer is not None:
                await _run_in_pieces(renderer.find_paths())
                await _run_in_pieces(renderer.write_related())
            records = _encode(nodes, encoders, shows_email, renderer)
            return await _collect(records, max_bytes)
        except ExpandTooLargeError as error:
            raise ReadError("the answer is too large") from error

    def _viewer(
        self, collection: Collection, caller: Caller, request: RuleRequest
    ) -> ExpandViewer | None:
        if not request.query.get("expand"):
            return None
        return self._expand_compiler.compile_expand(collection, request, caller.own_row)

    async def _emails_shown(
        self,
        session: ReadSession,
        collection: Collection,
        nodes: Sequence[RecordNode],
        caller: Caller,
        request: RuleRequest,
    ) -> Sequence[bool]:
        """Return of which records the caller sees the e-mail address, whatever its visibility."""
        if collection.type != "auth" or not nodes:
            return [False] * len(nodes)
        match request.principal:
            case Superuser():
                return [True] * len(nodes)
            case AuthRecord(collection_id=collection_id, id=own_id) if (
                collection_id == collection.id
            ):
                pass
            case _:
                own_id = ""
        managed = await self._managed(session, collection, nodes, caller, request)
        return [
            is_managed or node.record_id == own_id
            for is_managed, node in zip(managed, nodes, strict=True)
        ]

    async def _managed(
        self,
        session: ReadSession,
        collection: Collection,
        nodes: Sequence[RecordNode],
        caller: Caller,
        request: RuleRequest,
    ) -> Sequence[bool]:
        """Return for which records the manage rule admits the caller."""
        nobody = [False] * len(nodes)
        if collection.manage_rule is None:
            return nobody
        try:
            bound = self._rule_compiler.bind_caller(
                collection, collection.manage_rule, request, caller.own_row, is_filtered=False
            )
        except RuleError:
            return nobody
        if not isinstance(bound, BoundPredicate):
            return nobody
        evaluation: Evaluation[int, BoundPredicate] = Evaluation(MacroValues(datetime.now(UTC)))
        yield_timer = YieldTimer()
        for index, node in enumerate(nodes):
            evaluation.add(index, collection, node.row, [bound])
            if yield_timer.is_due():
                await yield_timer.pause()
        while not evaluation.run_in_process(yield_timer.is_due):
            await yield_timer.pause()
        await session.answer_questions(evaluation)
        return [bound in evaluation.hits(index) for index in range(len(nodes))]

    def _encoder(self, collection_name: str, view: View) -> RecordEncoder:
        def make() -> tuple[RecordEncoder, int]:
            collection = self.collections[collection_name]
            encoder = compile_encoder(collection, nulls=self._nulls, view=view)
            return encoder, max(len(view.fields or ""), _MIN_ENCODER_CHARACTERS)

        return self._encoders.get((collection_name, view), make)

    def _render_node(self, node: RecordNode, view: View, expand: bytes | None) -> bytes:
        encode = self._encoder(node.collection.name, view)
        return encode(node.row, node.junction_ids, expand)


def _encode(
    nodes: Sequence[RecordNode],
    encoders: Sequence[RecordEncoder],
    shows_email: Sequence[bool],
    renderer: ExpandRenderer | None,
) -> Iterator[bytes]:
    for node, is_shown in zip(nodes, shows_email, strict=True):
        expand = None if renderer is None else renderer.render(node)
        yield encoders[is_shown](node.row, node.junction_ids, expand)


async def _collect(records: Iterable[bytes], max_bytes: int) -> list[bytes]:
    """Return the records, which are encoded as they are taken, a few at a time."""
    collected: list[bytes] = []
    size, yield_timer = 0, YieldTimer()
    for record in records:
        collected.append(record)
        size += len(record)
        if size > max_bytes:
            raise ReadError("the answer is too large")
        if yield_timer.is_due():
            await yield_timer.pause()
    return collected


async def _run_in_pieces(steps: Iterator[None]) -> None:
    yield_timer = YieldTimer()
    for _ in steps:
        if yield_timer.is_due():
            await yield_timer.pause()


async def _fetch_rows(
    session: ReadSession,
    bound: BoundList,
    statement: str,
    more: Mapping[str, object],
    *,
    is_last: bool,
    max_characters: int | None = None,
) -> list[Row] | None:
    """Return a statement's rows; None if it fails."""
    texts = await session.fetch_texts_once(
        statement, {**bound.params, **more}, is_last=is_last, max_characters=max_characters
    )
    if texts is None:
        return None
    names = bound.column_names
    rows: list[Row] = []
    yield_timer = YieldTimer()
    for values in texts:
        rows.append(dict(zip(names, values, strict=True)))
        if yield_timer.is_due():
            await yield_timer.pause()
    return rows


def _list_body(items: list[bytes], page: ListParameters, total: int) -> bytes:
    pages = -1 if total < 0 else -(-total // page.per_page)
    end = b'],"page":%d,"perPage":%d,"totalItems":%d,"totalPages":%d}' % (
        page.page,
        page.per_page,
        total,
        pages,
    )
    # Joined at once: of an answer of the maximum size each copy takes some 20 ms.
    parts = items or [b""]
    parts[0] = b'{"items":[' + parts[0]
    parts[-1] += end
    return b",".join(parts)


def _require_rule(rule: str | None, request: RuleRequest) -> str:
    """Return the rule to ask, empty for superusers; refuse others if there is none."""
    if isinstance(request.principal, Superuser):
        return ""
    if rule is None:
        raise ReadError("the rule is for superusers only", code="read_locked")
    return rule


def _refuse_reserved_words(filter_text: str, sort_text: str, request: RuleRequest) -> None:
    if isinstance(request.principal, Superuser):
        return
    match reserved_word(filter_text, sort_text):
        case "@request.":
            raise ReadError("@request. in filter or sort", code="read_reserved_request")
        case "@collection.":
            raise ReadError("@collection. in filter or sort", code="read_reserved_collection")
        case _:
            pass


def _unknown_record() -> ReadError:
    return ReadError("there is no such record", code="record_unknown")
