"""The body of a subscribe call: from bytes to a checked ``SubscribeBody``, for ``api.realtime``."""

import re
from dataclasses import dataclass
from typing import Final

from pgrealtime.api import error_responses
from pgrealtime.api.error_responses import MemberFault, MemberFaults
from pgrealtime.errors import SubscriptionError
from pgrealtime.protocol.forms import FormError, bind_body
from pgrealtime.protocol.json_reader import JsonError

_TEXT: Final = r'"[ !#-\[\]-~]*"'
_PLAIN_BODY: Final = re.compile(
    rf'\{{"clientId": ?({_TEXT}), ?"subscriptions": ?\[((?:{_TEXT}(?:, ?{_TEXT})*)?)\]\}}'.encode()
)
_PLAIN_TEXT: Final = re.compile(r'"([^"]*)"')
"""A body as the SDKs send it: texts of printable ASCII without an escape. That is one meaning for
every reader of JSON, and to read it so takes a tenth of the time."""
_MAX_PLAIN_BYTES: Final = 64 * 1024
_MEMBERS: Final = {"clientId": False, "subscriptions": True}
_MAX_SUBSCRIPTIONS: Final = 1000
_MAX_SUBSCRIPTION_BYTES: Final = 2500


@dataclass(frozen=True, slots=True)
class SubscribeBody:
    """A subscribe call as submitted, unchecked. One without a body has the defaults."""

    client_id: str = ""
    topic_texts: tuple[str, ...] = ()


def parse_subscribe_body(content_type: str, body: bytes, query: bytes) -> SubscribeBody:
    """Parse a body; for the arguments see ``bind_body``.

    Raises:
        SubscriptionError: It can't be read (``body_unreadable``). The client isn't told why.
    """
    is_small_json = content_type == "application/json" and len(body) <= _MAX_PLAIN_BYTES
    if is_small_json and (plain := _PLAIN_BODY.fullmatch(body)):
        client_id, topic_texts = plain[1].decode()[1:-1], plain[2].decode()
        return SubscribeBody(client_id, tuple(_PLAIN_TEXT.findall(topic_texts)))
    try:
        members = bind_body(content_type, body, query, _MEMBERS)
    except (JsonError, FormError) as error:
        raise SubscriptionError("the body can't be read", code="body_unreadable") from error
    if members is None:
        raise SubscriptionError("the content type isn't known", code="body_unreadable")
    client_id = members.get("clientId", [""])[0]
    return SubscribeBody(client_id, tuple(members.get("subscriptions", ())))


def find_call_faults(call: SubscribeBody) -> MemberFaults:
    """Return the invalid members of a call, empty if there are none. Lengths are in bytes."""
    faults: dict[str, MemberFault | MemberFaults] = {}
    if not call.client_id:
        faults["clientId"] = error_responses.BLANK_MEMBER
    elif len(call.client_id.encode()) > error_responses.MAX_TEXT_BYTES:
        faults["clientId"] = error_responses.LENGTH_OUT_OF_RANGE
    if len(call.topic_texts) > _MAX_SUBSCRIPTIONS:
        faults["subscriptions"] = error_responses.length_too_long(_MAX_SUBSCRIPTIONS)
    elif too_long := {
        str(index): error_responses.length_too_long(_MAX_SUBSCRIPTION_BYTES)
        for index, text in enumerate(call.topic_texts)
        if len(text.encode()) > _MAX_SUBSCRIPTION_BYTES
    }:
        faults["subscriptions"] = too_long
    return faults
