"""The configuration: one frozen model, read once, checked whole before anything opens."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pgrealtime.errors import ConfigError, Problem
from pgrealtime.sources import (
    Document,
    FillIn,
    KeyPath,
    Override,
    dotted,
    overrides,
    perhaps,
    put,
    read_yaml,
)
from pgrealtime.units import parse_duration, parse_size

Seconds = Annotated[float, BeforeValidator(parse_duration)]
"""Written ``500ms``, ``25s``, ``5m``, ``1h``; held in seconds."""

SomeSeconds = Annotated[Seconds, Field(gt=0)]
"""A duration that can't be nothing."""

Bytes = Annotated[int, BeforeValidator(parse_size)]
"""Written ``64KiB``, ``16MiB``; held in bytes."""

SomeBytes = Annotated[Bytes, Field(gt=0)]
"""A size that can't be nothing."""


def _split_texts(value: object) -> object:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


Texts = Annotated[tuple[str, ...], BeforeValidator(_split_texts)]
"""A list of texts; in one text, as variables are, separated by commas."""


def _parse_network(value: object) -> IPv4Network | IPv6Network:
    try:
        return ip_network(str(value))
    except ValueError:
        raise ValueError("not a network; write it as 10.0.0.0/8 or fd00::/8") from None


Networks = Annotated[
    tuple[Annotated[IPv4Network | IPv6Network, BeforeValidator(_parse_network)], ...],
    BeforeValidator(_split_texts),
]
"""A list of networks; in one text separated by commas."""


class SecretKey:
    """Marks a key that may also be given as ``KEY_file``, and that no message shows."""


Secret = Annotated[str, Field(repr=False), SecretKey()]


class Section(BaseModel):
    """A part of the configuration: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DatabaseConfig(Section):
    """The database whose changes are told."""

    url: Secret = ""
    """Direct connection with the REPLICATION right; empty takes libpq's PG* variables."""
    query_url: Secret = ""
    """Where rules are asked, if not at ``url``: same primary, may be a pooler."""
    schemas: Texts = ("public",)
    pool_size: int = Field(default=8, ge=1, le=1000)
    statement_timeout: SomeSeconds = 2.0
    """Per rule query; running out of it denies."""
    wait_for: Seconds = 60.0
    """How long to wait at start for a server that doesn't answer yet."""


class SlotConfig(Section):
    """The replication slot; temporary unless ``durable``, so that it can't outlive the process."""

    name: str = Field(default="pgrealtime", pattern=r"^[a-z0-9_]{1,48}$")
    """Of a durable slot; to a temporary one's a random suffix is appended."""
    durable: bool = False
    """The slot outlives the process: nothing is missed while it is down, and clients resume."""
    failover: bool = False
    """A durable slot's standbys have it too (PostgreSQL 17 and newer)."""
    allow_unlimited_wal: bool = False
    """Whether a durable slot may be made where ``max_slot_wal_keep_size`` bounds nothing."""
    create_timeout: SomeSeconds = 300.0
    """Creating waits for every open writing transaction of the cluster; longer than this fails."""

    @model_validator(mode="after")
    def _failover_is_durable(self) -> Self:
        if self.failover and not self.durable:
            raise ValueError("failover is for durable slots: set durable too")
        return self


class ReplicationConfig(Section):
    """How the stream is read."""

    plugin: Literal["auto", "wal2json", "pgoutput"] = "auto"
    """``auto`` takes wal2json where the server has it and allows it, else pgoutput."""
    slot: SlotConfig = SlotConfig()
    publication: str = Field(default="pgrealtime", min_length=1, max_length=63)
    """pgoutput only: lists the tables; made by the operator from SQL that we print."""
    max_pause: Seconds = 2.0
    """Held-up delivery pauses reading for so long; then the connection is given up: a gap."""


class ChangelogConfig(Section):
    """What a returning connection can be given."""

    max_age: Seconds = 300.0
    """0 turns resume off."""
    max_size: SomeBytes = 64 * 1024 * 1024
    """A transaction larger than this is a gap of its tables."""


