"""The body of a subscribe call: from bytes to a checked ``SubscribeBody``, for ``api.realtime``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from pgrealtime.api.error_responses import (
    BLANK_MEMBER,
    MemberFault,
    MemberFaults,
    length_out_of_range,
    length_too_long,
)
from pgrealtime.errors import SubscriptionError
from pgrealtime.protocol.form_json import fold_name, json_payloads, open_body, read_string_or_empty
from pgrealtime.protocol.forms import FormError, FormPair
from pgrealtime.protocol.json_reader import JsonError, JsonReader

_MAX_CLIENT_ID_BYTES: Final = 255
_MAX_SUBSCRIPTIONS: Final = 1000
_MAX_SUBSCRIPTION_BYTES: Final = 2500


@dataclass(frozen=True, slots=True)
class SubscribeBody:
    """A subscribe call as submitted, unchecked. One without a body has the defaults."""

    client_id: str = ""
    topic_texts: tuple[str, ...] = ()


def parse_subscribe_body(content_type: str, body: bytes, query: bytes) -> SubscribeBody:
    """Parse a body; for the arguments see ``form_json.open_body``.

    Raises:
        SubscriptionError: It can't be read (``body_unreadable``). The client isn't told why.
    """
    builder = _SubscribeBodyBuilder()
    try:
        match open_body(content_type, body, query):
            case JsonReader() as reader:
                # Only the first value is read; what follows it is ignored, as PocketBase does.
                builder.read_members(reader, normalize_name=fold_name)
            case list() as pairs:
                builder.read_form(pairs)
            case None:
                raise SubscriptionError("the content type isn't known", code="body_unreadable")
    except (JsonError, FormError) as error:
        raise SubscriptionError("the body can't be read", code="body_unreadable") from error
    return SubscribeBody(builder.client_id, tuple(builder.topic_texts))


@dataclass(slots=True)
class _SubscribeBodyBuilder:
    """A call being read: later members overwrite earlier ones."""

    client_id: str = ""
    topic_texts: list[str] = field(default_factory=list)

    def read_form(self, pairs: list[FormPair]) -> None:
        """Read repeated keys, then each ``@jsonPayload``, whose names must match exactly.

        Bytes that aren't UTF-8 become U+FFFD, as they do in every client that reads them back.
        """
        ids = [value.decode(errors="replace") for name, value in pairs if name == b"clientId"]
        self.client_id = ids[0] if ids else ""
        self.topic_texts = [
            value.decode(errors="replace") for name, value in pairs if name == b"subscriptions"
        ]
        for reader in json_payloads(pairs):
            self.read_members(reader, normalize_name=str)

    def read_members(self, reader: JsonReader, *, normalize_name: Callable[[str], str]) -> None:
        """Read an object's members, whose names are compared normalized; null resets the call."""
        if reader.consume_null():
            self.client_id, self.topic_texts = "", []
            return
        seen: set[str] = set()
        for name in reader.members():
            member = normalize_name(name)
            if member in seen:
                raise JsonError("repeated member")
            if member == normalize_name("clientId"):
                self.client_id = read_string_or_empty(reader)
            elif member == normalize_name("subscriptions"):
                self.topic_texts = _read_strings_or_empty(reader)
            else:
                reader.skip()
                continue
            seen.add(member)


def _read_strings_or_empty(reader: JsonReader) -> list[str]:
    if reader.consume_null():
        return []
    return [read_string_or_empty(reader) for _ in reader.elements()]


def find_call_faults(call: SubscribeBody) -> MemberFaults:
    """Return the invalid members of a call, empty if there are none. Lengths are in bytes."""
    faults: dict[str, MemberFault | MemberFaults] = {}
    if not call.client_id:
        faults["clientId"] = BLANK_MEMBER
    elif len(call.client_id.encode()) > _MAX_CLIENT_ID_BYTES:
        faults["clientId"] = length_out_of_range(1, _MAX_CLIENT_ID_BYTES)
    if len(call.topic_texts) > _MAX_SUBSCRIPTIONS:
        faults["subscriptions"] = length_too_long(_MAX_SUBSCRIPTIONS)
    elif too_long := {
        str(index): length_too_long(_MAX_SUBSCRIPTION_BYTES)
        for index, text in enumerate(call.topic_texts)
        if len(text.encode()) > _MAX_SUBSCRIPTION_BYTES
    }:
        faults["subscriptions"] = too_long
    return faults
