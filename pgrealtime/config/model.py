"""The sections of the configuration and their defaults."""

import re
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pgrealtime.config.units import parse_duration, parse_size

Seconds = Annotated[float, BeforeValidator(parse_duration)]
"""Written ``500ms``, ``25s``, ``5m``, ``1h``; held in seconds."""

PositiveSeconds = Annotated[Seconds, Field(gt=0)]
"""A duration greater than zero."""

Bytes = Annotated[int, BeforeValidator(parse_size)]
"""Written ``64KiB``, ``16MiB``; held in bytes."""

PositiveBytes = Annotated[Bytes, Field(gt=0)]
"""A size greater than zero."""


def _split_at_commas(value: object) -> object:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


TextList = Annotated[tuple[str, ...], BeforeValidator(_split_at_commas)]
"""A list of texts; a single text, as of a variable, is split at commas."""


def _parse_network(value: object) -> IPv4Network | IPv6Network:
    try:
        return ip_network(str(value))
    except ValueError:
        raise ValueError("not a network; write it as 10.0.0.0/8 or fd00::/8") from None


Networks = Annotated[
    tuple[Annotated[IPv4Network | IPv6Network, BeforeValidator(_parse_network)], ...],
    BeforeValidator(_split_at_commas),
]
"""A list of networks; a single text is split at commas."""


_MIN_SECRET_CHARACTERS = 32
"""Any role of the database can listen, and try secrets offline."""


_MIN_RETAINED_WAL = 64 * 1024 * 1024
"""Four segments of WAL. A slot retains one or two although everything was read from it."""


def _require_wal_limit(size: int) -> int:
    if 0 < size < _MIN_RETAINED_WAL:
        raise ValueError("too small; 64MiB is the least, and 0 sets no limit")
    return size


class SecretMarker:
    """Marks a key that may also be given as ``KEY_file``, and whose value no message shows."""


Secret = Annotated[str, Field(repr=False), SecretMarker()]


class Section(BaseModel):
    """A section of the configuration: frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DatabaseConfig(Section):
    """The database whose changes are delivered."""

    url: Secret = ""
    """Direct connection with the REPLICATION right; empty takes libpq's PG* variables."""
    query_url: Secret = ""
    """For rule queries, if not ``url``: the same primary, perhaps through a pooler."""
    schemas: TextList = ("public",)
    pool_size: int = Field(default=8, ge=1, le=1000)
    statement_timeout: PositiveSeconds = 2.0
    """Per rule query; a query that takes longer denies."""
    wait_for: Seconds = 60.0
    """How long to wait at the start for a server that doesn't answer yet."""


class SlotConfig(Section):
    """The replication slot; temporary unless ``durable``, so that it can't outlive the process."""

    name: str = Field(default="pgrealtime", pattern=r"^[a-z0-9_]{1,48}$")
    """Name of the durable slot; a temporary one gets a random suffix."""
    durable: bool = False
    """The slot outlives the process: nothing is missed while it is down, and clients resume."""
    failover: bool = False
    """Whether standbys have the durable slot, too (PostgreSQL 17 and newer)."""
    allow_unlimited_wal: bool = False
    """Whether a durable slot may be created although ``max_slot_wal_keep_size`` sets no limit."""
    max_retained_wal: Annotated[Bytes, AfterValidator(_require_wal_limit)] = 16 * 1024**3
    """A slot that retains more is given up and made anew, which is a gap; 0 sets no limit."""
    create_timeout: PositiveSeconds = 300.0
    """Creating a slot waits for every open writing transaction of the cluster; then it fails."""

    @model_validator(mode="after")
    def _require_durable_for_failover(self) -> Self:
        if self.failover and not self.durable:
            raise ValueError("failover is for durable slots: set durable too")
        return self


class ReplicationConfig(Section):
    """How the stream is read."""

    plugin: Literal["auto", "wal2json", "pgoutput"] = "auto"
    """``auto`` takes wal2json where the server has it and allows it, else pgoutput."""
    slot: SlotConfig = SlotConfig()
    publication: str = Field(default="pgrealtime", min_length=1, max_length=63)
    """For pgoutput: lists the tables. The operator creates it with SQL that ``check`` prints."""
    max_pause: Seconds = 2.0
    """How long reading may pause while delivery is blocked; then the stream is closed: a gap."""