class ServerConfig(Section):
    """The public port."""

    host: str = "0.0.0.0"  # noqa: S104 (a sidecar's port is meant to be reached)
    port: int = Field(default=8090, ge=0, le=65535)
    base_path: str = Field(default="", pattern=r"^(/[A-Za-z0-9._~-]+)*$")
    """Before every route, as in ``/realtime-service``; for proxies that don't cut it off."""
    trusted_proxies: Networks = ()
    """Networks, as in ``10.0.0.0/8``, whose ``X-Forwarded-For`` is believed."""
    cors_origins: Texts = ("*",)
    locale: Literal["auto", "en", "zh"] = "auto"
    """Language of error messages; ``auto`` follows ``Accept-Language``."""
    shutdown_grace: Seconds = 25.0
    """At SIGTERM connections are ended in small groups, never taking longer than this."""


class RealtimeConfig(Section):
    """Limits of connections."""

    idle_timeout: SomeSeconds = 300.0
    """Without a delivered event for so long a connection is ended, as PocketBase does."""
    max_lifetime: SomeSeconds = 1800.0
    heartbeat: SomeSeconds = 25.0
    """Keeps proxies from cutting; doesn't count as activity."""
    max_connections: int = Field(default=10_000, ge=1)
    send_buffer: SomeBytes = 1024 * 1024
    """Per connection; when full it reads on from the changelog instead."""
    send_buffers: SomeBytes = 256 * 1024 * 1024
    """What waits for all connections together, beside 64 KiB for each."""
    stall_timeout: SomeSeconds = 30.0
    """A connection that takes no byte for so long is ended."""
    same_address: bool = True
    """Whether the subscribe call must come from the connection's address."""


HiddenFields: TypeAlias = Literal["strict", "pocketbase"]
"""How far fields that are shown to superusers only may be used by others."""


class RecordsConfig(Section):
    """How rows are shown."""

    nulls: Annotated[Literal["null", "zero"], BeforeValidator(lambda v: v or "null")] = "null"
    """``null``, or PocketBase's zero value of the field's type."""
    hidden: HiddenFields = "strict"
    """``strict``: for all but superusers a hidden relation isn't there, so that nothing can be
    expanded over it. ``pocketbase``: whoever may see its target can do so, as in PocketBase."""


Algorithm: TypeAlias = Literal["HS256", "RS256", "ES256", "EdDSA"]


class IssuerConfig(Section):
    """Who else makes tokens that count. It has one of ``secret``, ``public_key``, ``jwks_url``."""

    name: str
    algorithms: Annotated[tuple[Algorithm, ...], BeforeValidator(_split_texts)] = ()
    """Empty takes what the key can check: HS256 for a secret, the three others for public keys."""
    secret: Secret = ""
    previous_secret: Secret = ""
    """Still accepted; for changing the secret without signing everybody out."""
    public_key: Secret = ""
    """PEM. No secret, but as well kept in a file."""
    jwks_url: str = Field(default="", pattern=r"^(https?://\S+)?$")
    """Where the issuer publishes its keys, as a JSON Web Key Set."""
    issuer: str = ""
    audience: str = ""
    leeway: Seconds = 0.0
    id_claim: str = Field(default="sub", min_length=1)
    collection: str = "users"
    """The auth collection whose record the id names."""
    superuser_when: dict[str, str | int | bool] = Field(default_factory=dict)
    """Claims, all of which must be equal, that make a superuser."""

    @model_validator(mode="after")
    def _one_kind_of_key(self) -> Self:
        given = [key for key in ("secret", "public_key", "jwks_url") if getattr(self, key)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"give one of secret, public_key and jwks_url; there is {found}")
        # A public key is known to everybody: as an HMAC secret it would let anybody in.
        unfit = [a for a in self.algorithms if (a == "HS256") != (given == ["secret"])]
        if unfit:
            raise ValueError(f"{given[0]} can't check {', '.join(unfit)}")
        if self.previous_secret and not self.secret:
            raise ValueError("previous_secret belongs to secret")
        return self

    @property
    def accepted_algorithms(self) -> tuple[Algorithm, ...]:
        """What ``algorithms`` says, or what its being empty means."""
        return self.algorithms or (("HS256",) if self.secret else ("RS256", "ES256", "EdDSA"))


