"""Seals messages for a bus that others can listen to and write to, and cuts them into parts. Pure.

A message is compressed if it is large, cut, and each part is encrypted and authenticated with
AES-256-GCM by itself, so that nothing of a sender without the secret is ever collected. A part is
bound to its message, its sender, its recipient and its time: one that is sent again, to anybody, at
any time, is refused. The answer to a request has the id of the request, so it fits no other.

A part is a head and the sealed text. The head (38 bytes, big endian) is authenticated too: version
u8, kind u8, index u16, count u16, zero u16, sender's time in ms u64, sender's tag 6, message id 16.
"""

import hmac
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pgrealtime.errors import BusError

MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""A call has at most 1,000 topics of 2,500 bytes and a header of 32 KiB."""
MESSAGE_ID_BYTES: Final = 16
FRESH_MS: Final = 30_000
"""A request is refused this long after it was sent; until then its id is remembered."""

_VERSION: Final = 1
_HEAD: Final = struct.Struct(">BBHHHQ6s16s")
_TAG_BYTES: Final = 16
"""Of AES-GCM, at the end of the sealed text."""
LARGE_BYTES: Final = 64 * 1024
_PLAIN: Final = b"\x00"
_DEFLATED: Final = b"\x01"
_MAX_COLLECTED_BYTES: Final = 16 * 1024 * 1024
"""Parts of incomplete messages that are kept."""


class Kind(IntEnum):
    """What a message is."""

    REQUEST = 0
    ANSWER = 1
    REFUSAL = 2
    """Instead of an answer: the recipient can't give one now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """Who sends what kind of message to whom."""

    kind: Kind
    message_id: bytes
    """Random; an answer, or a refusal, has its request's."""
    sender: str
    recipient: str
    """Tags."""


def derive_key(secret: str, name: str) -> bytes:
    """Return the key of a cluster."""
    return hmac.digest(secret.encode(), b"pgrealtime bus\0" + name.encode(), sha256)


def seal(
    key: bytes, envelope: Envelope, data: bytes, *, now_ms: int, part_bytes: int
) -> list[bytes]:
    """Return the parts of a message, of at most ``part_bytes`` each.

    Takes milliseconds for more than ``LARGE_BYTES``.
    """
    content = _PLAIN + data if len(data) < LARGE_BYTES else _DEFLATED + zlib.compress(data, 1)
    room = part_bytes - _HEAD.size - _TAG_BYTES
    chunks = [content[start : start + room] for start in range(0, len(content), room)]
    cipher, sender = _cipher(key, envelope), envelope.sender.encode()
    parts = []
    for n, chunk in enumerate(chunks):
        head = _HEAD.pack(
            *(_VERSION, envelope.kind, n, len(chunks), 0, now_ms, sender, envelope.message_id)
        )
        associated = head + envelope.recipient.encode()
        parts.append(head + cipher.encrypt(_nonce(n), chunk, associated))
    return parts


def _cipher(key: bytes, envelope: Envelope) -> AESGCM:
    # A key for each message: then the index of a part is nonce enough, and no number of messages is
    # too large for one key.
    context = bytes((envelope.kind,)) + envelope.sender.encode() + envelope.message_id
    return AESGCM(hmac.digest(key, context, sha256))


def _nonce(index: int) -> bytes:
    return index.to_bytes(12, "big")


@dataclass(slots=True)
class _Incomplete:
    count: int
    sent_ms: int
    chunks: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Opened:
    """A whole message that was sealed with this cluster's key, for this process, and is new."""

    envelope: Envelope
    content: bytes
    """For ``unpack``, which takes milliseconds where it is large."""


