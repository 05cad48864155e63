"""The body of a subscribe call: from bytes to a checked ``SubscribeCall``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from pgrealtime.api.error_responses import (
    BLANK_MEMBER,
    MemberFault,
    MemberFaults,
    _length_too_long,
    length_out_of_range,
)
from pgrealtime.errors import SubscriptionError
from pgrealtime.protocol.form_json import fold_name, json_payloads, read_string_or_empty
from pgrealtime.protocol.forms import FormError, parse_form
from pgrealtime.protocol.json_reader import JsonError, JsonReader

_FORM_CONTENT_TYPES: Final = ("multipart/form-data", "application/x-www-form-urlencoded")

_MAX_CLIENT_ID_BYTES: Final = 255
_MAX_SUBSCRIPTIONS: Final = 1000
_MAX_SUBSCRIPTION_BYTES: Final = 2500


@dataclass(frozen=True, slots=True)
class SubscribeCall:
    """What a client submitted, as it submitted it."""

    client_id: str = ""
    subscriptions: tuple[str, ...] = ()


def parse_subscribe_call(content_type: str, body: bytes, query: bytes) -> SubscribeCall:
    """Return what the body says.

    Args:
        content_type: The header as sent; compared by prefix and case, as PocketBase does.
        body: All of it. Only a body that isn't there at all is empty; see ``SubscribeCall()``.
        query: The query string of the URL, whose values count as a form's.

    Raises:
        SubscriptionError: It can't be read (``body_unreadable``), the reason never told.
    """
    try:
        if content_type.startswith("application/json"):
            return _call_from_json(body)
        if content_type.startswith(_FORM_CONTENT_TYPES):
            return _call_from_form(parse_form(content_type, body, query))
    except (JsonError, FormError) as error:
        raise SubscriptionError("the body can't be read", code="body_unreadable") from error
    raise SubscriptionError("the content type isn't known", code="body_unreadable")


@dataclass(slots=True)
class _SubscribeCallBuilder:
    """A call in the making: later members overwrite earlier ones."""

    client_id: str = ""
    subscriptions: list[str] = field(default_factory=list)

    def build(self) -> SubscribeCall:
        return SubscribeCall(self.client_id, tuple(self.subscriptions))


def _call_from_json(body: bytes) -> SubscribeCall:
    """Read the first value; what follows it is nobody's business. Case doesn't matter here."""
    draft = _SubscribeCallBuilder()
    _read_members(draft, JsonReader(body), normalize_name=fold_name)
    return draft.build()


def _call_from_form(pairs: list[tuple[bytes, bytes]]) -> SubscribeCall:
    """Read repeated keys; on top of them each ``@jsonPayload``: one JSON value, exact names.

    Bytes that aren't UTF-8 become U+FFFD, as which every client would read them back.
    """
    client_ids = [value.decode(errors="replace") for name, value in pairs if name == b"clientId"]
    draft = _SubscribeCallBuilder(
        client_ids[0] if client_ids else "",
        [value.decode(errors="replace") for name, value in pairs if name == b"subscriptions"],
    )
    for reader in json_payloads(pairs):
        _read_members(draft, reader, normalize_name=str)
    return draft.build()


def _read_members(
    builder: _SubscribeCallBuilder, reader: JsonReader, *, normalize_name: Callable[[str], str]
) -> None:
    """Let the members of an object overwrite the draft's; null empties the whole.

    Args:
        builder: Keeps what no member names.
        reader: Stands before the object.
        normalize_name: Brings a member's name into the form in which names are compared.
    """
    if reader.consume_null():
        builder.client_id, builder.subscriptions = "", []
        return
    seen: set[str] = set()
    for name in reader.members():
        member = normalize_name(name)
        if member in seen:
            raise JsonError("repeated member")
        if member == normalize_name("clientId"):
            builder.client_id = read_string_or_empty(reader)
        elif member == normalize_name("subscriptions"):
            builder.subscriptions = _read_strings_or_empty(reader)
        else:
            reader.skip()
            continue
        seen.add(member)


def _read_strings_or_empty(reader: JsonReader) -> list[str]:
    return (
        [] if reader.consume_null() else [read_string_or_empty(reader) for _ in reader.elements()]
    )


def find_call_faults(call: SubscribeCall) -> MemberFaults:
    """Return everything that is wrong with a call, empty if nothing is. Lengths are in bytes."""
    faults: dict[str, MemberFault | MemberFaults] = {}
    if not call.client_id:
        faults["clientId"] = BLANK_MEMBER
    elif len(call.client_id.encode()) > _MAX_CLIENT_ID_BYTES:
        faults["clientId"] = length_out_of_range(1, _MAX_CLIENT_ID_BYTES)
    if len(call.subscriptions) > _MAX_SUBSCRIPTIONS:
        faults["subscriptions"] = _length_too_long(_MAX_SUBSCRIPTIONS)
    elif too_long := {
        str(index): _length_too_long(_MAX_SUBSCRIPTION_BYTES)
        for index, text in enumerate(call.subscriptions)
        if len(text.encode()) > _MAX_SUBSCRIPTION_BYTES
    }:
        faults["subscriptions"] = too_long
    return faults