class ChangelogConfig(Section):
    """The window of transactions from which connections resume."""

    max_age: Seconds = 300.0
    """0 turns resume off."""
    max_size: PositiveBytes = 64 * 1024 * 1024
    """A transaction larger than this is a gap of its tables."""


class ServerConfig(Section):
    """The public port."""

    host: str = "0.0.0.0"  # noqa: S104 (a sidecar's port is meant to be reached)
    port: int = Field(default=8090, ge=0, le=65535)
    base_path: str = Field(default="", pattern=r"^(/[A-Za-z0-9._~-]+)*$")
    """Prefix of every route, such as ``/realtime-service``, for proxies that don't remove it."""
    trusted_proxies: Networks = ()
    """Networks, such as ``10.0.0.0/8``, whose ``X-Forwarded-For`` is trusted."""
    cors_origins: TextList = ("*",)
    locale: Literal["auto", "en", "zh"] = "auto"
    """Language of error messages; ``auto`` follows ``Accept-Language``."""
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = 1
    """Processes that serve the port; ``auto`` is one per core. More than one are fed by a process
    of their own, which reads the slot."""
    shutdown_grace: Seconds = 25.0
    """At SIGTERM connections are ended in small groups, never taking longer than this."""


class ClusterConfig(Section):
    """Several processes behind one address."""

    bus: Literal["none", "postgres", "nats"] = "none"
    """How a subscribe call reaches the process that has the stream: ``postgres`` by ``NOTIFY``,
    ``nats`` by the servers of ``log.nats``."""
    name: str = Field(default="app", pattern=r"^[a-z0-9_]{1,32}$")
    """Processes of one name in one database pass calls on to each other."""
    secret: Secret = ""
    """Encrypts what is passed on."""
    warm_up: Seconds = 30.0
    """With a bus: a process is not ready for so long after its stream has begun. The others can
    resume more."""

    @model_validator(mode="after")
    def _require_secret(self) -> Self:
        if self.bus != "none" and len(self.secret) < _MIN_SECRET_CHARACTERS:
            raise ValueError(
                f"a bus needs a secret of at least {_MIN_SECRET_CHARACTERS} characters;"
                " openssl rand -base64 48 generates one"
            )
        return self


class LogTlsConfig(Section):
    """TLS to NATS, where the URL's ``tls://`` and the system's authorities aren't enough."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    @property
    def is_configured(self) -> bool:
        """Whether any file is named."""
        return bool(self.ca_file or self.cert_file or self.key_file)


class LogConfig(Section):
    """A log between one process that reads the slot and all that deliver, in NATS JetStream."""

    nats: Secret = ""
    """``nats://host`` or several with commas; empty: each process reads its own slot."""
    credentials_file: str = ""
    """NATS credentials (JWT and nkey), or an nkey seed."""
    tls: LogTlsConfig = LogTlsConfig()
    replicas: int = Field(default=1, ge=1, le=5)
    """Copies of the log in a cluster of NATS servers."""
    storage: Literal["file", "memory"] = "file"
    lag: PositiveSeconds = 10.0
    """The slot stays so far behind what the log has: what NATS may lose without a gap, and what a
    take-over reads again."""


class RealtimeConfig(Section):
    """Limits of connections."""

    idle_timeout: PositiveSeconds = 300.0
    """Without a delivered event for so long a connection is ended, as PocketBase does."""
    max_lifetime: PositiveSeconds = 1800.0
    heartbeat: PositiveSeconds = 25.0
    """Keeps proxies from closing idle connections; doesn't count as activity."""
    max_connections: int = Field(default=10_000, ge=1)
    send_buffer: PositiveBytes = 1024 * 1024
    """Per connection; one whose buffer is full catches up from the changelog."""
    send_buffers: PositiveBytes = 256 * 1024 * 1024
    """For all connections together, in addition to 64 KiB for each."""
    stall_timeout: PositiveSeconds = 30.0
    """A connection that accepts no byte for so long is ended."""
    same_address: bool = True
    """Whether the subscribe call must come from the connection's address."""