class Opener:
    """Opens the parts that one process receives, and joins them.

    ``is_awaited`` says whether an answer to a request of this id is waited for.
    """

    def __init__(self, key: bytes, tag: str, is_awaited: Callable[[bytes], bool]) -> None:
        self._key = key
        self._tag = tag
        self._is_awaited = is_awaited
        self._incomplete: dict[Envelope, _Incomplete] = {}
        self._collected_bytes = 0
        self._seen: dict[bytes, int] = {}
        """Ids of the requests that were opened, with their time, in order of arrival."""

    def open(self, part: bytes, *, now_ms: int) -> Opened | None:
        """Take a part; return the message that it completes, if any.

        Raises:
            BusError: The part is ignored, by its code: ``call_malformed``, ``call_unsealed``,
                ``call_stale``, ``call_replayed`` or ``call_too_large``.
        """
        if len(part) < _HEAD.size + _TAG_BYTES:
            raise _ignored("malformed")
        head = part[: _HEAD.size]
        version, kind, index, count, _, sent_ms, sender, message_id = _HEAD.unpack(head)
        if version != _VERSION or kind > Kind.REFUSAL or index >= count or not sender.isascii():
            raise _ignored("malformed")
        envelope = Envelope(
            kind=Kind(kind), message_id=message_id, sender=sender.decode(), recipient=self._tag
        )
        try:
            chunk = _cipher(self._key, envelope).decrypt(
                _nonce(index), part[_HEAD.size :], head + self._tag.encode()
            )
        except InvalidTag:
            raise _ignored("unsealed") from None
        self._forget(now_ms)
        if envelope.kind is Kind.REQUEST:
            if abs(now_ms - sent_ms) >= FRESH_MS:
                raise _ignored("stale")
            if message_id in self._seen:
                raise _ignored("replayed")
        elif not self._is_awaited(message_id):
            raise _ignored("replayed")
        content = self._join(envelope, index, count, sent_ms, chunk)
        if content is None:
            return None
        if envelope.kind is Kind.REQUEST:
            self._seen[message_id] = sent_ms
        return Opened(envelope, content)

    def clear(self) -> None:
        """Forget incomplete messages: their parts were lost with a connection."""
        self._incomplete.clear()
        self._collected_bytes = 0

    def _join(
        self, envelope: Envelope, index: int, count: int, sent_ms: int, chunk: bytes
    ) -> bytes | None:
        if count == 1:
            return chunk
        collected = self._incomplete.get(envelope)
        if collected is None:
            collected = self._incomplete[envelope] = _Incomplete(count, sent_ms)
        if index in collected.chunks or count != collected.count:
            raise _ignored("replayed")
        if self._collected_bytes + len(chunk) > _MAX_COLLECTED_BYTES:
            raise _ignored("too_large")
        collected.chunks[index] = chunk
        self._collected_bytes += len(chunk)
        if len(collected.chunks) < count:
            return None
        self._drop(envelope)
        return b"".join(collected.chunks[n] for n in range(count))

    def _forget(self, now_ms: int) -> None:
        """Forget what is too old to be accepted anyway."""
        # In order of arrival, not of time: some are remembered for longer than they need to be.
        while self._seen:
            message_id, sent_ms = next(iter(self._seen.items()))
            if now_ms - sent_ms < FRESH_MS:
                break
            del self._seen[message_id]
        for envelope, collected in list(self._incomplete.items()):
            if now_ms - collected.sent_ms >= FRESH_MS:
                self._drop(envelope)

    def _drop(self, envelope: Envelope) -> None:
        dropped = self._incomplete.pop(envelope)
        self._collected_bytes -= sum(map(len, dropped.chunks.values()))


def is_compressed(content: bytes) -> bool:
    """Whether to unpack it takes long."""
    return content[:1] == _DEFLATED


def unpack(content: bytes) -> bytes:
    """Return the data of a message.

    Raises:
        BusError: Code ``call_malformed`` or ``call_too_large``.
    """
    if content[:1] == _PLAIN:
        data = content[1:]
    elif content[:1] == _DEFLATED:
        inflater = zlib.decompressobj()
        try:
            data = inflater.decompress(content[1:], MAX_MESSAGE_BYTES + 1)
        except zlib.error:
            raise _ignored("malformed") from None
        if not inflater.eof and len(data) <= MAX_MESSAGE_BYTES:
            raise _ignored("malformed")
    else:
        raise _ignored("malformed")
    if len(data) > MAX_MESSAGE_BYTES:
        raise _ignored("too_large")
    return data


def _ignored(reason: str) -> BusError:
    return BusError(f"a message on the bus is {reason}", code=f"call_{reason}")
