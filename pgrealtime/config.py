"""The configuration: one frozen model, read once, checked whole before anything opens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pgrealtime.units import parse_duration, parse_size

Seconds = Annotated[float, BeforeValidator(parse_duration)]
"""Written ``500ms``, ``25s``, ``5m``, ``1h``; held in seconds."""

Bytes = Annotated[int, BeforeValidator(parse_size)]
"""Written ``64KiB``, ``16MiB``; held in bytes."""


class Section(BaseModel):
    """A part of the configuration: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DatabaseConfig(Section):
    """The database whose changes are told."""

    url: str = ""
    """Direct connection with the REPLICATION right; empty takes libpq's PG* variables."""
    query_url: str = ""
    """Where rules are asked, if not at ``url``: same primary, may be a pooler."""
    schemas: tuple[str, ...] = ("public",)
    pool_size: int = Field(default=8, ge=1, le=1000)
    statement_timeout: Seconds = 2.0
    """Per rule query; running out of it denies."""
    wait_for: Seconds = 60.0
    """How long to wait at start for a server that doesn't answer yet."""


class SlotConfig(Section):
    """The replication slot; temporary, so that it can't outlive the process."""

    name: str = Field(default="pgrealtime", pattern=r"^[a-z0-9_]{1,48}$")
    """A random suffix is appended."""
    create_timeout: Seconds = 300.0
    """Creating waits for every open writing transaction of the cluster; longer than this fails."""


class ReplicationConfig(Section):
    """How the stream is read."""

    slot: SlotConfig = SlotConfig()
    max_pause: Seconds = 2.0
    """Held-up delivery pauses reading for so long; then the connection is given up: a gap."""


class ChangelogConfig(Section):
    """What a returning connection can be given."""

    max_age: Seconds = 300.0
    """0 turns resume off."""
    max_size: Bytes = 64 * 1024 * 1024
    """A transaction larger than this is a gap of its tables."""


class ServerConfig(Section):
    """The public port."""

    host: str = "0.0.0.0"  # noqa: S104 (a sidecar's port is meant to be reached)
    port: int = Field(default=8090, ge=0, le=65535)
    cors_origins: tuple[str, ...] = ("*",)
    shutdown_grace: Seconds = 25.0
    """At SIGTERM connections are ended in small groups, never taking longer than this."""


class RealtimeConfig(Section):
    """Limits of connections."""

    idle_timeout: Seconds = 300.0
    """Without a delivered event for so long a connection is ended, as PocketBase does."""
    max_lifetime: Seconds = 1800.0
    heartbeat: Seconds = 25.0
    """Keeps proxies from cutting; doesn't count as activity."""
    max_connections: int = Field(default=10_000, ge=1)
    send_buffer: Bytes = 1024 * 1024
    """Per connection; when full it reads on from the changelog instead."""
    stall_timeout: Seconds = 30.0
    """A connection that takes no byte for so long is ended."""
    same_address: bool = True
    """Whether the subscribe call must come from the connection's address."""


class RecordsConfig(Section):
    """How rows are shown."""

    nulls: Literal["null", "zero"] = "null"
    """``null``, or PocketBase's zero value of the field's type."""


class IssuerConfig(Section):
    """Who else makes tokens that count."""

    name: str
    algorithms: tuple[Literal["HS256"], ...] = ("HS256",)
    secret: str
    previous_secret: str = ""
    """Still accepted; for changing the secret without signing everybody out."""
    issuer: str = ""
    audience: str = ""
    leeway: Seconds = 0.0
    id_claim: str = "sub"
    collection: str = "users"
    """The auth collection whose record the id names."""
    superuser_when: dict[str, str | int | bool] = Field(default_factory=dict)
    """Claims, all of which must be equal, that make a superuser."""


class AuthConfig(Section):
    """Who is asking."""

    issuers: tuple[IssuerConfig, ...] = ()


class FieldsConfig(Section):
    """Which columns become fields, and how."""

    include: tuple[str, ...] = ("*",)
    """What is left out here is in no record and no rule."""
    hide: tuple[str, ...] = ()
    """PocketBase's hidden: shown to superusers only; not usable in client filters."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Column to field name."""
    types: dict[str, str] = Field(default_factory=dict)
    """Field to PocketBase type, where the column's type doesn't say it: ``geoPoint``, ``file``."""


class RelationConfig(Section):
    """A relation that no foreign key tells of."""

    collection: str
    """Name of the collection pointed to."""
    through: str = ""
    """Junction table, as ``schema.table``; empty if a column holds the id or the array of ids."""
    source: str = ""
    """In the junction table: the column naming this collection's record."""
    target: str = ""
    """In the junction table: the column naming the related record."""


class CollectionConfig(Section):
    """A table, shown as a collection."""

    table: str
    type: Literal["base", "auth"] = "base"
    id: str = ""
    """The column shown as id; empty is the primary key."""
    collection_id: str = ""
    """Empty derives it from type and name as PocketBase does."""
    fields: FieldsConfig = FieldsConfig()
    relations: dict[str, RelationConfig] = Field(default_factory=dict)
    list_rule: str | None = None
    view_rule: str | None = None


class LoggingConfig(Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Config(Section):
    """Everything an operator can say. A room receives its own section, never the whole."""

    version: Literal[1] = 1
    database: DatabaseConfig = DatabaseConfig()
    replication: ReplicationConfig = ReplicationConfig()
    changelog: ChangelogConfig = ChangelogConfig()
    server: ServerConfig = ServerConfig()
    realtime: RealtimeConfig = RealtimeConfig()
    records: RecordsConfig = RecordsConfig()
    auth: AuthConfig = AuthConfig()
    collections: dict[str, CollectionConfig] = Field(default_factory=dict)
    logging: LoggingConfig = LoggingConfig()
