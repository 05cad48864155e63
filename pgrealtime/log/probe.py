"""Tries what a replica will ask of NATS. Called by the command ``check``."""

import asyncio

from pgrealtime.config.model import Config
from pgrealtime.errors import LogAwayError, LogError
from pgrealtime.log.connection import LogNames, connect
from pgrealtime.log.jetstream import LogStream, stream_config

_SECONDS = 5.0


async def probe_log(config: Config) -> tuple[str, ...]:
    """Return lines about the log: what is there, and the permissions that its user needs.

    Raises:
        LogError: Another program's stream (``log_unfit``), or a permission is missing
            (``log_denied``).
        LogAwayError: NATS, or JetStream in it, doesn't answer.
    """
    names, changelog = LogNames(name=config.cluster.name), config.changelog
    limits = stream_config(
        names, config.log, max_age=changelog.max_age, max_bytes=changelog.max_size
    )
    errors: list[str] = []
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


def _explain(errors: list[str], names: LogNames, error: Exception) -> LogError:
    hint = f"The user of log.nats needs: {names.permissions}"
    denied = [text for text in errors if "permissions violation" in text.lower()]
    if denied:
        return LogError(
            "NATS refuses what the log needs", detail=denied[-1], hint=hint, code="log_denied"
        )
    if any("authorization violation" in text.lower() for text in errors):
        return LogError(
            "NATS refuses the login",
            hint="Check log.nats and log.credentials_file.",
            code="log_denied",
        )
    if isinstance(error, LogAwayError):
        return LogAwayError(
            "JetStream doesn't answer",
            detail=error.message,
            hint="Enable it in the servers of log.nats (jetstream {}). " + hint,
        )
    return LogAwayError("NATS doesn't answer", detail=errors[-1] if errors else "")
