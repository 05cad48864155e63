"""What topics mean, and to whom, by the collections in force; a reload brings another meaning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal

import structlog

from pgrealtime.auth.principal import AuthRecord, Caller
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import HiddenFields
from pgrealtime.errors import RuleError
from pgrealtime.expand.plan import Viewer
from pgrealtime.hub.connections.connection import Subscription
from pgrealtime.hub.delivery.render import Display
from pgrealtime.hub.evaluation.evaluator import Asking, Judge
from pgrealtime.hub.evaluation.matcher import FILTERS_PER_CONNECTION, Matcher
from pgrealtime.hub.live_reads.row_history import RowHistory
from pgrealtime.hub.live_reads.table_definitions import Definitions
from pgrealtime.hub.live_reads.table_shapes import Shapes
from pgrealtime.hub.live_reads.toast import Completion
from pgrealtime.protocol.topic import Topic, parse_topic
from pgrealtime.rules.language.request import Request
from pgrealtime.turns import TurnQueue

log = structlog.get_logger(__name__)


class Meaning:
    """Puts subscriptions into the groups that they are judged with.

    Args:
        probe: Asks Postgres.
        collections: What there is.
        matcher: For them, without any subscription.
        nulls: How NULL is shown.
        hidden: Who may expand a hidden relation.
        on_doubt: Told when a row doesn't fit what the catalogue says of its table.
        history: Knows what was done to rows later.
        left_out: Counts records that were shown to somebody without a column, by collection.

    Attributes:
        display: Shows events by the same collections.
        judge: Judges them.
        shapes: Knows whether rows are what the collections are made for.
        definitions: Knows what of that must be asked.
        subscriptions: How many are in a group, by collection.
    """

    def __init__(
        self,
        probe: Asking,
        collections: Collections,
        matcher: Matcher,
        *,
        nulls: Literal["null", "zero"],
        hidden: HiddenFields = "strict",
        on_doubt: Callable[[], None],
        history: RowHistory,
        left_out: Counter[str],
    ) -> None:
        self.collections = collections
        self.matcher = matcher
        self.shapes = Shapes(collections)
        self.definitions = Definitions(collections)
        self.display = Display(
            probe,
            collections,
            matcher.planner,
            nulls=nulls,
            hidden=hidden,
            on_doubt=on_doubt,
            history=history,
        )
        completion = Completion(probe, history)
        self.judge = Judge(probe, matcher, self.display, completion, left_out)
        self.subscriptions: Counter[str] = Counter()
        self._reported: set[tuple[str, str]] = set()

    async def read(
        self, names: Sequence[str], caller: Caller, calls: TurnQueue, network: str
    ) -> dict[str, Topic]:
        """Return the topics, what they ask for compiled for ``give``.

        In turns with the loop's other users, of which another call is none: one call may bring a
        thousand topics that take 2 ms each, and there may be many calls.

        Args:
            names: As submitted.
            caller: Who calls.
            calls: Those that are being read.
            network: Whose call it is.
        """
        topics: dict[str, Topic] = {}
        left = FILTERS_PER_CONNECTION
        rest = iter(names)
        while len(topics) < len(names):
            async with calls.work(network) as turn:
                for name in rest:
                    topic = topics[name] = parse_topic(name)
                    left -= len(topic.query.get("filter", ""))
                    self._prepare(topic, caller, is_compiled=left >= 0)
                    if turn.is_over():
                        break
        return topics

    def _prepare(self, topic: Topic, caller: Caller, *, is_compiled: bool) -> None:
        """Have ready what ``give`` asks for."""
        collection = self.collections.find(topic.collection)
        if collection is None:
            return
        if "expand" in topic.query:
            self.display.viewer(collection, _request(topic, caller), caller.own_row)
        if "filter" in topic.query and is_compiled:
            self._compile(collection, topic, caller)

    def _compile(self, collection: Collection, topic: Topic, caller: Caller) -> None:
        with suppress(RuleError):
            self.matcher.bind(collection, topic, caller.principal, caller.own_row)

    def give(self, subscription: Subscription, caller: Caller) -> str:
        """Give a subscription that is in no group what its topic means to the caller now.

        Returns:
            Why nothing can match, or ``""``.

        Raises:
            SubscriptionLimitError: It is one too many; it is in no group then.
        """
        topic = subscription.topic
        subscription.own_id = ""
        collection = self.collections.find(topic.collection)
        if collection is None:
            is_ours = topic.collection.startswith("PB_")
            return "" if is_ours else "there is no such collection"
        principal = caller.principal
        if isinstance(principal, AuthRecord) and principal.collection_id == collection.id:
            subscription.own_id = principal.id
        try:
            own = caller.own_row
            self.display.view(subscription, collection, _request(topic, caller), own)
            reason = self.matcher.add(subscription, principal, own)
        except RuleError as error:
            self._report(topic.collection, error)
            return error.message
        if subscription.group is not None:
            self.display.expanding += subscription.viewer is not None
            self.subscriptions[collection.name] += 1
        return reason

    def viewer(self, topic: Topic, caller: Caller) -> Viewer | None:
        """Return who a caller with that topic is to related records; None if it wants none."""
        collection = self.collections.find(topic.collection)
        if collection is None:
            return None
        return self.display.viewer(collection, _request(topic, caller), caller.own_row)

    def take(self, subscription: Subscription) -> None:
        """Take a subscription out of the group that ``give`` put it in, if any."""
        if subscription.group is not None:
            self.display.expanding -= subscription.viewer is not None
            self.subscriptions[subscription.group.variant.collection.name] -= 1
            self.matcher.remove(subscription)

    def _report(self, collection: str, error: RuleError) -> None:
        """Say once that a collection's rule denies everybody."""
        if (collection, error.message) not in self._reported:
            self._reported.add((collection, error.message))
            log.error("rule.error", collection=collection, reason=error.message)


def _request(topic: Topic, caller: Caller) -> Request:
    return Request(principal=caller.principal, query=topic.query, headers=topic.headers)