class LoginConfig(Section):
    """PocketBase's own login endpoints, on users tables that exist already."""

    enabled: bool = False
    secret: Secret = ""
    """Signs the tokens together with each user's token key; changing it signs everybody out."""
    token_lifetime: Seconds = 432_000.0
    attempts_per_minute: int = Field(default=10, ge=1)
    """Failed ones, per address (IPv6: per /64) and account, however its name is spelled."""

    @model_validator(mode="after")
    def _has_secret(self) -> Self:
        if self.enabled and not self.secret:
            raise ValueError("login needs a secret")
        return self


class AuthConfig(Section):
    """Who is asking."""

    allow_guests: bool = True
    """Whether a subscribe call needs no token that holds."""
    issuers: tuple[IssuerConfig, ...] = ()
    login: LoginConfig = LoginConfig()

    @model_validator(mode="after")
    def _lets_somebody_in(self) -> Self:
        if not (self.allow_guests or self.issuers or self.login.enabled):
            raise ValueError("without guests, issuers and login nobody can subscribe")
        return self


class CollectionLoginConfig(Section):
    """How the people of one users table log in."""

    identity: Texts = ("email",)
    """Fields, tried in this order, an e-mail address as ``email`` first."""
    password_hash: str = ""
    """Column of the password hash; empty means that nobody logs in here."""
    token_key: str = ""
    """Column that is part of the key of the user's tokens; empty takes the password hash."""

    @property
    def secret_columns(self) -> tuple[str, ...]:
        """The columns that are in no record."""
        return tuple(name for name in (self.password_hash, self.token_key) if name)


class FieldsConfig(Section):
    """Which columns become fields, and how."""

    include: Texts = ("*",)
    """What is left out here is in no record and no rule."""
    hide: Texts = ()
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


def _not_for_everyone(rule: str | None) -> str | None:
    if rule == "":
        raise ValueError("nobody may manage everybody; leave it out, or say who does")
    return rule


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
    login: CollectionLoginConfig = CollectionLoginConfig()
    list_rule: str | None = None
    view_rule: str | None = None
    manage_rule: Annotated[str | None, AfterValidator(_not_for_everyone)] = None
    """Of an auth collection: who sees e-mail addresses that aren't public."""
    auth_rule: str | None = ""
    """Of an auth collection: which of its people may sign in; null is nobody."""


