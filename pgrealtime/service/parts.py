"""The parts of the running service; ``build`` makes, ``reload`` updates, ``status`` reads them."""

from dataclasses import dataclass

from pgrealtime.api.call_router import CallRouter
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.auth.login import LoginService
from pgrealtime.changelog.memory import Changelog
from pgrealtime.feed.base import Feed
from pgrealtime.hub.hub import Hub
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.reads.admission import Admission
from pgrealtime.reads.own_record import OwnRecordRenderer
from pgrealtime.reads.reader import RecordReader
from pgrealtime.rule_queries.executor import QueryExecutor


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceParts:
    """The parts that live as long as the service."""

    pool: QueryPool
    executor: QueryExecutor
    changelog: Changelog
    feed: Feed
    hub: Hub
    authenticator: Authenticator
    calls: CallRouter
    login_service: LoginService
    admission: Admission
    own_records: OwnRecordRenderer
    reads_pool: QueryPool | None = None
    record_reader: RecordReader | None = None
    """None if reads are off."""

    @property
    def query_pools(self) -> tuple[QueryPool, ...]:
        """The pools of read-only connections."""
        return (self.pool,) if self.reads_pool is None else (self.pool, self.reads_pool)
