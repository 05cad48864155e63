"""Every error code, with its cause and its cure: what ``pgrealtime explain-error`` prints. Pure.

A test compares it with the codes that the program raises: none is missing, and none is left over.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """What an operator has to know of a code."""

    cause: str
    cure: str


_CONFIGURATION = "the configuration and its rules"
_CONNECTING = "connecting to the database, and what it has to allow"
_STREAM = "the replication slot and its stream"
_PROCESSES = "several processes: workers, the bus between processes, the log in NATS"
_COMMANDS = "commands"
_REQUESTS = "requests of clients; in the log and in metrics"
_WITHIN = "within the program"

_ERROR_CODES: Final = {
    _CONFIGURATION: {
        "config_invalid": ErrorCode(
            "The configuration has problems; all are listed, with file and line.",
            "The hint of each. pgrealtime check reports them without starting the service.",
        ),
        "rule_syntax": ErrorCode(
            "A rule or filter isn't of the rule language.",
            "The place in the rule is marked. In YAML a rule that begins with @ or a quote needs"
            " quotes around all of it.",
        ),
        "rule_name": ErrorCode(
            "A rule names a collection, field, function or modifier that doesn't exist.",
            "The place is marked, and the hint has the nearest name. Fields have the names that"
            " records show, not those of renamed columns.",
        ),
        "rule_unsupported": ErrorCode(
            "PocketBase accepts the rule, and it can't be decided exactly here.",
            "The place is marked; write the comparison in another way.",
        ),
        "rule_invalid": ErrorCode("A rule or filter can't be used.", "The place in it is marked."),
        "rule_test_failed": ErrorCode(
            "check decided rule tests of the configuration otherwise than they expect.",
            "Change the rule or the test; below each are the parts of the rule that decided.",
        ),
        "key_invalid": ErrorCode(
            "A public key of an issuer can't be used.",
            "A PEM of an RSA, EC or Ed25519 public key, in auth.issuers.",
        ),
        "workers_exceed_connections": ErrorCode(
            "database.pool_size has less than two connections for each of server.workers.",
            "A larger database.pool_size, or fewer workers; the hint has the numbers.",
        ),
    },
    _CONNECTING: {
        "database_unreachable": ErrorCode(
            "The server doesn't answer, or refuses the login.",
            "database.url, the server's listen_addresses and pg_hba.conf. The service retries by"
            " itself.",
        ),
        "database_url_invalid": ErrorCode(
            "The URL can't be read.",
            "postgresql://user:password@host:port/database, special characters percent-encoded.",
        ),
        "wal_level": ErrorCode(
            "The server doesn't write logical WAL.",
            "ALTER SYSTEM SET wal_level = logical; then restart the server. Hosted servers have a"
            " setting of their own for it, which the hint names.",
        ),
        "plugin_refused": ErrorCode(
            "output_plugin_libraries doesn't list wal2json.",
            "The SQL in the hint, or replication.plugin: pgoutput.",
        ),
        "plugin_missing": ErrorCode(
            "wal2json isn't installed on the server.",
            "The package postgresql-17-wal2json (of the server's version), or replication.plugin:"
            " pgoutput.",
        ),
        "replication_attribute_missing": ErrorCode(
            "The role of database.url may not replicate.",
            "ALTER ROLE ... REPLICATION, or what the hint says for hosted servers.",
        ),
        "replication_refused": ErrorCode(
            "Ordinary connections work, replication connections don't.",
            "A line of pg_hba.conf for the database (logical replication matches by its name); a"
            " direct URL, no pooler.",
        ),
        "select_not_granted": ErrorCode(
            "The query role can't read a table.",
            "GRANT SELECT, as in sql/tables.sql; pgrealtime sql prints what is lacking.",
        ),
        "row_security": ErrorCode(
            "Row security hides rows of a table from the query role.",
            "The BYPASSRLS or the policy in the hint.",
        ),
        "encoding_unsupported": ErrorCode(
            "The decoder can't be used with the database's encoding.",
            "The hint.",
        ),
        "standby": ErrorCode(
            "A URL connects to a standby.",
            "The primary; with several hosts add target_session_attrs=primary.",
        ),
        "different_servers": ErrorCode(
            "database.url and database.query_url connect to different servers.",
            "Both to the same primary; query_url may go through a pooler.",
        ),
        "catalog": ErrorCode(
            "The catalogue can't be read.",
            "The detail. The service retries by itself.",
        ),
        "setup_incomplete": ErrorCode(
            "A table of users can't be read as configured.",
            "The detail; pgrealtime check says what is lacking.",
        ),
    },
    _STREAM: {
        "publication_missing": ErrorCode(
            "pgoutput needs a publication, and there is none of that name.",
            "The SQL in the hint; pgrealtime sql prints it too.",
        ),
        "publication_mismatch": ErrorCode(
            "The publication doesn't have exactly the configured tables, or not all they need.",
            "The SQL in the hint.",
        ),
        "table_not_streamable": ErrorCode(
            "A view, an unlogged or a foreign table, or one without key or replica identity.",
            "The SQL in the hint; or stream: false for what is only read.",
        ),
        "wal_unlimited": ErrorCode(
            "A durable slot could fill the server's disk while no process reads it.",
            "Set max_slot_wal_keep_size, or replication.slot.allow_unlimited_wal: true.",
        ),
        "slot_unfit": ErrorCode(
            "A durable slot's name is taken by another kind of slot.",
            "Another replication.slot.name.",
        ),
        "failover_unsupported": ErrorCode(
            "The server is older than PostgreSQL 17.",
            "Leave replication.slot.failover out.",
        ),
        "slot_unknown": ErrorCode(
            "slot drop got a name that is none of this configuration's slots.",
            "pgrealtime slot list",
        ),
        "slot_busy": ErrorCode(
            "Another process reads the slot.",
            "The service waits, and takes over when that process ends; end it before slot drop.",
        ),
        "slots_exhausted": ErrorCode(
            "max_replication_slots is used up.",
            "Drop slots that nothing reads (pg_replication_slots), or raise it. Retried.",
        ),
        "walsenders_exhausted": ErrorCode(
            "max_wal_senders is used up.",
            "End what isn't needed (pg_stat_replication), or raise it. Retried.",
        ),
        "slot_create_timeout": ErrorCode(
            "An old transaction is open somewhere in the cluster; a new slot waits for it.",
            "End it: pg_stat_activity by xact_start, and pg_prepared_xacts.",
        ),
        "slot_create_failed": ErrorCode(
            "The server refuses to create the slot.",
            "The server's own words in the detail.",
        ),
        "slot_lost": ErrorCode(
            "The slot was dropped or invalidated, or retained too much WAL and was given up. A new"
            " one is opened, and clients are notified of the gap.",
            "slot.given_up in the log, and the server's log. If it repeats: a larger"
            " replication.slot.max_retained_wal, or the transaction that holds the WAL.",
        ),
        "stream_interrupted": ErrorCode(
            "The replication connection ended. A new one is opened.",
            "If it repeats: the server's log, and wal_sender_timeout.",
        ),
        "stream_start": ErrorCode(
            "The server refuses to start the stream.",
            "The server's own words in the detail.",
        ),
        "stream_closed": ErrorCode("The service closed the stream itself, to end.", "Nothing."),
        "stream_away": ErrorCode(
            "There is no stream at the moment; subscribe calls are answered with 503.",
            "Clients retry; the log says why the stream is away.",
        ),
        "decoder_failed": ErrorCode(
            "The decoder failed at a transaction.",
            "The server's own words in the detail; of an internal error its code alone, since the"
            " words may quote a row. A transaction at which the decoder of a durable slot fails"
            " five times is skipped, which is a gap.",
        ),
        "unexpected_message": ErrorCode(
            "What the decoder sends can't be read. Retried.",
            "A newer or older wal2json, or replication.plugin: pgoutput.",
        ),
        "delivery_held_up": ErrorCode(
            "Delivery was blocked for replication.max_pause; the stream is opened again.",
            "Slow rule queries: rule.suspended in the log, indexes that check names.",
        ),
        "wal": ErrorCode(
            "The server refuses a replication command.",
            "The server's own words in the detail.",
        ),
    },
    _PROCESSES: {
        "worker_gone": ErrorCode(
            "A worker ended before it answered; another one is started.",
            "worker.ended in the log.",
        ),
        "frame_undecodable": ErrorCode(
            "Bytes of another process's feed can't be read.",
            "Processes of one version.",
        ),
        "bus_needs_direct_connection": ErrorCode(
            "cluster.bus: postgres, and database.url leads through a pooler.",
            "The server's own URL.",
        ),
        "bus_refused": ErrorCode(
            "The database refuses LISTEN or the advisory lock that the bus needs.",
            "The detail.",
        ),
        "bus": ErrorCode(
            "A call can't be passed on to another process.", "The log of both processes."
        ),
        "holder_gone": ErrorCode(
            "A subscribe call names a connection of a process that has ended. The client gets 404,"
            " and SDKs reconnect.",
            "Nothing.",
        ),
        "holder_silent": ErrorCode(
            "The process that holds the connection doesn't answer; the client gets 503.",
            "The process with that tag hangs or can't reach the database: see its log.",
        ),
        "call_unreadable": ErrorCode(
            "A passed-on call is of another version.",
            "Nothing, while a roll-out lasts.",
        ),
        "call_unsealed": ErrorCode(
            "A message on the bus was ignored: it isn't sealed with this cluster.secret.",
            "One secret for all processes of a cluster.name; another name for another cluster; else"
            " somebody in the database writes to the bus.",
        ),
        "call_malformed": ErrorCode(
            "A message on the bus was ignored: it isn't of the bus.",
            "As call_unsealed.",
        ),
        "call_stale": ErrorCode(
            "A message on the bus was ignored: it came too late.",
            "The processes' clocks; else as call_unsealed.",
        ),
        "call_replayed": ErrorCode(
            "A message on the bus was ignored: it was sent again.",
            "As call_unsealed.",
        ),
        "call_too_large": ErrorCode(
            "A message on the bus was ignored: it is too large.",
            "As call_unsealed.",
        ),
        "call_refused": ErrorCode(
            "A message on the bus was ignored: too many come at once.",
            "As call_unsealed.",
        ),
        "nats_missing": ErrorCode(
            "log.nats is set, and the client library isn't installed.",
            "pip install 'pgrealtime[nats]'",
        ),
        "log_away": ErrorCode(
            "NATS or JetStream doesn't answer. Retried.", "The NATS server's log."
        ),
        "log_refused": ErrorCode("Another replica was faster to append. Retried.", "Nothing."),
        "log_tls": ErrorCode(
            "The NATS server has another certificate than log.tls and log.nats allow, wants one of"
            " this client, or offers no TLS although a URL says tls:.",
            "log.tls, and the host in log.nats.",
        ),
        "log_unfit": ErrorCode(
            "The stream has other limits than this configuration: replicas differ, or it is another"
            " program's.",
            "The detail names them; one configuration for all, or another cluster.name.",
        ),
        "log_foreign": ErrorCode(
            "The owner of this log reads another database.",
            "Another cluster.name.",
        ),
        "log_denied": ErrorCode(
            "NATS refuses the login or a subject.",
            "The permissions in the hint; pgrealtime check prints all of them.",
        ),
        "log_credentials": ErrorCode(
            "A file of section log can't be read.",
            "log.credentials_file, log.tls; the detail.",
        ),
        "log_unreadable": ErrorCode(
            "A message of the log isn't this program's.",
            "Nothing else may publish under pgrt.NAME.",
        ),
        "log_newer": ErrorCode(
            "A message of the log is a later version's.", "Update this replica."
        ),
        "log_fenced": ErrorCode(
            "This replica stopped reading the slot: another one took over.",
            "Nothing, it follows now; if often, the network between them.",
        ),
        "database_unheard": ErrorCode(
            "This replica stopped reading the slot, since it could not hear the database.",
            "Nothing, another one reads it; if often, the network to the database.",
        ),
    },
    _COMMANDS: {
        "schema_missing": ErrorCode(
            "init finds no such schema.", "--schema; the hint has the nearest."
        ),
        "table_missing": ErrorCode(
            "init finds no table that matches.",
            "--table and --exclude take patterns of a shell, with or without the schema.",
        ),
        "file_not_written": ErrorCode(
            "The file can't be written.",
            "Another one with --config; --config - prints it.",
        ),
        "file_not_extended": ErrorCode(
            "init can't add tables to the file that exists: it isn't a configuration, or its"
            " collections are in braces.",
            "The detail; or another file with --config.",
        ),
        "service_unreachable": ErrorCode(
            "No service answers at the address that listen and live use.",
            "Start the service, or give --url.",
        ),
        "subscription_refused": ErrorCode(
            "The service refuses the subscriptions of listen.",
            "Its response is in the detail, the reason in its log.",
        ),
        "token_unsigned": ErrorCode(
            "No issuer of that collection has a secret to sign with.",
            "Add an issuer to auth.issuers; or log in and use that token.",
        ),
        "user_unknown": ErrorCode(
            "--user names no auth collection, or no record in it.",
            "The id of a user that exists: users/ann.",
        ),
        "port_unavailable": ErrorCode(
            "server.port or admin.port is taken, or the host isn't this machine.",
            "Another port or host; the hint.",
        ),
        "port_taken": ErrorCode("The demo's port is taken.", "pgrealtime demo --port 9000"),
        "server_missing": ErrorCode(
            "demo finds no PostgreSQL to start.",
            "Install one; the hint has the command.",
        ),
        "server_start": ErrorCode("The demo's PostgreSQL doesn't start.", "The hint."),
        "server_not_started": ErrorCode("The demo's PostgreSQL doesn't start.", "The hint."),
        "server_gone": ErrorCode(
            "The demo's PostgreSQL ended by itself.", "Its log, in the detail."
        ),
        "directory_unwritable": ErrorCode("demo finds no place for its server.", "The hint."),
    },
    _REQUESTS: {
        "token_missing": ErrorCode("A request has no token.", "auth.allow_guests, or a token."),
        "token_malformed": ErrorCode(
            "A token isn't a JWT.", "What the application sends as the token."
        ),
        "token_signature": ErrorCode(
            "No issuer's key verifies the token.",
            "The secret or key of auth.issuers, and its algorithms. After a change of secret:"
            " previous_secret.",
        ),
        "token_expired": ErrorCode("The token's exp is over.", "A new token; an issuer's leeway."),
        "token_early": ErrorCode(
            "The token's nbf is still to come.", "Clocks; an issuer's leeway."
        ),
        "token_issuer": ErrorCode("The token's iss isn't the issuer's.", "auth.issuers: issuer."),
        "token_audience": ErrorCode(
            "The token's aud isn't the issuer's.", "auth.issuers: audience."
        ),
        "token_id": ErrorCode(
            "The token has no claim with the user's id.",
            "auth.issuers: id_claim, sub by default.",
        ),
        "account_unknown": ErrorCode(
            "The user of a token doesn't exist, or its collection has no login.",
            "auth.issuers: collection and id_claim; the user's row.",
        ),
        "account_refused": ErrorCode(
            "The auth_rule of the user's collection doesn't admit the user of a token.",
            "The rule and the user's row; pgrealtime explain shows the row's values.",
        ),
        "auth_failed": ErrorCode("A token or password isn't valid.", "The message."),
        "guest_refused": ErrorCode(
            "auth.allow_guests is false, and a call has no valid token.",
            "A token; why one was refused is in the log.",
        ),
        "login_failed": ErrorCode(
            "Unknown user or wrong password; or the collection's auth_rule refuses.",
            "login.refused in the log. In a start: as database_unreachable.",
        ),
        "login_refused": ErrorCode(
            "Too many failed logins of an address and account.",
            "auth.login.attempts_per_minute.",
        ),
        "client_unknown": ErrorCode(
            "A subscribe call names no connection. The client gets 404, and SDKs reconnect.",
            "Nothing; behind a balancer cluster.bus.",
        ),
        "address_mismatch": ErrorCode(
            "A subscribe call comes from another address than its connection.",
            "server.trusted_proxies behind a proxy; or realtime.same_address: false.",
        ),
        "authorization_mismatch": ErrorCode(
            "A subscribe call is of another user than the one before on its connection.",
            "The client reconnects after a change of user, as PocketBase's does.",
        ),
        "body_unreadable": ErrorCode("A request's body isn't what the SDKs send.", "The client."),
        "subscription_limit": ErrorCode(
            "A call has more or larger filters than a connection or an address may have.",
            "Fewer filters; the response names the limit. A rule has no such limit.",
        ),
        "request_refused": ErrorCode("A request gets an error response.", "The response."),
        "token_required": ErrorCode(
            "The admin port's page was asked for without admin.token, or with another one.",
            "The token of the configuration.",
        ),
        "host_unknown": ErrorCode(
            "Without admin.token the admin port's page was asked for by another name than this"
            " machine's.",
            "http://127.0.0.1:PORT/, or admin.token.",
        ),
        "look_refused": ErrorCode(
            "What the admin port's page was to show isn't there any more.", "Load the page anew."
        ),
        "read_collection_unknown": ErrorCode("A list names no collection.", "The configuration."),
        "read_locked": ErrorCode(
            "The rule of a read is null: superusers only.",
            "A list_rule or view_rule.",
        ),
        "read_reserved_request": ErrorCode(
            "filter or sort of a list has @request, which is for superusers.",
            "The client.",
        ),
        "read_reserved_collection": ErrorCode(
            "filter or sort of a list has @collection, which is for superusers.",
            "The client.",
        ),
        "read_invalid": ErrorCode(
            "filter, sort, page or fields of a list can't be used, or it takes too long.",
            "read.refused in the log with logging.level: debug; the limits in section reads.",
        ),
        "record_unknown": ErrorCode(
            "There is no such record, or the caller may not view it.",
            "pgrealtime explain COLLECTION/ID --list",
        ),
    },
    _WITHIN: {
        "changelog": ErrorCode(
            "The changelog can't take an entry.",
            "changelog.max_size; please report it.",
        ),
        "changelog_trimmed": ErrorCode(
            "A position is older than the changelog.", "changelog.max_age."
        ),
        "internal": ErrorCode("A fault of the program.", "Please report it, with the log."),
    },
}

ERROR_CODES: Final[Mapping[str, ErrorCode]] = MappingProxyType(
    {code: known for codes in _ERROR_CODES.values() for code, known in codes.items()}
)
"""By code, in the order in which they are listed."""


def describe_code(code: str) -> Iterator[str]:
    """Yield the lines about a code that exists."""
    known = ERROR_CODES[code]
    yield code
    yield f"cause  {known.cause}"
    yield f"cure   {known.cure}"


def list_codes() -> Iterator[str]:
    """Yield all codes with their causes, by groups."""
    width = max(map(len, ERROR_CODES))
    for group, codes in _ERROR_CODES.items():
        yield f"{group}:"
        for code, known in codes.items():
            yield f"  {code:<{width}}  {known.cause}"