class AdminConfig(Section):
    """The operator's port: probes and metrics. Off unless it has a port."""

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    """0 is off."""
    token: Secret = ""
    """Metrics are for ``Authorization: Bearer`` with it; probes never need it."""

    @model_validator(mode="after")
    def _has_token_if_reachable(self) -> Self:
        if self.port and not self.token and not _is_loopback(self.host):
            raise ValueError(
                f"metrics that others than this machine reach ({self.host}) need a token"
            )
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
    admin: AdminConfig = AdminConfig()
    logging: LoggingConfig = LoggingConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a configuration's keys stand, for problems found by those who know the database."""

    source: str
    """The file's name as it was given."""
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    variables: Mapping[KeyPath, str] = field(default_factory=dict)
    """Environment variable that set the key, where one did."""

    def locate(self, error: ConfigError) -> ConfigError:
        """Return the error with file and lines; places that it already has are kept."""
        return ConfigError(
            tuple(self._located(problem) for problem in error.problems), source=self.source
        )

    def _located(self, problem: Problem) -> Problem:
        if problem.line is not None:
            return problem
        found = self.problem(tuple(problem.path.split(".")), problem.message, problem.hint)
        return replace(found, excerpt=problem.excerpt)

    def problem(self, path: KeyPath, message: str, hint: str = "") -> Problem:
        """Return the problem at a path, with the line or the variable it came from."""
        variable = self.variables.get(path)
        if variable is not None:
            message = f"{message} (set by {variable})"
        line = None if variable is not None else self._line(path)
        return Problem(dotted(path), message, hint, line)

    def _line(self, path: KeyPath) -> int | None:
        by_text = {tuple(map(str, key)): line for key, line in self.lines.items()}
        texts = tuple(map(str, path))
        while texts and texts not in by_text:
            texts = texts[:-1]
        return by_text.get(texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one file said: the problems, and the configuration as far as it could be made out."""

    config: Config | None
    """Without the keys that have problems, which then have their defaults. For further checks
    only, never to run with; None if nothing sensible is left."""
    origin: Origin
    problems: tuple[Problem, ...] = ()
    dropped: frozenset[KeyPath] = frozenset()
    """What was left out of ``config``."""

    def whole(self) -> Config:
        """Return the configuration.

        Raises:
            ConfigError: With every problem that was found.
        """
        if self.problems or self.config is None:
            raise ConfigError(self.problems, source=self.origin.source)
        return self.config


def load(path: str | Path, environ: Mapping[str, str] = os.environ) -> Config:
    """Read one file and return the configuration.

    Raises:
        ConfigError: With every problem that was found.
    """
    return read(path, environ).whole()


def read(path: str | Path, environ: Mapping[str, str] = os.environ) -> Reading:
    """Read one file and return all that could be made of it.

    Raises:
        ConfigError: The file itself can't be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8"
        is_missing = isinstance(error, FileNotFoundError)
        hint = "pgrealtime init writes one, and --config names another" if is_missing else ""
        problem = Problem("(document)", f"can't read the file: {reason}", hint)
        raise ConfigError((problem,), source=str(path)) from error
    return _parse(read_yaml(text), environ, _read_secret_file, str(path))


def parse(mapping: Mapping[str, object], environ: Mapping[str, str] | None = None) -> Config:
    """Return the configuration that plain values describe, as YAML would give them.

    Args:
        mapping: The document.
        environ: For ``${VAR}`` and overrides; none by default.

    Raises:
        ConfigError: With every problem that was found. ``KEY_file`` is one: this reads no file.
    """
    document = Document(value=dict(mapping), lines={})
    return _parse(document, environ or {}, _refuse_secret_file, "configuration").whole()


def _read_secret_file(name: str) -> str:
    return Path(name).read_text(encoding="utf-8").rstrip("\r\n")


def _refuse_secret_file(_name: str) -> str:
    raise OSError("files are not read here")


def _parse(
    document: Document,
    environ: Mapping[str, str],
    read_file: Callable[[str], str],
    source: str,
) -> Reading:
    """Fill in, override, read secrets, validate: in this order, gathering problems all along."""
    if not isinstance(document.value, dict):
        problem = Problem("(document)", "the document must be a mapping of sections", line=1)
        return Reading(config=None, origin=Origin(source=source), problems=(problem,))
    fill_in = FillIn(environ)
    tree = fill_in(document.value)
    assert isinstance(tree, dict)
    found = list(fill_in.problems)
    variables = _override(tree, overrides(environ), found)
    _replace_secret_files(tree, (), read_file, found)
    origin = Origin(source=source, lines=document.lines, variables=variables)
    unusable = {path for path, _ in found}
    for path in unusable:
        _drop(tree, path)
    config, invalid, dropped = _validate(tree, unusable)
    problems = (
        *document.problems,
        *(origin.problem(path, message) for path, message in found),
        *(origin.problem(path, message, hint) for path, message, hint in invalid),
    )
    return Reading(
        config=config,
        origin=origin,
        problems=tuple(sorted(problems, key=_in_file_order)),
        dropped=frozenset(dropped | unusable),
    )


def _in_file_order(problem: Problem) -> tuple[float, str]:
    return (problem.line or float("inf"), problem.path)


def _override(
    tree: dict[str, object],
    chosen: tuple[Override, ...],
    found: list[tuple[KeyPath, str]],
) -> dict[KeyPath, str]:
    variables: dict[KeyPath, str] = {}
    for override in chosen:
        try:
            path = put(tree, override, _read_override)
        except LookupError:
            found.append((override.path, f"{override.variable} names no key"))
        except yaml.YAMLError:
            found.append((override.path, f"{override.variable} isn't YAML"))
        else:
            variables[path] = override.variable
    return variables


def _read_override(path: KeyPath, text: str) -> object:
    """Lists and mappings are written as YAML in a variable; everything else is its text."""
    is_structure = get_origin(_annotation_at(path)) in (tuple, dict)
    return yaml.safe_load(text) if is_structure and text[:1] in ("[", "{") else text


def _validate(
    tree: dict[str, object], reported: set[KeyPath]
) -> tuple[Config | None, list[tuple[KeyPath, str, str]], set[KeyPath]]:
    """Return the configuration, what is wrong beyond the reported, and what had to be left out."""
    try:
        return Config.model_validate(tree), [], set()
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    invalid = [
        (detail["loc"], *_describe_invalid(detail["loc"], detail))
        for detail in details
        if not any(_overlap(detail["loc"], known) for known in reported)
    ]
    dropped = {_smallest_optional(detail) for detail in details}
    remaining = deepcopy(tree)
    for path in dropped:
        _drop(remaining, path)
    try:
        return Config.model_validate(remaining), invalid, dropped
    except ValidationError:
        return None, invalid, dropped


def _overlap(one: KeyPath, other: KeyPath) -> bool:
    """Whether one is the other or within it; what lacks a key is faulty for that key's fault."""
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]


