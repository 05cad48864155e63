"""The configuration in force and the collections that it and the schema make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pgrealtime.catalog.model import Catalog, Table
from pgrealtime.changes import TableName
from pgrealtime.collections.build import build_with_problems
from pgrealtime.collections.model import Collections
from pgrealtime.collections.streamed_tables import (
    collection_name_of,
    readable_collections,
    streamed_tables,
)
from pgrealtime.config.model import Config
from pgrealtime.errors import ConfigProblem
from pgrealtime.rules.rule_set import rule_problems


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedConfig:
    """What is in force: what was configured, and what it makes of the schema."""

    config: Config
    collections: Collections
    """Those that the schema doesn't fit are locked, or left out if there is nothing to show."""
    problems: tuple[ConfigProblem, ...] = ()
    """What doesn't fit."""

    @property
    def readable_collections(self) -> Collections:
        """The collections whose changes can be read."""
        return readable_collections(self.collections, self.problems)

    @property
    def locked_tables(self) -> set[TableName]:
        """The tables of collections that the schema doesn't fit: nobody hears of their rows."""
        faulty = {collection_name_of(fault) for fault in self.problems}
        return {one.table.name for one in self.collections.values() if one.name in faulty}

    @property
    def streamed_tables(self) -> Mapping[TableName, Table]:
        """The tables whose changes are read."""
        return streamed_tables(self.collections, self.problems)


def fit_to_schema(config: Config, catalog: Catalog) -> AppliedConfig:
    """Return what a configuration that was fine makes of a schema that changed since.

    A collection that the schema doesn't fit any more, or whose rules don't, is locked: whatever
    can't be decided is denied. The others go on.
    """
    collections, problems = build_with_problems(config.collections, catalog)
    faults = (*problems, *rule_problems(collections))
    faulty = {collection_name_of(fault) for fault in faults}
    locked = (
        replace(one, list_rule=None, view_rule=None, manage_rule=None)
        if one.name in faulty
        else one
        for one in collections.values()
    )
    return AppliedConfig(
        config=config,
        collections=Collections(tuple(locked), server_encoding=collections.server_encoding),
        problems=faults,
    )
