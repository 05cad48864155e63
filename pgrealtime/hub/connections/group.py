"""Groups of subscriptions that are evaluated together, and their render groups, which share bytes.

``hub.evaluation.matcher`` puts subscriptions into groups; ``hub.delivery`` composes the messages of
each render group once.
"""

from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeAlias, TypeVar

from pgrealtime.expand.plan import ExpandViewer
from pgrealtime.hub.connections.output import MessageBatch
from pgrealtime.hub.events.event import Event
from pgrealtime.records.encode import View
from pgrealtime.rules.engine.plan import BoundPredicate

RenderKey: TypeAlias = tuple[bytes, View, ExpandViewer | None, BoundPredicate | None]
"""What decides the bytes of a subscription's messages, except those of its own record: the topic as
submitted, the view of records, the viewer of related records, and the manage rule."""


MANY_CONNECTIONS = 50
"""If so many LIVE connections share a filter or an expand, it is evaluated once for all of them,
also where that is slow: isolated, each of them would repeat the work."""


class GroupMember(Protocol):
    """The part of a subscription that groups use."""

    own_record_id: str

    @property
    def render_key(self) -> RenderKey:
        """See ``RenderKey``."""


MemberT = TypeVar("MemberT", bound=GroupMember)


class MemberRenderGroup(Generic[MemberT]):
    """Subscriptions of one group that receive the same bytes.

    A single subscription is stored without a dict: most render groups have only one.
    """

    __slots__ = ("_by_owner", "_subscriptions", "batch", "composed_in", "is_mirror", "render_key")

    def __init__(self, subscription: MemberT, *, is_mirror: bool) -> None:
        self.render_key = subscription.render_key
        self.is_mirror = is_mirror
        self.batch: MessageBatch | None = None
        """Their messages in the part of a slice being delivered; None between slices."""
        self.composed_in: object = None
        """The part that ``batch`` belongs to."""
        self._subscriptions: MemberT | dict[MemberT, None] = subscription
        self._by_owner: dict[str, dict[MemberT, None]] | None = None

    def __iter__(self) -> Iterator[MemberT]:
        if isinstance(self._subscriptions, dict):
            return iter(self._subscriptions)
        return iter((self._subscriptions,))

    def subscriptions_of_owner(self, record_id: str) -> Iterable[MemberT]:
        """Return the subscriptions whose caller the record is: they receive its e-mail address."""
        if self._by_owner is not None:
            return self._by_owner.get(record_id, ())
        return [subscription for subscription in self if subscription.own_record_id == record_id]

    def add(self, subscription: MemberT) -> None:
        """Add a subscription with the same render key."""
        if not isinstance(self._subscriptions, dict):
            first, self._subscriptions, self._by_owner = self._subscriptions, {}, {}
            self.add(first)
        self._subscriptions[subscription] = None
        if subscription.own_record_id and self._by_owner is not None:
            self._by_owner.setdefault(subscription.own_record_id, {})[subscription] = None

    def remove(self, subscription: MemberT) -> bool:
        """Remove a subscription; return whether it was the last one."""
        if not isinstance(self._subscriptions, dict):
            return True
        del self._subscriptions[subscription]
        if subscription.own_record_id and self._by_owner is not None:
            owners = self._by_owner[subscription.own_record_id]
            del owners[subscription]
            if not owners:
                del self._by_owner[subscription.own_record_id]
        return not self._subscriptions


class MemberGroup(Generic[MemberT]):
    """Subscriptions that always have the same verdict; a member of the index.

    ``record_id`` is that of a record topic; None for the whole collection. Mirrors are in groups of
    their own.
    """

    __slots__ = (
        "_render_groups",
        "is_mirror",
        "record_id",
        "shared_subscription_count",
        "specialization",
        "values",
    )

    def __init__(
        self, bound: BoundPredicate, record_id: str | None, *, is_mirror: bool = False
    ) -> None:
        self.specialization = bound.specialization
        self.values = bound.values
        self.record_id = record_id
        self.is_mirror = is_mirror
        """Whether its subscriptions are mirrors: evaluated before and after each change."""
        self.shared_subscription_count = 0
        """How many of its subscriptions are evaluated with those of other connections: those
        without a filter, and those whose connections aren't isolated. The index finds a group only
        if it has any."""
        self._render_groups: (
            MemberRenderGroup[MemberT] | dict[RenderKey, MemberRenderGroup[MemberT]] | None
        ) = None

    @property
    def is_unindexed(self) -> bool:
        """Whether its filter is evaluated for each change of the collection, without an index."""
        return self.record_id is None and self.specialization.has_unindexed_filter

    @property
    def render_groups(self) -> Iterable[MemberRenderGroup[MemberT]]:
        """Its subscriptions by render key."""
        match self._render_groups:
            case None:
                return ()
            case MemberRenderGroup() as only:
                return (only,)
            case several:
                return several.values()

    def add(self, subscription: MemberT) -> None:
        """Add a subscription."""
        key = subscription.render_key
        match self._render_groups:
            case None:
                self._render_groups = self._new_render_group(subscription)
            case MemberRenderGroup(render_key=only_key) as only if only_key == key:
                only.add(subscription)
            case MemberRenderGroup(render_key=only_key) as only:
                other = self._new_render_group(subscription)
                self._render_groups = {only_key: only, key: other}
            case several if key in several:
                several[key].add(subscription)
            case several:
                several[key] = self._new_render_group(subscription)

    def _new_render_group(self, subscription: MemberT) -> MemberRenderGroup[MemberT]:
        return MemberRenderGroup(subscription, is_mirror=self.is_mirror)

    def remove(self, subscription: MemberT) -> bool:
        """Remove a subscription; return whether it was the last one."""
        if isinstance(self._render_groups, dict):
            key = subscription.render_key
            if self._render_groups[key].remove(subscription):
                del self._render_groups[key]
            return not self._render_groups
        assert self._render_groups is not None
        return self._render_groups.remove(subscription)

    def covers(self, event: Event) -> bool:
        """Whether the event is of the topic's collection, and of its record if it names one."""
        return self.specialization.collection.name == event.collection.name and (
            self.record_id in {None, event.record_id}
        )


def has_same_predicate(
    one: MemberGroup[MemberT] | None, other: MemberGroup[MemberT] | None
) -> bool:
    """Whether two groups of one generation match the same rows; None matches no row."""
    if one is None or other is None:
        return one is other
    return (one.specialization, one.values) == (other.specialization, other.values)