class MirrorsConfig(Section):
    """Topics whose clients keep a list right: how often these are told to load it anew."""

    pace: PositiveSeconds = 2.0
    """Between two resyncs of one topic."""
    resyncs_per_second: int = Field(default=500, ge=1)
    """Over all connections: no more of them load their lists at once."""
    rows: int = Field(default=1000, ge=1, le=100_000)
    """Of a list that is loaded for a client (the option ``load``); it loads a longer one itself."""
    loads: int = Field(default=2, ge=1, le=1000)
    """Lists that are read at once for clients; the others wait."""


class ReadsConfig(Section):
    """Lists and single records on request."""

    enabled: bool = True
    pool_size: int = Field(default=4, ge=1, le=1000)
    """Connections of their own, so that no rule waits for a list."""
    statement_timeout: PositiveSeconds = 5.0
    """Of each query, and of all that one request needs; what takes longer is refused."""
    requests_per_minute: int = Field(default=0, ge=0)
    """Per address (IPv6: per /64); 0 sets no limit. Superusers are exempt."""
    max_waiting: int = Field(default=100, ge=1)
    """Requests of one address that may wait for a connection; further ones are refused."""
    max_joined_rows: int = Field(default=1_000_000, ge=1)
    """Combinations of related rows that one sort may go through."""
    max_answer_size: PositiveBytes = 64 * 1024 * 1024
    """Of an answer, of the rows of its page, and of all rows that it expands."""


HiddenFieldsMode: TypeAlias = Literal["strict", "pocketbase"]
"""How far others may use fields that only superusers see."""


class RecordsConfig(Section):
    """How rows are shown."""

    nulls: Annotated[Literal["null", "zero"], BeforeValidator(lambda v: v or "null")] = "null"
    """``null``, or PocketBase's zero value of the field's type."""
    hidden: HiddenFieldsMode = "strict"
    """``strict``: only superusers can expand a hidden relation, lists sort addresses that aren't
    shown as empty ones, and a filter over several rows asks only those that are listed.
    ``pocketbase``: every caller can expand what leads to records that the caller may see, lists are
    sorted by all addresses, and filters ask all rows, as in PocketBase."""


Algorithm: TypeAlias = Literal["HS256", "RS256", "ES256", "EdDSA"]


class IssuerConfig(Section):
    """An issuer of accepted tokens. It has one of ``secret``, ``public_key``, ``jwks_url``."""

    name: str
    algorithms: Annotated[tuple[Algorithm, ...], BeforeValidator(_split_at_commas)] = ()
    """Empty accepts what the key can verify: HS256 for a secret, the others for a public key."""
    secret: Secret = ""
    previous_secret: Secret = ""
    """Still accepted, so that the secret can be changed without invalidating tokens."""
    public_key: Secret = ""
    """PEM. Not secret, but may be kept in a file, too."""
    jwks_url: str = Field(default="", pattern=r"^(https?://\S+)?$")
    """Where the issuer publishes its keys, as a JSON Web Key Set."""
    issuer: str = ""
    audience: str = ""
    leeway: Seconds = 0.0
    id_claim: str = Field(default="sub", min_length=1)
    collection: str = "users"
    """The auth collection whose record the id names."""
    claims: dict[Annotated[str, Field(pattern=r"^\w+$")], str] = Field(default_factory=dict)
    """Name in rules to claim: with ``tenant: org_id`` rules read ``@request.auth.tenant``. A claim
    within an object is written with dots: ``app_metadata.org``."""
    superuser_when: dict[str, str | int | bool] = Field(default_factory=dict)
    """Claims, all of which must be equal, that make a superuser."""

    @model_validator(mode="after")
    def _require_one_key_source(self) -> Self:
        configured = [key for key in ("secret", "public_key", "jwks_url") if getattr(self, key)]
        if len(configured) != 1:
            names = " and ".join(configured) or "none"
            raise ValueError(f"give one of secret, public_key and jwks_url; there is {names}")
        # A public key is no secret: anyone could sign with it as an HMAC key.
        unfit = [a for a in self.algorithms if (a == "HS256") != (configured == ["secret"])]
        if unfit:
            raise ValueError(f"{configured[0]} can't check {', '.join(unfit)}")
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
    """Signs tokens, together with each user's token key; changing it invalidates all tokens."""
    token_lifetime: Seconds = 432_000.0
    attempts_per_minute: int = Field(default=10, ge=1)
    """Failed ones, per address (IPv6: per /64) and account, whatever the spelling of its name."""

    @model_validator(mode="after")
    def _require_secret(self) -> Self:
        if self.enabled and not self.secret:
            raise ValueError("login needs a secret")
        return self


