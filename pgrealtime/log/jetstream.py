"""The stream of the log in NATS JetStream: made, checked, appended to and read.

Knows sequences and bytes, not what they mean. No consumer is made in the server: messages come
republished on a subject of their own once they are stored, and those missed are asked for singly.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from itertools import count
from typing import Any, NamedTuple

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from pgrealtime.config.model import LogConfig
from pgrealtime.errors import LogAwayError, LogError
from pgrealtime.log.connection import LogNames

_ANSWER_SECONDS = 1.0
"""Within which the server answers a question about the stream; while copies of it elect a leader
nobody answers."""

_MAX_PENDING_BYTES = 64 * 1024 * 1024
"""Received and not read yet; beyond them messages are dropped, and asked for later."""

_NO_RESPONDERS = "503"
_WRONG_LAST_SEQUENCE = 10071
_NAME_IN_USE = 10058
_NOT_FOUND = 10059
_NO_COPIES = 10074
_NS = 1_000_000_000
_DUPLICATE_WINDOW_NS = 100_000_000
"""The least that the server accepts; nothing here relies on it."""


class AppendRefusedError(LogAwayError):
    """The log has another last sequence than the message expects: there is another owner."""

    code = "log_refused"


class StreamState(NamedTuple):
    """What the server says of the stream."""

    first: int
    """Sequence of the first message that is kept; one beyond ``last`` if none is."""
    last: int


class StoredMessage(NamedTuple):
    """A message of the log."""

    sequence: int
    before: int
    """The sequence before it; 0 if not known."""
    stored_at: str
    """The server's time, which identifies a message among those of its sequence."""
    payload: bytes


def stream_config(names: LogNames, config: LogConfig, *, max_age: float, max_bytes: int) -> Any:
    """Return the stream's configuration as the server's API has it.

    ``max_age`` and ``max_bytes`` are the changelog's. The log keeps a minute more, so that its
    window has an era at or before the changelog's begin.
    """
    return {
        "name": names.stream,
        "subjects": [names.subject("log")],
        "retention": "limits",
        "discard": "old",
        "max_age": round((max_age + 60) * _NS),
        "max_bytes": 2 * max_bytes,
        "storage": config.storage,
        "num_replicas": config.replicas,
        "deny_delete": True,
        "allow_direct": True,
        "republish": {"src": names.subject("log"), "dest": names.subject("live")},
        "duplicate_window": _DUPLICATE_WINDOW_NS,
    }


