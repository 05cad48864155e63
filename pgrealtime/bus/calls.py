"""A subscribe call and its answer as bytes, for a bus. Pure."""

from typing import Literal, TypeVar

import msgspec
from msgspec import Struct

from pgrealtime.errors import BusError


class SubscribeCall(Struct, frozen=True, array_like=True, kw_only=True):
    """A subscribe call whose body and members were checked."""

    version: Literal[1] = 1
    client_id: str
    address: str
    """The client's, as the process that received the request sees it."""
    authorization: str | None = None
    topic_texts: tuple[str, ...] = ()
    wants_outcome: bool = False


class ReachedLimit(Struct, frozen=True, array_like=True):
    """Which topic exceeds which limit."""

    topic_index: int
    limit_name: str
    maximum: int


class CallAnswer(Struct, frozen=True, array_like=True, kw_only=True):
    """What became of a call."""

    version: Literal[1] = 1
    error_code: str = ""
    """Empty if the call was accepted."""
    limit: ReachedLimit | None = None
    """With the code ``subscription_limit``."""
    outcome: str = ""
    """If the call wants it and was accepted."""


_T = TypeVar("_T", SubscribeCall, CallAnswer)


def encode(message: SubscribeCall | CallAnswer) -> bytes:
    """Return the message as bytes."""
    if isinstance(message, SubscribeCall) and message.authorization is not None:
        # A header may hold bytes that are no text, which no token does.
        readable = message.authorization.encode("ascii", "replace").decode()
        message = msgspec.structs.replace(message, authorization=readable)
    return msgspec.msgpack.encode(message)


def decode(data: bytes, type_: type[_T]) -> _T:
    """Return the message.

    Raises:
        BusError: Code ``call_unreadable``: another version wrote it.
    """
    try:
        return msgspec.msgpack.decode(data, type=type_)
    except msgspec.DecodeError as error:
        raise BusError("the message can't be read", code="call_unreadable") from error
