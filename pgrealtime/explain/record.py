"""Finds the record that an event or a read is explained for, in its collection and in the table.

``explain`` explains events with it, ``read`` lists and views: each adds what decides there.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from pgrealtime.auth.principal import Caller, Superuser
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections, unpadded_id
from pgrealtime.explain import text
from pgrealtime.explain.parts import PartsExplainer
from pgrealtime.explain.session import ExplainSession
from pgrealtime.protocol.topic import Topic
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.spelling import nearest_name


class RecordExplainer(ABC):
    """Explains what becomes of one record, for one caller and one topic, in lines.

    A read has a topic too: its collection, the record of a view, and its query as options.
    """

    label: ClassVar[str]
    """Of the lines about the topic."""
    topic_noun: ClassVar[str]
    rule_context: ClassVar[str]
    """What rules read as ``@request.context``."""
    outcome = ""
    """What the caller receives, behind the verdict; may be empty."""

    def __init__(
        self,
        session: ExplainSession,
        collections: Collections,
        caller: Caller,
        topic: Topic,
        lines: list[str],
        *,
        with_sql: bool,
    ) -> None:
        self._session = session
        self._collections = collections
        self._caller = caller
        self._topic = topic
        self._lines = lines
        self._with_sql = with_sql
        self._is_superuser = isinstance(caller.principal, Superuser)
        self._request = RuleRequest(
            principal=caller.principal,
            query=topic.query,
            headers=topic.headers,
            context=self.rule_context,
        )
        self._parts = PartsExplainer(session, collections, self._request, lines)

    async def explain_record(self, record_id: str) -> str:
        """Return why the caller doesn't receive or find the record; empty if it does."""
        topic = self._topic
        collection = self._find_collection(topic.collection_name_or_id)
        if collection is None:
            return self._explain_no_collection()
        self._parts.add_lines(self.label, *text.topic_lines(topic, collection))
        if refusal := self._collection_refusal(collection):
            return refusal
        row = await self._find_row(collection, record_id)
        if row is None:
            return await self._explain_no_row(collection, record_id)
        found_id = unpadded_id(collection, row[collection.key.name] or "")
        if topic.record_id not in {None, found_id}:
            self._parts.add_lines("record", f"{collection.name}/{found_id}")
            return f'the {self.topic_noun} is for record "{topic.record_id}", not for "{found_id}"'
        return await self._explain_row(collection, row, record_id)

    def _explain_no_collection(self) -> str:
        name = self._topic.collection_name_or_id
        suggestion = nearest_name(name, self._collections)
        perhaps = f'; perhaps "{suggestion}"' if suggestion else ""
        lines, reason = self._no_collection(name)
        self._parts.add_lines(self.label, f'there is no collection "{name}"{perhaps}', *lines)
        return reason

    async def _explain_no_row(self, collection: Collection, record_id: str) -> str:
        """Return why the caller receives or finds nothing of a record that isn't there."""
        missing = f'there is no row whose {collection.key.name} is "{record_id}" now'
        self._parts.add_lines("record", missing)
        return f'"{collection.name}" has no record "{record_id}"'

    async def _find_row(self, collection: Collection, record_id: str) -> Row | None:
        """Return the row that is explained about."""
        return await self._session.fetch_row_by_id(collection, record_id)

    @abstractmethod
    def _find_collection(self, name_or_id: str) -> Collection | None:
        """Return the collection, found as the service finds it."""

    @abstractmethod
    def _no_collection(self, name: str) -> tuple[list[str], str]:
        """Return what it means that there is no such collection, in lines, and the reason."""

    def _collection_refusal(self, collection: Collection) -> str:
        """Return why no record of the collection is delivered or found, whatever the rules."""
        del collection
        return ""

    @abstractmethod
    async def _explain_row(self, collection: Collection, row: Row, record_id: str) -> str:
        """Return why the caller doesn't receive or find the row's record; empty if it does."""
