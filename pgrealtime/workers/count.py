"""How many processes serve the port, and what each gets of what is configured for all."""

import os

import structlog

from pgrealtime.config.model import AdminConfig, Config
from pgrealtime.errors import SetupError

log = structlog.get_logger(__name__)

MIN_POOL_SIZE = 2
"""Connections of a worker's query pool: the dispatcher needs one that nobody else holds."""


def count_workers(config: Config) -> int:
    """Return the number of processes that serve the port; 1 is a process that is alone.

    ``auto`` takes no more than the connections to the database suffice for.

    Raises:
        SetupError: Code ``workers_exceed_connections``.
    """
    cores, affordable = len(os.sched_getaffinity(0)), config.database.pool_size // MIN_POOL_SIZE
    count = config.server.workers
    if count == "auto":
        return max(1, min(cores, affordable))
    if 1 < count > affordable:
        raise SetupError(
            f"database.pool_size is too small for {count} workers",
            detail=f"Each needs {MIN_POOL_SIZE} connections; there are {config.database.pool_size}"
            " for all.",
            hint=f"Set database.pool_size to {count * MIN_POOL_SIZE}, or server.workers to"
            f" {max(1, affordable)}.",
            code="workers_exceed_connections",
        )
    return count


def warn_of_few_cores(count: int) -> None:
    """Log a warning if there are more workers than cores."""
    if count > (cores := len(os.sched_getaffinity(0))):
        log.warning("workers.exceed_cores", workers=count, cores=cores)


def worker_config(config: Config, count: int) -> Config:
    """Return the configuration of each of so many workers."""
    database, reads = config.database, config.reads
    return config.model_copy(
        update={
            "database": database.model_copy(
                update={"pool_size": max(MIN_POOL_SIZE, database.pool_size // count)}
            ),
            "reads": reads.model_copy(update={"pool_size": max(1, reads.pool_size // count)}),
            "server": config.server.model_copy(update={"workers": 1}),
            "admin": AdminConfig(),
        }
    )
