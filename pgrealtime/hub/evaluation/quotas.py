"""Limits the subscriptions of one connection, and of one network.

The matcher checks these when it adds a subscription. Only subscriptions that the connection
submitted before count, so that the same topics are refused whether they are new or bound again
after a reload.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import takewhile

from pgrealtime.errors import SubscriptionLimitError
from pgrealtime.hub.connections.connection import Group, Subscription
from pgrealtime.protocol.topic import Topic
from pgrealtime.rules.engine.plan import Specialization

UNINDEXED_FILTERS_PER_CONNECTION = 50
"""Different filters that no index serves: each costs 2 us and more at each event."""
UNINDEXED_FILTERS_PER_ADDRESS = 1000
"""The same over all connections from one address (IPv6: one /64). Rules aren't counted: they are
the operator's, and all callers for whom a rule has the same values are one group."""
REMOTE_FILTERS_PER_CONNECTION = 50
"""Subscriptions whose filters ask PostgreSQL more than their rules do: each of those questions may
take the whole ``statement_timeout``."""
FILTER_CHARACTERS_PER_CONNECTION = 32 * 1024
"""Characters of the different filters. Compiling takes up to 50 ms per thousand, and all filters
are compiled anew when rules or the caller change."""
VIEWS_PER_CONNECTION = 100
"""Different combinations of ``fields`` and ``expand``: each is a record to render at each event,
which may take several milliseconds while all connections wait for the next event."""

_PLAIN_VIEW = ("", "")
"""The record as it is."""


def check_topic(subscription: Subscription) -> None:
    """Check what the topic's options alone decide, before its filter is compiled.

    Raises ``SubscriptionLimitError``: the connection has too many views or filter characters.
    """
    topic = subscription.topic
    if (
        _view_options(topic) != _PLAIN_VIEW
        and _other_views_before(subscription) >= VIEWS_PER_CONNECTION
    ):
        raise _limit_error(subscription, "views", VIEWS_PER_CONNECTION)
    if (
        "filter" in topic.query
        and _filter_characters_upto(subscription) > FILTER_CHARACTERS_PER_CONNECTION
    ):
        raise _limit_error(subscription, "filter_characters", FILTER_CHARACTERS_PER_CONNECTION)


def check_remote_filters(subscription: Subscription, specialization: Specialization) -> None:
    """Check the number of filters that ask PostgreSQL, once it is known whether this one does."""
    if (
        specialization.has_remote_filter
        and _remote_filters_before(subscription) >= REMOTE_FILTERS_PER_CONNECTION
    ):
        raise _limit_error(subscription, "asking_filters", REMOTE_FILTERS_PER_CONNECTION)


class UnindexedFilters:
    """Counts, by network, the groups whose filters no index serves."""

    def __init__(self) -> None:
        self._groups_by_network: dict[str, Counter[Group]] = {}

    def __bool__(self) -> bool:
        return bool(self._groups_by_network)

    def add(self, subscription: Subscription, group: Group) -> None:
        """Count a subscription of such a group, unless its connection or network has too many.

        Raises ``SubscriptionLimitError`` then.
        """
        connection_groups = {
            earlier.group
            for earlier in _submitted_before(subscription)
            if earlier.group and earlier.group.is_unindexed
        }
        if (
            group not in connection_groups
            and len(connection_groups) >= UNINDEXED_FILTERS_PER_CONNECTION
        ):
            raise _limit_error(subscription, "unindexed_filters", UNINDEXED_FILTERS_PER_CONNECTION)
        network_groups = self._groups_by_network.setdefault(
            subscription.connection.network, Counter()
        )
        if group not in network_groups and len(network_groups) >= UNINDEXED_FILTERS_PER_ADDRESS:
            raise _limit_error(
                subscription, "unindexed_filters_of_address", UNINDEXED_FILTERS_PER_ADDRESS
            )
        network_groups[group] += 1

    def remove(self, subscription: Subscription, group: Group) -> None:
        """Undo ``add``."""
        network = subscription.connection.network
        groups = self._groups_by_network[network]
        groups[group] -= 1
        if not groups[group]:
            del groups[group]
        if not groups:
            del self._groups_by_network[network]


def _limit_error(subscription: Subscription, limit: str, maximum: int) -> SubscriptionLimitError:
    topic = subscription.topic.text
    return SubscriptionLimitError(
        f"more than {maximum} {limit}", topic=topic, limit_name=limit, maximum=maximum
    )


def _submitted_before(subscription: Subscription) -> Iterator[Subscription]:
    subscriptions = subscription.connection.subscriptions.values()
    return takewhile(lambda earlier: earlier is not subscription, subscriptions)


def _remote_filters_before(subscription: Subscription) -> int:
    return sum(
        earlier.group is not None and earlier.group.specialization.has_remote_filter
        for earlier in _submitted_before(subscription)
    )


def _filter_characters_upto(subscription: Subscription) -> int:
    texts = {earlier.topic.query.get("filter", "") for earlier in _submitted_before(subscription)}
    texts.add(subscription.topic.query["filter"])
    return sum(map(len, texts))


def _other_views_before(subscription: Subscription) -> int:
    """Return how many other views than its own were submitted before the first of its own."""
    own, others = _view_options(subscription.topic), {_PLAIN_VIEW}
    for earlier in _submitted_before(subscription):
        view = _view_options(earlier.topic)
        if view == own or len(others) > VIEWS_PER_CONNECTION:
            break
        others.add(view)
    return len(others) - 1


def _view_options(topic: Topic) -> tuple[str, str]:
    return topic.query.get("fields", ""), topic.query.get("expand", "")
