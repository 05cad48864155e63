"""The connection to NATS: names, credentials, and how often it is tried again."""

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from nats.aio.client import Client
from nats.errors import Error as NatsError

from pgrealtime.config.model import LogConfig
from pgrealtime.errors import LogError

log = structlog.get_logger(__name__)

_CONNECT_SECONDS = 2
_RECONNECT_SECONDS: Any = 0.1
_PING_SECONDS = 5
"""A connection on which the server has been silent for two of them is replaced."""
_FLUSH_SECONDS = 2.0
_API = ("STREAM.CREATE", "STREAM.INFO", "DIRECT.GET")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNames:
    """Subjects and stream of a cluster's name."""

    name: str

    @property
    def stream(self) -> str:
        """The stream's name."""
        return f"PGRT_{self.name}"

    @property
    def permissions(self) -> str:
        """What a NATS user needs, as a server's configuration has it."""
        api = (f"$JS.API.{what}.{self.stream}" for what in _API)
        publish = ", ".join(f'"{subject}"' for subject in (self.subject(">"), *api))
        return f'publish: [{publish}], subscribe: ["{self.subject(">")}"]'

    def subject(self, *words: str) -> str:
        """Return a subject: ``log``, ``live``, ``beat``, ``node``, ``ask``, ``call``."""
        return ".".join(("pgrt", self.name, *words))


class _NoTlsError(NatsError):
    """The server offers no TLS."""

    def __str__(self) -> str:
        return "nats: the server offers no TLS"


class _Client(Client):
    """A client that logs in only over TLS, if it was told to.

    The library leaves that to the server: one that somebody else runs at the address would be sent
    the password in plain text.
    """

    requires_tls = False

    def _connect_command(self) -> bytes:
        if self.requires_tls and not self._server_info.get("tls_required"):
            raise _NoTlsError
        return super()._connect_command()


def error_code_of(error: Exception) -> str:
    """Return the code of what a connection met: ``log_tls``, ``log_denied`` or ``log_away``."""
    if isinstance(error, ssl.SSLError | _NoTlsError):
        return "log_tls"
    text = str(error).lower()
    refusals = ("authorization violation", "permissions violation", "user authentication")
    return "log_denied" if any(words in text for words in refusals) else "log_away"


def reason_of(error: Exception) -> str:
    """Return what a connection met in words."""
    return f"{type(error).__name__}: {error}"[:300]


@asynccontextmanager
async def connect(
    config: LogConfig,
    names: LogNames,
    *,
    client_name: str,
    on_error: Callable[[Exception], None] | None = None,
    on_disconnected: Callable[[], None] | None = None,
    on_reconnected: Callable[[], None] | None = None,
) -> AsyncIterator[Client]:
    """Connect to NATS, and again whenever the connection breaks. Waits until the first answer.

    ``on_error`` receives errors instead of the log.

    Raises:
        LogError: The credentials can't be read.
    """
    reported = set[str]()
    is_closing = False

    async def on_any_error(error: Exception) -> None:
        if on_error is not None:
            on_error(error)
            return
        # While the server is away, each attempt fails in the same way.
        reason = reason_of(error)
        if reason not in reported:
            reported.add(reason)
            log.warning("nats.error", code=error_code_of(error), reason=reason)

    async def on_away() -> None:
        if is_closing:
            return
        log.warning("log.away", stream=names.stream)
        if on_disconnected is not None:
            on_disconnected()

    async def on_back() -> None:
        reported.clear()
        log.info("log.back", stream=names.stream)
        if on_reconnected is not None:
            on_reconnected()

    servers = [part.strip() for part in config.nats.split(",")]
    client = _Client()
    client.requires_tls = config.tls.is_configured or any(
        server.startswith("tls://") for server in servers
    )
    await client.connect(
        servers=servers,
        name=client_name,
        error_cb=on_any_error,
        disconnected_cb=on_away,
        reconnected_cb=on_back,
        allow_reconnect=True,
        max_reconnect_attempts=-1,
        connect_timeout=_CONNECT_SECONDS,
        reconnect_time_wait=_RECONNECT_SECONDS,
        ping_interval=_PING_SECONDS,
        max_outstanding_pings=2,
        inbox_prefix=names.subject("inbox"),
        flush_timeout=_FLUSH_SECONDS,
        **_security_options(config),
    )
    try:
        yield client
    finally:
        is_closing = True
        await client.close()


def _security_options(config: LogConfig) -> dict[str, Any]:
    """Return the client library's options for credentials and TLS.

    Raises:
        LogError: A file can't be read (``log_credentials``).
    """
    options: dict[str, Any] = {}
    try:
        if config.credentials_file:
            options |= _credentials_options(config.credentials_file)
        if config.tls.is_configured:
            context = ssl.create_default_context(cafile=config.tls.ca_file or None)
            if config.tls.cert_file:
                context.load_cert_chain(config.tls.cert_file, config.tls.key_file or None)
            options["tls"] = context
    except (OSError, ValueError) as error:
        where = "TLS" if isinstance(error, ssl.SSLError) else "log.credentials_file"
        raise LogError(
            "a file of section log can't be read",
            detail=f"{type(error).__name__}: {getattr(error, 'filename', None) or where}.",
            hint="See log.credentials_file and log.tls.",
            code="log_credentials",
        ) from error
    return options


def _credentials_options(file: str) -> dict[str, Any]:
    """Return the client library's options for a file with a JWT and a seed, or with a seed alone.

    Raises:
        OSError: The file can't be read.
        ValueError: It has no such thing. The text says nothing of it.
    """
    import nkeys  # noqa: PLC0415 (needed for such a file only)

    before, mark, after = Path(file).read_text().partition("-----BEGIN USER NKEY SEED")
    is_credentials = "BEGIN NATS USER JWT" in before and bool(mark)
    seed = after.splitlines()[1:2] if is_credentials else [before.strip()]
    try:
        nkeys.from_seed(bytearray("".join(seed).encode()))
    except (nkeys.NkeysError, ValueError):
        raise ValueError("no seed") from None
    return {"user_credentials" if is_credentials else "nkeys_seed": file}
