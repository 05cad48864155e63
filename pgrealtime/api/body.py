"""The body of a subscribe call: from bytes to a checked ``SubscribeCall``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from pgrealtime.api.problems import Fault, Faults, Text
from pgrealtime.errors import SubscriptionError
from pgrealtime.protocol.forms import FormError, form_pairs
from pgrealtime.protocol.json_reader import MOST_TOKENS, JsonError, JsonReader

_FORMS: Final = ("multipart/form-data", "application/x-www-form-urlencoded")

_LONGEST_CLIENT_ID: Final = 255
_MOST_SUBSCRIPTIONS: Final = 1000
_LONGEST_SUBSCRIPTION: Final = 2500


@dataclass(frozen=True, slots=True)
class SubscribeCall:
    """What a client submitted, as it submitted it."""

    client_id: str = ""
    subscriptions: tuple[str, ...] = ()


def read_call(content_type: str, body: bytes, query: bytes) -> SubscribeCall:
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
            return _from_json(body)
        if content_type.startswith(_FORMS):
            return _from_form(form_pairs(content_type, body, query))
    except (JsonError, FormError) as error:
        raise SubscriptionError("the body can't be read", code="body_unreadable") from error
    raise SubscriptionError("the content type isn't known", code="body_unreadable")


@dataclass(slots=True)
class _Draft:
    """A call in the making: later members overwrite earlier ones."""

    client_id: str = ""
    subscriptions: list[str] = field(default_factory=list)

    def finished(self) -> SubscribeCall:
        return SubscribeCall(self.client_id, tuple(self.subscriptions))


def _from_json(body: bytes) -> SubscribeCall:
    """Read the first value; what follows it is nobody's business. Case doesn't matter here."""
    draft = _Draft()
    _read_into(draft, JsonReader(body), spelled=folded)
    return draft.finished()


def _from_form(pairs: list[tuple[bytes, bytes]]) -> SubscribeCall:
    """Read repeated keys; on top of them each ``@jsonPayload``: one JSON value, exact names.

    Bytes that aren't UTF-8 become U+FFFD, as which every client would read them back.
    """
    client_ids = [value.decode(errors="replace") for name, value in pairs if name == b"clientId"]
    draft = _Draft(
        client_ids[0] if client_ids else "",
        [value.decode(errors="replace") for name, value in pairs if name == b"subscriptions"],
    )
    for reader in payloads(pairs):
        _read_into(draft, reader, spelled=str)
    return draft.finished()


def payloads(pairs: Iterable[tuple[bytes, bytes]]) -> Iterator[JsonReader]:
    """Yield a reader for the one value of each ``@jsonPayload`` of a form.

    Together they hold no more than one text may: a form has room for thousands.
    """
    left = MOST_TOKENS
    for name, value in pairs:
        if name == b"@jsonPayload":
            reader = JsonReader(value, most_tokens=left)
            yield reader
            reader.end()
            left = reader.tokens_left


def _read_into(draft: _Draft, reader: JsonReader, *, spelled: Callable[[str], str]) -> None:
    """Let the members of an object overwrite the draft's; null empties the whole.

    Args:
        draft: Keeps what no member names.
        reader: Stands before the object.
        spelled: Brings a member's name into the form in which names are compared.
    """
    if reader.null():
        draft.client_id, draft.subscriptions = "", []
        return
    seen: set[str] = set()
    for name in reader.members():
        member = spelled(name)
        if member in seen:
            raise JsonError("repeated member")
        if member == spelled("clientId"):
            draft.client_id = string_or_empty(reader)
        elif member == spelled("subscriptions"):
            draft.subscriptions = _strings_or_empty(reader)
        else:
            reader.skip()
            continue
        seen.add(member)


def folded(name: str) -> str:
    """Return a member's name as ``encoding/json/v2`` compares it without case.

    Hyphens and underscores don't count either; of the letters that fold to ASCII only the long s
    could occur in our two names.
    """
    return name.replace("-", "").replace("_", "").replace("\u017f", "s").lower()


def string_or_empty(reader: JsonReader) -> str:
    """Return a string, empty for null."""
    return "" if reader.null() else reader.string()


def _strings_or_empty(reader: JsonReader) -> list[str]:
    return [] if reader.null() else [string_or_empty(reader) for _ in reader.elements()]


def faults_of(call: SubscribeCall) -> Faults:
    """Return everything that is wrong with a call, empty if nothing is. Lengths are in bytes."""
    faults: dict[str, Fault | Faults] = {}
    if not call.client_id:
        faults["clientId"] = BLANK
    elif len(call.client_id.encode()) > _LONGEST_CLIENT_ID:
        faults["clientId"] = out_of_range(1, _LONGEST_CLIENT_ID)
    if len(call.subscriptions) > _MOST_SUBSCRIPTIONS:
        faults["subscriptions"] = _too_long(_MOST_SUBSCRIPTIONS)
    elif too_long := {
        str(index): _too_long(_LONGEST_SUBSCRIPTION)
        for index, text in enumerate(call.subscriptions)
        if len(text.encode()) > _LONGEST_SUBSCRIPTION
    }:
        faults["subscriptions"] = too_long
    return faults


BLANK: Final = Fault("validation_required", Text("Cannot be blank.", "缺少必填值。"))
"""What is wrong with a member that must be there."""


def out_of_range(least: int, most: int) -> Fault:
    """Return what is wrong with a text that is too short or too long, in bytes."""
    return Fault(
        "validation_length_out_of_range",
        Text(
            f"The length must be between {least} and {most}.",
            f"长度必须在 {least} 到 {most} 之间。",
        ),
        {"max": most, "min": least},
    )


def _too_long(most: int) -> Fault:
    return Fault(
        "validation_length_too_long",
        Text(f"The length must be no more than {most}.", f"长度不得超过 {most}。"),
        {"max": most, "min": 0},
    )
