"""Chooses the feed of a process that reads a slot or follows a log."""

from collections.abc import Callable

from pgrealtime.config.model import Config
from pgrealtime.feed.base import Feed, WantedTables
from pgrealtime.feed.intake import Intake
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.service.local_feed import LocalFeed
from pgrealtime.service.published_tables import PublicationWatch
from pgrealtime.service.streams import StreamOpener


def make_feed(
    config: Config,
    intake: Intake,
    pool: QueryPool,
    wanted: WantedTables,
    *,
    tag: str,
    count_connections: Callable[[], int],
) -> Feed:
    """Return the feed that fills the intake; ``wanted`` are the first tables.

    A log's others see the process's ``tag`` and its connections.
    """
    streams = StreamOpener(config, pool)
    publication = PublicationWatch(pool, config.replication.publication)
    if not config.log.nats:
        return LocalFeed(streams, intake, publication, wanted)
    # The client library is an extra: loaded only where there is a log.
    from pgrealtime.service.log_feed import LogFeed  # noqa: PLC0415

    return LogFeed(
        config,
        streams,
        intake,
        publication,
        pool,
        wanted=wanted,
        tag=tag,
        count_connections=count_connections,
    )
