"""``pgrealtime listen``: subscribes in the terminal, and resumes after a lost connection."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import click
from aiohttp import ClientError, ClientSession, ClientTimeout

from pgrealtime.api.realtime import OUTCOME_HEADER
from pgrealtime.cli.address import configured_url
from pgrealtime.cli.options import config_option, read_token
from pgrealtime.cli.report import report_errors
from pgrealtime.cli.token import make_configured_token
from pgrealtime.errors import SubscriptionError

_CONNECT_SECONDS = 10.0
_SILENCE_SECONDS = 120.0
"""A connection without a byte for so long, heartbeats included, is treated as lost."""

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 10.0

_MAX_BODY_CHARACTERS = 500
"""Of an unexpected response, shown as the error's detail."""
_TOKEN_SECONDS = 30 * 86400.0
"""Lifetime of the token that --user makes."""

_HINTS: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "Guests may not subscribe (auth.allow_guests): give a valid token.",
    HTTPStatus.NOT_FOUND: "The service may have a base path: --url http://HOST:PORT/PATH.",
}


@click.command()
@config_option
@click.argument("topics", nargs=-1, required=True, metavar="TOPIC...")
@click.option("--url", help="URL of the service; by default the configured host and port.")
@click.option(
    "--token", default="", metavar="JWT", help="The caller's token; - reads it from standard input."
)
@click.option("--user", metavar="COLLECTION/ID", help="The caller, with a token signed for it.")
@click.option("--count", type=click.IntRange(min=1), help="Exit after this many events.")
def listen(
    path: str,
    *,
    topics: tuple[str, ...],
    url: str | None,
    token: str,
    user: str | None,
    count: int | None,
) -> None:
    """Subscribe in the terminal: a line per event, until Ctrl-C.

    TOPIC is what a client subscribes to, such as posts/* or posts/ID. After a lost connection it
    reconnects and resumes from the last position.
    """
    if token and user:
        raise click.UsageError("give --token or --user, not both")
    with report_errors():
        if user is not None:
            token = make_configured_token(path, user, _TOKEN_SECONDS)
        address = (url or configured_url(path)).rstrip("/")
        with suppress(KeyboardInterrupt):
            asyncio.run(_receive_events(address, topics, read_token(token), max_events=count))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSentEvent:
    """The fields of one Server-Sent Event."""

    id: str = ""
    event: str = ""
    data: str = ""


async def parse_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[ServerSentEvent]:
    """Yield the events of a stream whose lines end with LF, without comments.

    Source: HTML standard, section 9.2.6.
    """
    rest = bytearray()
    searched = 0
    async for chunk in chunks:
        rest += chunk
        while (end := rest.find(b"\n\n", searched)) >= 0:
            event = _parse_event(rest[:end].decode())
            del rest[: end + 2]
            searched = 0
            if event is not None:
                yield event
        searched = max(0, len(rest) - 1)


def _parse_event(text: str) -> ServerSentEvent | None:
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        name, colon, value = line.partition(":")
        if colon and name in {"id", "event", "data"}:
            value = value.removeprefix(" ")
            fields[name] = f"{fields[name]}\n{value}" if name == "data" in fields else value
    return ServerSentEvent(**fields) if fields else None


async def _receive_events(
    url: str, topics: Sequence[str], token: str, *, max_events: int | None
) -> None:
    """Print the events of the topics until there were ``max_events``; reconnect when needed.

    Raises:
        SubscriptionError: There is no service at first, or it refuses the topics.
    """
    listener = _Listener(url, topics, token)
    timeout = ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
    async with ClientSession(timeout=timeout) as http:
        while True:
            try:
                async for count in listener.receive(http):
                    if count == max_events:
                        return
                lost = "the connection was closed"
            except (ClientError, TimeoutError, ValueError) as error:
                lost = str(error) or "the connection timed out"
            except SubscriptionError as error:
                if not listener.has_subscribed:
                    raise
                lost = error.message
            if not listener.has_subscribed:
                raise _unreachable_error(url, lost)
            _print_status(f"{lost}; reconnecting in {listener.pause_seconds:g} s")
            await asyncio.sleep(listener.pause_seconds)
            listener.pause_seconds = min(listener.pause_seconds * 2, _LONGEST_PAUSE_SECONDS)


