"""``pgrealtime listen``: a subscriber in the terminal, one that asks for positions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout

from pgrealtime.api.realtime import OUTCOME_HEADER
from pgrealtime.errors import SubscriptionError

_CONNECT_SECONDS = 10.0
_SILENCE_SECONDS = 120.0
"""Without a byte, heartbeats included, the connection counts as lost."""

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 10.0

_MAX_BODY_CHARACTERS = 500
"""Characters of an answer that nobody expected."""

_HINTS: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "Guests aren't let in (auth.allow_guests): give a token that holds.",
    HTTPStatus.NOT_FOUND: "Perhaps the service has a base path: --url http://HOST:PORT/PATH.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSentEvent:
    """A Server-Sent Event as it came."""

    id: str = ""
    event: str = ""
    data: str = ""


async def parse_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[ServerSentEvent]:
    """Yield the events of a stream whose lines end with LF; comments have none.

    Source: HTML standard, section 9.2.6.
    """
    rest = bytearray()
    searched = 0
    async for piece in chunks:
        rest += piece
        while (end := rest.find(b"\n\n", searched)) >= 0:
            frame = _parse_event(rest[:end].decode())
            del rest[: end + 2]
            searched = 0
            if frame is not None:
                yield frame
        searched = max(0, len(rest) - 1)


def _parse_event(text: str) -> ServerSentEvent | None:
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        name, colon, value = line.partition(":")
        if colon and name in {"id", "event", "data"}:
            value = value.removeprefix(" ")
            fields[name] = f"{fields[name]}\n{value}" if name == "data" in fields else value
    return ServerSentEvent(**fields) if fields else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenTarget:
    """What is to be heard, and where."""

    url: str
    """Of the service, with its base path."""
    topics: Sequence[str]
    token: str = field(default="", repr=False)


async def listen(
    target: ListenTarget,
    *,
    write_event: Callable[[str], None],
    write_status: Callable[[str], None],
    max_events: int | None,
) -> None:
    """Tell what the topics bring, over lost connections, until there were so many events.

    Args:
        target: What to listen to.
        write_event: Takes a line per event: topic, action, record.
        write_status: Takes a line about the connection, and about what was missed.
        max_events: None is for ever.

    Raises:
        SubscriptionError: Nothing answers there at first, or the topics are refused.
    """
    listener = _Listener(target, write_event, write_status)
    timeout = ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
    async with ClientSession(timeout=timeout) as http:
        while True:
            try:
                async for count in listener.receive(http):
                    if count == max_events:
                        return
                lost = "the connection has ended"
            except (ClientError, TimeoutError, ValueError) as error:
                lost = str(error) or "the connection is silent"
            except SubscriptionError as error:
                if not listener.has_subscribed:
                    raise
                lost = error.message
            if not listener.has_subscribed:
                raise _unreachable_error(target.url, lost)
            write_status(f"{lost}; once more in {listener.pause_seconds:g} s")
            await asyncio.sleep(listener.pause_seconds)
            listener.pause_seconds = min(listener.pause_seconds * 2, _LONGEST_PAUSE_SECONDS)


class _Listener:
    """What must be known from one connection to the next."""

    def __init__(
        self,
        target: ListenTarget,
        write_event: Callable[[str], None],
        write_status: Callable[[str], None],
    ) -> None:
        self._target = target
        self._write_event = write_event
        self._write_status = write_status
        self._position = ""
        self._event_count = 0
        self.has_subscribed = False
        self.pause_seconds = _FIRST_PAUSE_SECONDS

    async def receive(self, http: ClientSession) -> AsyncIterator[int]:
        """Listen on one connection; yield how many events there were so far."""
        url = f"{self._target.url}/api/realtime"
        async with http.get(url, params={"lastEventId": self._position}) as response:
            if response.status != HTTPStatus.OK:
                raise _refused_error(url, response.status, await response.text())
            async for frame in parse_events(response.content.iter_any()):
                self._position = frame.id or self._position
                match frame.event:
                    case "PB_CONNECT":
                        await self._subscribe(http, url, json.loads(frame.data)["clientId"])
                    case "PB_CURSOR":
                        pass
                    case "PB_RESYNC":
                        self._write_status(_describe_gap(json.loads(frame.data)))
                    case _:
                        self._event_count += 1
                        self._write_event(_event_line(frame))
                        yield self._event_count

    async def _subscribe(self, http: ClientSession, url: str, client_id: str) -> None:
        token = self._target.token
        body = {"clientId": client_id, "subscriptions": self._target.topics}
        headers = {OUTCOME_HEADER: "1"} | ({"Authorization": token} if token else {})
        async with http.post(url, json=body, headers=headers) as answer:
            if answer.status != HTTPStatus.NO_CONTENT:
                raise _refused_error(url, answer.status, await answer.text())
            outcome = answer.headers.get(OUTCOME_HEADER, "")
        self.has_subscribed = True
        self.pause_seconds = _FIRST_PAUSE_SECONDS
        self._write_status(f"listening to {' '.join(self._target.topics)} at {self._target.url}")
        self._write_outcome(outcome)

    def _write_outcome(self, outcome: str) -> None:
        """Say what the answer to the call leaves open; services of before say nothing."""
        said = dict(part.split("=", 1) for part in outcome.split("; ") if "=" in part)
        if self._target.token and said.get("caller") == "guest":
            self._write_status("the token is refused: this is what a guest hears")
        for place in filter(None, said.get("mute", "").split(",")):
            topic = self._target.topics[int(place)]
            self._write_status(
                f"{topic} brings nothing: there is no such collection, or none of it is for this"
                " caller, or its options can't be used"
            )


def _event_line(event: ServerSentEvent) -> str:
    """Return what is read at a glance, then the record as it came."""
    try:
        action = json.loads(event.data)["action"]
        record = event.data.removeprefix('{"record":').removesuffix(f',"action":"{action}"}}')
    except (ValueError, KeyError, TypeError):
        return f"{event.event} {event.data}"
    return f"{event.event} {action} {record}"


def _describe_gap(gap: dict[str, Any]) -> str:
    collections = ", ".join(gap["collections"]) or "everything"
    return f"changes were missed ({gap['reason']}): load {collections} anew"


def _unreachable_error(url: str, reason: str) -> SubscriptionError:
    return SubscriptionError(
        f'nothing that could be listened to answers at "{url}"',
        detail=f"{reason[0].upper()}{reason[1:]}.",
        hint="Start the service with pgrealtime run, or name its address by --url.",
        code="service_unreachable",
    )


def _refused_error(url: str, status: int, body: str) -> SubscriptionError:
    return SubscriptionError(
        f'"{url}" answers with {status}',
        detail=body[:_MAX_BODY_CHARACTERS],
        hint=_HINTS.get(status, ""),
    )