def _smallest_optional(detail: ErrorDetails) -> KeyPath:
    """Return the path of what can be left out to be rid of the problem; of lists, all."""
    path = detail["loc"][:-1] if detail["type"] == "missing" else detail["loc"]
    lists = (n for n, key in enumerate(path) if isinstance(key, int))
    return path[: next(lists, len(path))]


def _drop(tree: dict[str, object], path: KeyPath) -> None:
    place: object = tree
    for key in path[:-1]:
        place = place.get(str(key)) if isinstance(place, dict) else None
    if isinstance(place, dict) and path:
        place.pop(str(path[-1]), None)


def _describe_invalid(path: KeyPath, detail: ErrorDetails) -> tuple[str, str]:
    """Return message and hint; never the value, which may be a secret."""
    match detail["type"]:
        case "extra_forbidden":
            return f'unknown key "{path[-1]}"', perhaps(str(path[-1]), _keys_at(path[:-1]))
        case "missing":
            return "is required", ""
        case "model_type" | "model_attributes_type" | "dict_type":
            return "must be a mapping", ""
        case "tuple_type":
            return "must be a list", ""
        case "value_error":
            return detail["msg"].removeprefix("Value error, "), ""
        case _:
            message = detail["msg"]
            return message[:1].lower() + message[1:], ""


def _annotation_at(path: KeyPath) -> object:
    """Return the type of the key at a path, or None where there is none."""
    annotation: object = Config
    for key in path:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            info = annotation.model_fields.get(str(key))
            annotation = None if info is None else info.annotation
        elif get_origin(annotation) in (tuple, dict):
            annotation = get_args(annotation)[0 if get_origin(annotation) is tuple else 1]
        else:
            return None
    return annotation


def _keys_at(path: KeyPath) -> list[str]:
    annotation = _annotation_at(path)
    if not (isinstance(annotation, type) and issubclass(annotation, Section)):
        return []
    keys: list[str] = []
    for name, info in annotation.model_fields.items():
        keys += [name, f"{name}_file"] if _is_secret(info) else [name]
    return keys


def _is_secret(info: FieldInfo) -> bool:
    return any(isinstance(mark, SecretKey) for mark in info.metadata)


def _replace_secret_files(
    tree: object, path: KeyPath, read_file: Callable[[str], str], found: list[tuple[KeyPath, str]]
) -> None:
    """Put the content of each ``KEY_file`` under ``KEY``, through the whole tree."""
    match tree:
        case dict():
            for key in _keys_at(path):
                if key.endswith("_file") and key in tree:
                    _replace_secret_file(tree, (*path, key), read_file, found)
            for key, inner in tree.items():
                _replace_secret_files(inner, (*path, key), read_file, found)
        case list():
            for n, inner in enumerate(tree):
                _replace_secret_files(inner, (*path, n), read_file, found)
        case _:
            pass


def _replace_secret_file(
    section: dict[str, object],
    path: KeyPath,
    read_file: Callable[[str], str],
    found: list[tuple[KeyPath, str]],
) -> None:
    file_key = str(path[-1])
    key = file_key.removesuffix("_file")
    name = section.pop(file_key)
    if not name:
        return
    if section.get(key):
        found.append((path, f'both "{key}" and "{file_key}" are given'))
        return
    section[key] = ""
    try:
        section[key] = read_file(str(name))
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "not UTF-8"
        found.append((path, f"can't read the file: {reason}"))
