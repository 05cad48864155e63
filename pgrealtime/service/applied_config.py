"""The configuration in force, and the collections built from it and the database's schema."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pgrealtime.catalog.model import Catalog, Table
from pgrealtime.catalog.record_ids import record_key
from pgrealtime.changes import TableName
from pgrealtime.collections.build import build_with_problems
from pgrealtime.collections.model import Collections
from pgrealtime.collections.streamed_tables import (
    collection_name_of,
    streamed_collections,
    streamed_tables,
)
from pgrealtime.config.model import CollectionLoginConfig, Config
from pgrealtime.errors import ConfigProblem
from pgrealtime.feed.base import WantedTables
from pgrealtime.rules.rule_set import rule_problems


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedConfig:
    """A configuration together with the collections built from it. A reload makes another."""

    config: Config
    collections: Collections
    """Collections that the schema doesn't fit are locked; without table or key, left out."""
    problems: tuple[ConfigProblem, ...] = ()
    """Why collections are locked or left out."""

    @property
    def streamed_collections(self) -> Collections:
        """The collections whose changes are streamed."""
        return streamed_collections(self.collections, self.problems)

    @property
    def locked_tables(self) -> set[TableName]:
        """The tables of locked collections: no subscriber receives their events."""
        locked = {collection_name_of(problem) for problem in self.problems}
        return {c.table.name for c in self.collections.values() if c.name in locked}

    @property
    def streamed_tables(self) -> Mapping[TableName, Table]:
        """The tables that the stream carries."""
        return streamed_tables(self.collections, self.problems)

    @property
    def wanted_tables(self) -> WantedTables:
        """What the stream is to carry."""
        keys = {c.table.name: record_key(c.key) for c in self.streamed_collections.values()}
        return WantedTables(tables=self.streamed_tables, record_keys=keys)

    @property
    def logins(self) -> Mapping[str, CollectionLoginConfig]:
        """The login settings, by collection name."""
        return {name: collection.login for name, collection in self.config.collections.items()}


def fit_to_schema(config: Config, catalog: Catalog) -> AppliedConfig:
    """Return the collections of a configuration for a schema that it may no longer fit.

    A collection with a problem, of its table or of a rule, is locked: what can't be decided is
    denied. The other collections stay as they are.
    """
    collections, problems = build_with_problems(
        config.collections,
        catalog,
        config.auth.claim_names,
        is_strict=config.records.hidden == "strict",
    )
    problems = (*problems, *rule_problems(collections))
    with_problem = {collection_name_of(problem) for problem in problems}
    locked = tuple(
        replace(c, list_rule=None, view_rule=None, manage_rule=None)
        if c.name in with_problem
        else c
        for c in collections.values()
    )
    return AppliedConfig(
        config=config, collections=collections.replace_all(locked), problems=problems
    )
