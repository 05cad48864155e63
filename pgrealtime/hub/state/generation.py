"""The collections in force with their groups, evaluator and renderer; a reload makes the next.

The dispatcher and catching up evaluate and render by it; subscribe calls bind topics by it.
"""

import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal

import structlog

from pgrealtime.auth.principal import AuthRecord, Caller, Guest
from pgrealtime.changelog.row_history import RowHistory
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import HiddenFieldsMode
from pgrealtime.errors import RuleError
from pgrealtime.expand.plan import ExpandViewer
from pgrealtime.fairness import FairLock
from pgrealtime.hub.connections.connection import MirrorState, Subscription
from pgrealtime.hub.delivery.enrichment import SliceEnricher
from pgrealtime.hub.delivery.render import RecordRenderer
from pgrealtime.hub.evaluation.evaluator import SliceEvaluator
from pgrealtime.hub.evaluation.filter_limits import FILTER_CHARACTERS_PER_CONNECTION
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.evaluation.toast import RowCompleter
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.events.row_shapes import ShapeChecker, TableDefinitions
from pgrealtime.protocol.topic import Topic, parse_topic
from pgrealtime.rule_queries.executor import QueryExecutor
from pgrealtime.rules.language.request import RuleRequest

log = structlog.get_logger(__name__)

_FEW_TOPICS = 100
"""Topics that are parsed at once if nothing is to be compiled: half a microsecond each."""
_FEW_FILTERS = 8
"""Of these, those with options. The compiler keeps more than ``_MAX_COMPILED_TOPICS`` filters of
``_MAX_COMPILED_TEXT``; should one be gone, to compile it takes half a millisecond."""
_SHORT_FILTER = re.compile(r"[^.(]{1,64}")
"""One that reads neither other rows nor functions: it is compiled in a tenth of a millisecond, and
to wait for the lock and its pause takes as long."""
_MAX_COMPILED_TOPICS = 200
_MAX_COMPILED_TEXT = 500