class AuthConfig(Section):
    """Which callers are accepted."""

    allow_guests: bool = True
    """Whether callers without a valid token may subscribe."""
    issuers: tuple[IssuerConfig, ...] = ()
    login: LoginConfig = LoginConfig()

    @property
    def claim_names(self) -> frozenset[str]:
        """The names under which rules read claims of any issuer's tokens."""
        return frozenset(name for issuer in self.issuers for name in issuer.claims)

    @model_validator(mode="after")
    def _require_some_caller(self) -> Self:
        if not (self.allow_guests or self.issuers or self.login.enabled):
            raise ValueError("no caller can subscribe without guests, issuers or login")
        return self


class CollectionLoginConfig(Section):
    """How the accounts of one collection log in."""

    identity: TextList = ("email",)
    """Fields to look the identity up in, in this order; an e-mail address in ``email`` first."""
    password_hash: str = ""
    """Column of the password hash; empty means that there is no login."""
    token_key: str = ""
    """Column that is part of the key of the user's tokens; empty takes the password hash."""

    @property
    def secret_columns(self) -> tuple[str, ...]:
        """The columns that no record contains."""
        return tuple(name for name in (self.password_hash, self.token_key) if name)


class FieldsConfig(Section):
    """Which columns become fields, and how."""

    include: TextList = ("*",)
    """Other columns are in no record and no rule."""
    hide: TextList = ()
    """PocketBase's hidden: shown to superusers only; not usable in client filters."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Column to field name."""
    types: dict[str, str] = Field(default_factory=dict)
    """Field to PocketBase type, where the column's type doesn't say it: ``geoPoint``, ``file``."""


class RelationConfig(Section):
    """A relation without a foreign key."""

    collection: str
    """Name of the collection pointed to."""
    through: str = ""
    """Junction table, as ``schema.table``; empty if a column holds the id or the array of ids."""
    source: str = ""
    """In the junction table: the column naming this collection's record."""
    target: str = ""
    """In the junction table: the column naming the related record."""
    updates: bool = True
    """Of a junction table: whether a row that is inserted or deleted there is an update of the
    record that shows its id."""


def _forbid_empty_rule(rule: str | None) -> str | None:
    if rule == "":
        raise ValueError(
            "an empty rule would admit every caller; leave it out, or write a condition"
        )
    return rule


class CollectionConfig(Section):
    """A table that is served as a collection."""

    table: str
    type: Literal["base", "auth"] = "base"
    id: str = ""
    """The column shown as id; empty takes the primary key, "*" a digest of a row without a key."""
    mirrors: Literal["on_request", "always", "off"] = "on_request"
    """Which topics are mirrors, told of rows that enter and leave what their callers may see:
    those with the option ``mode`` of "mirror", all, or none."""
    stream: bool = True
    """Whether changes are delivered. Views, materialized views and foreign tables send none, and
    can be read only: set it to false."""
    order: TextList = ()
    """Fields by which lists are sorted by default, ``-`` before one that descends. Empty takes a
    numeric key, or a creation time and the key, or the key."""
    collection_id: str = ""
    """Empty derives it from type and name as PocketBase does."""
    fields: FieldsConfig = FieldsConfig()
    relations: dict[str, RelationConfig] = Field(default_factory=dict)
    login: CollectionLoginConfig = CollectionLoginConfig()
    list_rule: str | None = None
    view_rule: str | None = None
    manage_rule: Annotated[str | None, AfterValidator(_forbid_empty_rule)] = None
    """Of an auth collection: who receives e-mail addresses that aren't public."""
    auth_rule: str | None = ""
    """Of an auth collection: whose logins and tokens are accepted; null is nobody's."""