@dataclass(slots=True)
class _Listener:
    """Subscribes on one connection after another, and remembers the position."""

    url: str
    topics: Sequence[str]
    token: str = field(repr=False)
    position: str = ""
    event_count: int = 0
    has_subscribed: bool = False
    pause_seconds: float = _FIRST_PAUSE_SECONDS

    async def receive(self, http: ClientSession) -> AsyncIterator[int]:
        """Print the events of one connection; yield the count of events so far after each."""
        url = f"{self.url}/api/realtime"
        async with http.get(url, params={"lastEventId": self.position}) as response:
            if response.status != HTTPStatus.OK:
                raise _refused_error(url, response.status, await response.text())
            async for event in parse_events(response.content.iter_any()):
                self.position = event.id or self.position
                match event.event:
                    case "PB_CONNECT":
                        await self._subscribe(http, url, json.loads(event.data)["clientId"])
                    case "PB_CURSOR":
                        pass
                    case "PB_RESYNC":
                        _print_status(_describe_gap(json.loads(event.data)))
                    case _:
                        self.event_count += 1
                        click.echo(_event_line(event))
                        yield self.event_count

    async def _subscribe(self, http: ClientSession, url: str, client_id: str) -> None:
        body = {"clientId": client_id, "subscriptions": self.topics}
        headers = {OUTCOME_HEADER: "1"} | ({"Authorization": self.token} if self.token else {})
        async with http.post(url, json=body, headers=headers) as answer:
            if answer.status != HTTPStatus.NO_CONTENT:
                raise _refused_error(url, answer.status, await answer.text())
            outcome = answer.headers.get(OUTCOME_HEADER, "")
        self.has_subscribed = True
        self.pause_seconds = _FIRST_PAUSE_SECONDS
        _print_status(f"listening to {' '.join(self.topics)} at {self.url}")
        self._print_outcome(outcome)

    def _print_outcome(self, outcome: str) -> None:
        """Report a refused token and topics without events. Older services send no outcome."""
        outcomes = dict(part.split("=", 1) for part in outcome.split("; ") if "=" in part)
        if self.token and outcomes.get("caller") == "guest":
            _print_status("the token is refused: the caller is a guest")
        for index in filter(None, outcomes.get("mute", "").split(",")):
            _print_status(
                f"{self.topics[int(index)]} receives nothing: there is no such collection,"
                " its rule admits nothing for this caller, or its options are invalid"
            )


def _print_status(line: str) -> None:
    click.echo(line, err=True)


def _event_line(event: ServerSentEvent) -> str:
    """Return topic and action, then the record as it was received."""
    try:
        action = json.loads(event.data)["action"]
        record = event.data.removeprefix('{"record":').removesuffix(f',"action":"{action}"}}')
    except (ValueError, KeyError, TypeError):
        return f"{event.event} {event.data}"
    return f"{event.event} {action} {record}"


def _describe_gap(gap: dict[str, Any]) -> str:
    collections = ", ".join(gap["collections"]) or "everything"
    return f"gap ({gap['reason']}): reload {collections}"


def _unreachable_error(url: str, reason: str) -> SubscriptionError:
    return SubscriptionError(
        f'no service answers at "{url}"',
        detail=f"{reason[0].upper()}{reason[1:]}.",
        hint="Start the service with pgrealtime run, or give its address with --url.",
        code="service_unreachable",
    )


def _refused_error(url: str, status: int, body: str) -> SubscriptionError:
    return SubscriptionError(
        f'"{url}" answered with status {status}',
        detail=body[:_MAX_BODY_CHARACTERS],
        hint=_HINTS.get(status, ""),
    )
