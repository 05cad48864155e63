"""Renders events as messages: each record once for all subscribers that receive the same bytes.

``compose`` asks for the message of an event and a render key. A renderer belongs to one generation
of collections, and makes the views and viewers of its subscriptions as well.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, TypeAlias

import structlog
from msgspec import Struct

from pgrealtime.auth.principal import Caller, Principal, Superuser
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import HiddenFieldsMode
from pgrealtime.expand.node import RecordNode
from pgrealtime.expand.plan import ExpandCompiler, ExpandViewer
from pgrealtime.hub.connections.connection import Group, Subscription
from pgrealtime.hub.connections.group import RenderKey
from pgrealtime.hub.delivery.enrichment import Enrichment
from pgrealtime.hub.events.event import Event
from pgrealtime.protocol.frame import event_tail
from pgrealtime.records.encode import RecordEncoder, View, compile_encoder, unencodable_column
from pgrealtime.records.fields import parse_fields
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.request import RuleRequest

log = structlog.get_logger(__name__)

_MAX_ENCODERS = 1024
_PLAIN_VIEW = View()
_ViewKey: TypeAlias = tuple[
    str, Principal, Mapping[str, str], Mapping[str, str], tuple[tuple[str, str | None], ...]
]
"""Collection, principal, query, headers, columns of the caller's row."""
_SubscriptionView: TypeAlias = tuple[View, ExpandViewer | None, BoundPredicate | None]
"""View, viewer and manage rule."""
_NO_IDS: Mapping[str, Sequence[str]] = MappingProxyType({})


def _make_view(fields: str | None, is_superuser: bool) -> View:  # noqa: FBT001 (a cached function)
    return View(sees_hidden=is_superuser, sees_email=is_superuser, fields=fields)


class EventRendering(Struct):
    """One event that is being rendered, with the records made so far."""

    event: Event
    event_index: int
    enrichment: Enrichment
    rendered_records: dict[tuple[View, ExpandViewer | None], bytes] = {}
    live_row_rendering: EventRendering | None = None
    """The same event with the columns of a live row."""
    live_row_groups: Container[Group] = ()
    """The groups that see it so."""
    live_junction_ids: Mapping[str, Sequence[str]] | None = None
    """Replace the event's own ids from junction tables; None if those are known."""


def event_rendering(event: Event, event_index: int, enrichment: Enrichment) -> EventRendering:
    """Return the event ready to be rendered, with its live row event if it has one."""
    rendering = EventRendering(event, event_index, enrichment)
    if enrichment.live_row_events and (live := enrichment.live_row_events.get(event_index)):
        rendering.live_row_groups = live.groups
        rendering.live_row_rendering = EventRendering(
            live.event, event_index, enrichment, live_junction_ids=live.live_junction_ids
        )
    return rendering


class RecordRenderer:
    """Renders the records of one generation's collections."""

    def __init__(
        self,
        collections: Collections,
        compiler: RuleCompiler,
        *,
        nulls: Literal["null", "zero"],
        hidden: HiddenFieldsMode = "strict",
        on_schema_mismatch: Callable[[], None],
    ) -> None:
        self._collections = collections
        self._compiler = compiler
        self._nulls: Literal["null", "zero"] = nulls
        self._on_schema_mismatch = on_schema_mismatch
        self.expand_compiler = ExpandCompiler(collections, compiler, hidden=hidden)
        # Views hold what clients wrote as ``fields``: unbounded, they could fill the memory.
        self._encoder = lru_cache(maxsize=_MAX_ENCODERS)(self._make_encoder)
        # Equal views are one object: those of a group are compared with each subscription's.
        self._view = lru_cache(maxsize=_MAX_ENCODERS)(_make_view)
        self._last_set: tuple[_ViewKey, _SubscriptionView] | None = None

    def set_subscription_view(
        self, subscription: Subscription, collection: Collection, caller: Caller
    ) -> None:
        """Set view, viewer and manage rule; raises ``RuleError`` for an invalid manage rule."""
        topic = subscription.topic
        # The last result is kept: the topics of one call mostly differ in the record alone.
        key = (collection.name, caller.principal, topic.query, topic.headers, caller.row_values)
        if self._last_set is not None and self._last_set[0] == key:
            subscription.set_view(*self._last_set[1])
            return
        request = RuleRequest(principal=caller.principal, query=topic.query, headers=topic.headers)
        is_superuser, own_row = isinstance(caller.principal, Superuser), caller.own_row
        fields = request.query.get("fields")
        if subscription.mirror is not None and fields and parse_fields(fields):
            fields += ",id"  # by which its client sets and drops rows
        view = self._view(fields, is_superuser)
        expand_viewer = manage_rule = None
        # If the manage rule can't be compiled, the view alone is set and nothing is expanded.
        subscription.set_view(view)
        if "expand" in request.query:
            expand_viewer = self.expand_compiler.compile_expand(collection, request, own_row)
        if collection.manage_rule is not None and not is_superuser:
            bound = self._compiler.bind_caller(collection, collection.manage_rule, request, own_row)
            manage_rule = bound if isinstance(bound, BoundPredicate) else None
        subscription.set_view(view, expand_viewer, manage_rule)
        self._last_set = key, (view, expand_viewer, manage_rule)

    def render_message(
        self, rendering: EventRendering, render_key: RenderKey, *, is_own_record: bool = False
    ) -> bytes:
        """Return the message's bytes after the id; empty if the row can't be encoded.

        A subscriber whose own record it is sees its e-mail address.
        """
        topic, view, viewer, manage_predicate = render_key
        if rendering.event.is_departure:
            view, viewer = _PLAIN_VIEW, None  # whose row has the id alone
        elif is_own_record or (
            manage_predicate is not None
            and manage_predicate
            in rendering.enrichment.manage_evaluation.hits(rendering.event_index)
        ):
            view = View(sees_hidden=view.sees_hidden, sees_email=True, fields=view.fields)
        record = rendering.rendered_records.get((view, viewer))
        if record is None:
            record = rendering.rendered_records[view, viewer] = self._render_record(
                rendering, view, viewer
            )
        return event_tail(topic, record, rendering.event.action) if record else b""

    def _render_record(
        self, rendering: EventRendering, view: View, viewer: ExpandViewer | None
    ) -> bytes:
        event, related = rendering.event, rendering.enrichment.related_records
        ids, index, name = rendering.live_junction_ids, rendering.event_index, event.collection.name
        if ids is None:
            ids = related.junction_ids.get(index, _NO_IDS)
        expand = None if viewer is None else related.expand_json.get((index, viewer))
        try:
            return self._encoder(name, view)(event.row, ids, expand)
        except Exception as error:  # noqa: BLE001 (a row that can't be encoded is lost alone)
            # A value that isn't of the type that the catalogue gave the column when it was read.
            column = unencodable_column(event.collection, event.row, nulls=self._nulls)
            kind = type(error).__name__
            log.error("record.failed", collection=name, column=column or None, error=kind)  # noqa: TRY400 (a traceback may show the row)
            self._on_schema_mismatch()
            return b""

    def render_node(self, node: RecordNode, view: View, expand: bytes | None) -> bytes:
        """Return the JSON of a related record, with its own related records."""
        return self._encoder(node.collection.name, view)(node.row, node.junction_ids, expand)

    def _make_encoder(self, collection_name: str, view: View) -> RecordEncoder:
        return compile_encoder(self._collections[collection_name], nulls=self._nulls, view=view)