class LogStream:
    """The stream, on an open connection. ``config`` is its configuration in the server's form."""

    def __init__(self, client: Client, names: LogNames, config: Any) -> None:
        self.client = client
        self.names = names
        self._config = config
        self._acknowledgements: dict[str, asyncio.Future[int]] = {}
        self._tokens = count()
        self._inbox = ""

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to a server now."""
        return self.client.is_connected

    @property
    def max_payload(self) -> int:
        """Bytes that the server accepts in one message, less room for the header."""
        return int(self.client.max_payload) - 512

    async def open(self) -> StreamState:
        """Make the stream if it isn't there.

        Raises:
            LogError: It has other limits (``log_unfit``), or a permission is missing.
            LogAwayError: JetStream doesn't answer.
        """
        inbox = self.client.new_inbox()
        await self.client.subscribe(f"{inbox}.*", cb=self._on_acknowledgement)
        self._inbox = inbox
        return await self.ensure()

    async def ensure(self) -> StreamState:
        """Make the stream if it isn't there, and check its limits; see ``open``."""
        answer = await self._ask("STREAM.CREATE", self._config)
        code = answer.get("error", {}).get("err_code")
        if code == _NAME_IN_USE:
            raise await self._unfit_error()
        if code == _NO_COPIES:
            raise LogError(
                "NATS keeps no copies of streams",
                detail=f"log.replicas is {self._config['num_replicas']}, and this is one server"
                " without a cluster.",
                hint="Set log.replicas: 1, or make a cluster of three servers.",
            )
        return _state_of(answer)

    async def _unfit_error(self) -> LogError:
        found = (await self._ask("STREAM.INFO"))["config"]
        differing = [
            f"{key} is {found.get(key)!r} instead of {value!r}"
            for key, value in self._config.items()
            if found.get(key) != value
        ]
        return LogError(
            f'stream "{self.names.stream}" has other limits than the configuration',
            detail="; ".join(differing) + ".",
            hint="Give all replicas the same changelog and log sections. To change the limits, end"
            f" all replicas and delete the stream (nats stream rm {self.names.stream}): what it"
            " lacks is read from the slot again. Another cluster needs another cluster.name.",
        )

    async def state(self) -> StreamState:
        """Return the stream's state.

        Raises:
            LogAwayError: JetStream doesn't answer, or the stream isn't there.
        """
        return _state_of(await self._ask("STREAM.INFO"))

    async def check(self) -> bool:
        """Try what is asked of the stream, without making it; return whether it is there.

        Raises:
            LogError: As ``open``.
        """
        answer = await self._ask("STREAM.INFO")
        if answer.get("error", {}).get("err_code") == _NOT_FOUND:
            return False
        state = await self.ensure()
        await self.get(max(1, state.last))
        return True

    async def _ask(self, what: str, body: Any = None) -> dict[str, Any]:
        payload = b"" if body is None else json.dumps(body).encode()
        subject = f"$JS.API.{what}.{self.names.stream}"
        answer = await self.request(subject, payload, _ANSWER_SECONDS)
        decoded: dict[str, Any] = json.loads(answer.data)
        return decoded

    async def request(self, subject: str, payload: bytes, seconds: float) -> Msg:
        """Ask whoever listens to a subject.

        Raises:
            LogAwayError: There is no connection, no answer, or nobody.
        """
        try:
            if not self.client.is_connected:
                raise LogAwayError("there is no connection to NATS")
            return await self.client.request(subject, payload, timeout=seconds)
        except NatsError as error:
            raise LogAwayError(
                f'nobody answers on "{subject}"', detail=type(error).__name__
            ) from error

    # -- appending

    async def append(self, payload: bytes, after: int) -> asyncio.Future[int]:
        """Send a message that has to follow the sequence ``after``; return before it is stored.

        The future's result is the message's sequence; or its exception an ``AppendRefusedError``,
        or a ``LogAwayError``: then the message may be stored or not.
        """
        if not self.client.is_connected:
            raise LogAwayError("there is no connection to NATS")
        token = str(next(self._tokens))
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._acknowledgements[token] = future
        # Asked for its exception, so that one that nobody awaits any more isn't reported.
        future.add_done_callback(
            lambda done: self._acknowledgements.pop(token, done.cancelled() or done.exception())
        )
        try:
            await self.client.publish(
                self.names.subject("log"),
                payload,
                reply=f"{self._inbox}.{token}",
                headers={"Nats-Expected-Last-Sequence": str(after)},
            )
        except NatsError as error:
            raise LogAwayError(
                "a message can't be sent to NATS", detail=type(error).__name__
            ) from error
        return future

    def disconnected(self) -> None:
        """Give up the acknowledgements that are awaited: they went with the connection."""
        for future in list(self._acknowledgements.values()):
            if not future.done():
                future.set_exception(LogAwayError("the connection to NATS was lost"))

    async def _on_acknowledgement(self, message: Msg) -> None:
        future = self._acknowledgements.get(message.subject.rpartition(".")[2])
        if future is None or future.done():
            return  # nobody waits for it any more
        if (message.headers or {}).get("Status") == _NO_RESPONDERS:
            future.set_exception(LogAwayError("no stream accepts the message"))
            return
        answer = json.loads(message.data)
        error = answer.get("error")
        if error is None:
            future.set_result(int(answer["seq"]))
        elif error.get("err_code") == _WRONG_LAST_SEQUENCE:
            future.set_exception(AppendRefusedError("the log was appended to by another owner"))
        else:
            reason = str(error.get("description"))
            future.set_exception(LogAwayError("the log can't be appended to", detail=reason))

    # -- reading

    async def follow(self, on_message: Callable[[StoredMessage], Awaitable[None]]) -> None:
        """Call a function with each message once it is stored; some may be missing."""

        async def on_live(message: Msg) -> None:
            await on_message(_stored(message))

        await self.client.subscribe(
            self.names.subject("live"), cb=on_live, pending_bytes_limit=_MAX_PENDING_BYTES
        )

    async def get(self, sequence: int) -> StoredMessage | None:
        """Return a message; None if the server that answers doesn't have it.

        Raises:
            LogAwayError: No server answers.
        """
        subject = f"$JS.API.DIRECT.GET.{self.names.stream}"
        payload = json.dumps({"seq": sequence}).encode()
        answer = await self.request(subject, payload, _ANSWER_SECONDS)
        if "Status" in (answer.headers or {}):
            return None
        return _stored(answer)

    async def get_all(self, sequences: Iterable[int]) -> list[StoredMessage | None]:
        """Return several messages, asked for at once."""
        return list(await asyncio.gather(*map(self.get, sequences)))


def _state_of(answer: dict[str, Any]) -> StreamState:
    if error := answer.get("error"):
        raise LogAwayError("the stream can't be used", detail=str(error.get("description")))
    state = answer["state"]
    # An empty new stream has 0 for both; an empty old one has its first beyond its last.
    return StreamState(max(1, state["first_seq"]), state["last_seq"])


def _stored(message: Msg) -> StoredMessage:
    headers = message.headers or {}
    return StoredMessage(
        int(headers.get("Nats-Sequence", 0)),
        int(headers.get("Nats-Last-Sequence", 0)),
        headers.get("Nats-Time-Stamp", ""),
        message.data,
    )
