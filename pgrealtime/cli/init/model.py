"""Drafts of collections, which ``init`` derives from tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pgrealtime.catalog.model import Catalog, Table
from pgrealtime.changes import TableName
from pgrealtime.config.model import CollectionConfig, RelationConfig


@dataclass(frozen=True, slots=True)
class TableFault:
    """Why a table can't be served as it is, and how to fix it."""

    reason: str
    """Lower case, no full stop."""
    fix: str = ""
    """SQL, or a sentence; empty if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionDraft:
    """The draft of one collection."""

    name: str
    table: Table
    key_name: str
    """The column shown as id, or to be added for it."""
    config: CollectionConfig
    """Without rules."""
    faults: tuple[TableFault, ...] = ()
    """Each of them keeps it from being served."""
    lacks_identity: bool = False
    """Whether there are passwords, but no unique column to log in with."""
    guessed_relations: Mapping[str, RelationConfig] = field(default_factory=dict)
    """Relations that only the columns' names indicate."""
    suggested_rule: str = ""
    """For ``list_rule`` and ``view_rule``; empty if it can't be served, or shouldn't be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigDraft:
    """The drafts of all collections of a schema."""

    drafts: tuple[CollectionDraft, ...]
    """Auth collections first, then in the order of schemas and names."""
    omitted: Mapping[TableName, str]
    """Tables and views that become no collection -> the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaSurvey:
    """The tables of the schemas, and what the role may do with them."""

    catalog: Catalog
    extensions: Mapping[TableName, str]
    """Extension of each table that belongs to one."""
    row_estimates: Mapping[TableName, int]
    """By PostgreSQL's statistics; none for a table that was never analyzed."""
    unreadable: Mapping[TableName, TableFault]
    """Tables that the role may not read, or not in full."""
