"""Reads the catalogue of the configured tables."""

import psycopg

from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Catalog
from pgrealtime.collections.names import configured_table_names
from pgrealtime.config.model import Config
from pgrealtime.errors import PgRealtimeError
from pgrealtime.observe.redact import message_without_values
from pgrealtime.postgres.pool import QueryPool


async def read_configured_catalog(config: Config, pool: QueryPool) -> Catalog:
    """Return the catalogue of the tables that the configuration may mean.

    Raises:
        PgRealtimeError: Code ``catalog``: PostgreSQL doesn't answer, or refuses.
    """
    names = configured_table_names(config.collections, config.database.schemas)
    try:
        async with pool.connection() as connection:
            return await read_catalog(connection, names=names)
    except psycopg.Error as error:
        raise PgRealtimeError(
            "the catalogue can't be read", detail=message_without_values(error), code="catalog"
        ) from error