_CALLER = re.compile(r"guest|superuser|[^/]+/.+")


def _require_caller(text: str) -> str:
    if not _CALLER.fullmatch(text):
        raise ValueError("a caller is guest, superuser or COLLECTION/ID, such as users/ann")
    return text


class RuleTestCaller(Section):
    """A caller of a rule test; written as a text if its token has no claims that rules read."""

    user: Annotated[str, AfterValidator(_require_caller)]
    """``guest``, ``superuser`` or ``COLLECTION/ID``: a user whose row exists."""
    claims: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    """Of the user's token, by their names in rules."""


def _caller_of_text(value: object) -> object:
    return {"user": value} if isinstance(value, str) else value


def _id_of_number(value: object) -> object:
    return str(value) if type(value) is int else value


RuleTestCallers = tuple[Annotated[RuleTestCaller, BeforeValidator(_caller_of_text)], ...]


class RuleTestConfig(Section):
    """Who may see one record, and who may not; ``pgrealtime check`` decides it as the service."""

    name: str = ""
    """Said if it fails; empty is collection and record."""
    collection: str
    id: Annotated[str, BeforeValidator(_id_of_number)] = ""
    """A record that exists."""
    record: dict[str, object] = Field(default_factory=dict)
    """Or a record that need not exist, by its fields; those that aren't given are NULL."""
    rule: Literal["both", "list_rule", "view_rule"] = "both"
    """Which rule has to decide so."""
    allow: RuleTestCallers = ()
    deny: RuleTestCallers = ()

    @model_validator(mode="after")
    def _require_record_and_caller(self) -> Self:
        if bool(self.id) == bool(self.record):
            raise ValueError("give one of id, of a record that exists, and record")
        if not (self.allow or self.deny):
            raise ValueError("name callers to allow or to deny")
        return self

    @property
    def rule_keys(self) -> tuple[Literal["list_rule", "view_rule"], ...]:
        """The rules that have to decide so."""
        return ("list_rule", "view_rule") if self.rule == "both" else (self.rule,)


class AdminConfig(Section):
    """The operator's port: probes, metrics and a page. Off unless it has a port."""

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    """0 is off."""
    token: Secret = ""
    """Metrics and the page's data require ``Authorization: Bearer`` with it; probes never do."""

    @model_validator(mode="after")
    def _require_token_if_reachable(self) -> Self:
        if self.port and not self.token and not _is_loopback(self.host):
            raise ValueError(f"metrics that other machines can reach ({self.host}) need a token")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class LoggingConfig(Section):
    """What is logged, and in which format."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Config(Section):
    """The whole configuration. Each part of the program receives its own section of it."""

    version: Literal[1] = 1
    database: DatabaseConfig = DatabaseConfig()
    replication: ReplicationConfig = ReplicationConfig()
    changelog: ChangelogConfig = ChangelogConfig()
    server: ServerConfig = ServerConfig()
    cluster: ClusterConfig = ClusterConfig()
    log: LogConfig = LogConfig()
    realtime: RealtimeConfig = RealtimeConfig()
    mirrors: MirrorsConfig = MirrorsConfig()
    records: RecordsConfig = RecordsConfig()
    reads: ReadsConfig = ReadsConfig()
    auth: AuthConfig = AuthConfig()
    collections: dict[str, CollectionConfig] = Field(default_factory=dict)
    tests: tuple[RuleTestConfig, ...] = ()
    admin: AdminConfig = AdminConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _require_what_the_log_needs(self) -> Self:
        if self.log.nats and not self.replication.slot.durable:
            raise ValueError("log needs a slot that outlives its reader: replication.slot.durable")
        if self.log.nats and self.cluster.bus != "nats":
            raise ValueError("log.nats needs cluster.bus: nats, and cluster.secret")
        if self.cluster.bus == "nats" and not self.log.nats:
            raise ValueError("cluster.bus: nats needs log.nats")
        return self
