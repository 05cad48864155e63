"""Tries what a replica will ask of NATS. Called by the command ``check``."""

import asyncio

from pgrealtime.config.model import Config
from pgrealtime.errors import LogAwayError, LogError
from pgrealtime.log.connection import LogNames, connect, error_code_of, reason_of
from pgrealtime.log.jetstream import LogStream, stream_config

_SECONDS = 5.0


async def probe_log(config: Config) -> tuple[str, ...]:
    """Return lines about the log: what is there, and the permissions that its user needs.

    Raises:
        LogError: Another program's stream (``log_unfit``), a login or permission that is refused
            (``log_denied``), or no TLS as it was asked for (``log_tls``).
        LogAwayError: NATS, or JetStream in it, doesn't answer.
    """
    names, changelog = LogNames(name=config.cluster.name), config.changelog
    limits = stream_config(
        names, config.log, max_age=changelog.max_age, max_bytes=changelog.max_size
    )
    errors: list[Exception] = []
    try:
        async with (
            asyncio.timeout(_SECONDS),
            connect(
                config.log, names, client_name="pgrealtime check", on_error=errors.append
            ) as client,
        ):
            stream = LogStream(client, names, limits)
            heard = await client.subscribe(names.subject("probe"))
            await client.publish(names.subject("probe"), b"")
            await heard.next_msg(1.0)
            has_stream = await stream.check()
    except (TimeoutError, LogAwayError) as error:
        raise _explain(errors, names, error) from error
    state = "is there" if has_stream else "will be made"
    return (
        f'log "{names.stream}": works; the stream {state}',
        f"its user in NATS needs: {names.permissions}",
    )


def _explain(errors: list[Exception], names: LogNames, error: Exception) -> LogError:
    hint = f"The user of log.nats needs: {names.permissions}"
    refused = [(error_code_of(each), reason_of(each)) for each in errors]
    for code, reason in reversed(refused):
        if code == "log_tls":
            return LogError(
                "there is no TLS connection to NATS as section log asks for it",
                detail=reason,
                hint="The server's certificate has to be valid for the host in log.nats, and of an"
                " authority in log.tls.ca_file, or else of the system's; the server may ask for a"
                " certificate of this client (log.tls.cert_file).",
                code=code,
            )
        if code == "log_denied" and "permissions" in reason.lower():
            return LogError("NATS refuses what the log needs", detail=reason, hint=hint, code=code)
        if code == "log_denied":
            return LogError(
                "NATS refuses the login",
                hint="Check log.nats and log.credentials_file.",
                code=code,
            )
    if isinstance(error, LogAwayError):
        return LogAwayError(
            "JetStream doesn't answer",
            detail=error.message,
            hint="Enable it in the servers of log.nats (jetstream {}). " + hint,
        )
    return LogAwayError("NATS doesn't answer", detail=refused[-1][1] if refused else "")