class Generation:
    """Collections, and what binds, evaluates and renders by them."""

    def __init__(
        self,
        executor: QueryExecutor,
        collections: Collections,
        *,
        nulls: Literal["null", "zero"],
        hidden_fields: HiddenFieldsMode,
        on_schema_mismatch: Callable[[], None],
        row_history: RowHistory,
        incomplete_records: Counter[str],
    ) -> None:
        self.collections = collections
        self.matcher = matcher = Matcher(collections)
        self.row_history = row_history
        self.shape_checker = ShapeChecker(collections, time.monotonic)
        self.catalog_assumptions = TableDefinitions(collections)
        self.renderer = RecordRenderer(
            collections,
            matcher.compiler,
            nulls=nulls,
            hidden=hidden_fields,
            on_schema_mismatch=on_schema_mismatch,
        )
        self.evaluator = SliceEvaluator(
            executor, matcher, RowCompleter(executor.fetch_live_rows, row_history)
        )
        self.enricher = SliceEnricher(
            executor,
            collections,
            matcher,
            self.renderer.render_node,
            row_history=row_history,
            omitted_column_counts=incomplete_records,
        )
        self.subscription_counts: Counter[str] = Counter()
        """Subscriptions in groups, by collection."""
        self._compiled_topics: OrderedDict[tuple[str, str], Topic] = OrderedDict()
        """Topics with options that were compiled last, by text and kind of caller."""
        self._on_schema_mismatch = on_schema_mismatch
        self._reported_rule_errors: set[tuple[str, str]] = set()

    def report_unknown_columns(self, events: Sequence[Event]) -> None:
        """Report a schema mismatch if a row has a column that its collection does not know."""
        # One that is gone is noticed where rows are evaluated.
        if any(len(event.row) > len(event.collection.column_names) for event in events):
            self._on_schema_mismatch()

    async def parse_topics(
        self, topic_texts: Sequence[str], caller: Caller, work_lock: FairLock, network: str
    ) -> dict[str, Topic]:
        """Return the topics by their text, with filters and expands compiled and cached.

        Yields the loop in between, and works for one call at a time: a call may bring a thousand
        topics that take 2 ms each, and there may be many calls.
        """
        if (known := self._known_topics(topic_texts, caller)) is not None:
            return known
        topics: dict[str, Topic] = {}
        left = FILTER_CHARACTERS_PER_CONNECTION
        rest = iter(topic_texts)
        while len(topics) < len(topic_texts):
            async with work_lock.acquire_for_loop_work(network) as yield_timer:
                for name in rest:
                    topic = topics[name] = parse_topic(name)
                    # What is too long is refused when it is bound: it isn't compiled first.
                    left -= len(topic.query.get("filter", ""))
                    self._precompile(topic, caller, may_compile_filter=left >= 0)
                    if topic.query and left >= 0:
                        self._remember_compiled(topic, caller)
                    if yield_timer.is_due():
                        break
        return topics

    def _known_topics(self, topic_texts: Sequence[str], caller: Caller) -> dict[str, Topic] | None:
        """Return the topics by text if there are few and all are compiled, or soon; else None."""
        if len(topic_texts) > _FEW_TOPICS:
            return None
        topics: dict[str, Topic] = {}
        with_options_count = 0
        for text in topic_texts:
            if "?" not in text:
                topics[text] = parse_topic(text)
                continue
            with_options_count += 1
            topic = self._compiled_topics.get((text, _kind_of(caller)))
            if topic is None and len(text) <= _MAX_COMPILED_TEXT:
                topic = parse_topic(text)
                if not _is_compiled_soon(topic):
                    return None
                self._remember_compiled(topic, caller)
            if topic is None or with_options_count > _FEW_FILTERS:
                return None
            topics[text] = topic
        return topics

    def _remember_compiled(self, topic: Topic, caller: Caller) -> None:
        # What an expand shows is compiled for each caller.
        if "expand" in topic.query or len(topic.text) > _MAX_COMPILED_TEXT:
            return
        self._compiled_topics[topic.text, _kind_of(caller)] = topic
        if len(self._compiled_topics) > _MAX_COMPILED_TOPICS:
            self._compiled_topics.popitem(last=False)

    def _precompile(self, topic: Topic, caller: Caller, *, may_compile_filter: bool) -> None:
        """Compile what ``bind_subscription`` will need; an invalid rule is its to report."""
        collection = self.collections.find_streamed(topic.collection_name_or_id)
        if "expand" in topic.query:
            self.compile_expand_viewer(topic, caller)
        if collection is not None and "filter" in topic.query and may_compile_filter:
            with suppress(RuleError):
                self.matcher.bind_topic(collection, topic, caller.principal, caller.own_row)

    def bind_subscription(self, subscription: Subscription, caller: Caller) -> str:
        """Put a subscription into the group of its topic, caller and view.

        Returns why no event can match it, or ``""``. Raises ``SubscriptionLimitError`` if the
        connection or address has too many of the kind; it is in no group then.
        """
        topic = subscription.topic
        collection = self.collections.find_streamed(topic.collection_name_or_id)
        subscription.set_mirror(_mirror_state(subscription, collection))
        if collection is None:
            subscription.set_own_record("")
            is_ours = topic.collection_name_or_id.startswith("PB_")
            return "" if is_ours else "there is no such collection"
        principal = caller.principal
        own_id = ""
        if isinstance(principal, AuthRecord) and principal.collection_id == collection.id:
            own_id = principal.id
        subscription.set_own_record(own_id)
        try:
            self.renderer.set_subscription_view(subscription, collection, caller)
            reason = self.matcher.add(subscription, principal, caller.own_row)
        except RuleError as error:
            self._report_rule_error(topic.collection_name_or_id, error)
            return error.message
        if subscription.group is not None:
            self.enricher.expanding_count += subscription.expand_viewer is not None
            self.subscription_counts[collection.name] += 1
        return reason

    def mirror_basis(self, subscription: Subscription, caller: Caller) -> tuple[object, ...]:
        """Return what decides which rows a mirror shows and how, equal to another generation's."""
        topic, group = subscription.topic, subscription.group
        collection = self.collections.find_streamed(topic.collection_name_or_id)
        if collection is None:
            return ()
        rule = collection.list_rule if topic.record_id is None else collection.view_rule
        reads_others = group is not None and group.specialization.reads_other_rows
        others = tuple(self.collections.values()) if reads_others else ()
        # Its filter is the topic's own.
        return rule, collection.table, collection.fields, others, caller.principal, caller.own_row

    def compile_expand_viewer(self, topic: Topic, caller: Caller) -> ExpandViewer | None:
        """Return the viewer of related records for a topic and caller; None without ``expand``."""
        collection = self.collections.find_streamed(topic.collection_name_or_id)
        if collection is None:
            return None
        return self.renderer.expand_compiler.compile_expand(
            collection, _rule_request(topic, caller), caller.own_row
        )

    def unbind_subscription(self, subscription: Subscription) -> None:
        """Take a subscription out of the group that ``bind_subscription`` put it in, if any."""
        if subscription.group is not None:
            self.enricher.expanding_count -= subscription.expand_viewer is not None
            self.subscription_counts[subscription.group.specialization.collection.name] -= 1
            self.matcher.remove(subscription)

    def _report_rule_error(self, collection: str, error: RuleError) -> None:
        # Once: a thousand clients may subscribe to the collection.
        if (collection, error.message) not in self._reported_rule_errors:
            self._reported_rule_errors.add((collection, error.message))
            log.error("rule.error", collection=collection, reason=error.message)


def _kind_of(caller: Caller) -> str:
    """Return what a filter is compiled for: a collection's records, guests or superusers."""
    principal = caller.principal
    if isinstance(principal, AuthRecord):
        return principal.collection_name
    return "" if isinstance(principal, Guest) else "*"  # no collection's name


def _is_compiled_soon(topic: Topic) -> bool:
    filter_text = topic.query.get("filter", "")
    return "expand" not in topic.query and bool(_SHORT_FILTER.fullmatch(filter_text))


def _mirror_state(subscription: Subscription, collection: Collection | None) -> MirrorState | None:
    """Return what a topic has as a mirror, known or new; None if it is none."""
    asks = subscription.topic.asks_for_mirror
    if collection is None or not collection.is_mirrored(asks=asks):
        return None
    return subscription.mirror or MirrorState(is_told=asks)


def _rule_request(topic: Topic, caller: Caller) -> RuleRequest:
    return RuleRequest(principal=caller.principal, query=topic.query, headers=topic.headers)
