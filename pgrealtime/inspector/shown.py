"""What is shown of connections and topics, without what an operator need not know. Pure."""

import re
from collections.abc import Mapping

from pgrealtime.auth.principal import AuthRecord, Caller, Guest
from pgrealtime.bus.base import TAG_LENGTH
from pgrealtime.observe.redact import REDACTED, redact_text
from pgrealtime.protocol.topic import Topic

_REF_LENGTH = TAG_LENGTH + 10
"""Of 40 characters: what is left can't be guessed."""
_MAX_TEXT = 160
"""Characters of one topic or filter."""
_LITERAL = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?<![\w.@])\d+(?:\.\d+)?\b""")
_SHOWN_OPTIONS = ("expand", "fields", "mode", "sort")
"""Options that name fields and no values."""


def ref_of(client_id: str) -> str:
    """Return the beginning of a client id, by which a connection is named."""
    return client_id[:_REF_LENGTH]


def caller_name(caller: Caller) -> str:
    """Return who the caller is."""
    match caller.principal:
        case AuthRecord(collection_name=name, id=record_id):
            return f"{name}/{record_id}"
        case Guest():
            return "guest"
        case _:
            return "superuser"


def filter_form(text: str) -> str:
    """Return a filter with its values left out: filters of one form cost the same."""
    return cut(_LITERAL.sub("…", redact_text(text)))


def option_names(topic: Topic) -> list[str]:
    """Return the names of a topic's options but the filter; of some their texts too."""
    names = [
        f"{name}={cut(value)}" if name in _SHOWN_OPTIONS else name
        for name, value in topic.query.items()
        if name != "filter"
    ]
    return [*names, *(f"header {name}" for name in topic.headers)]


def topic_text(topic: Topic) -> str:
    """Return a topic, its filter as a form, and the names of its other options."""
    path = cut(redact_text(topic.text.partition("?")[0]))
    filter_ = topic.query.get("filter", "")
    parts = [*([f"filter: {filter_form(filter_)}"] if filter_ else []), *option_names(topic)]
    return f"{path} ({', '.join(parts)})" if parts else path


def cut(text: str) -> str:
    """Return the text, or its beginning."""
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


def without_option_values(line: str, topic: Topic) -> str:
    """Return a line of an explanation without tokens, and values of the topic's own options."""
    for values in (topic.query, topic.headers):
        for value in _secret_values(values):
            line = line.replace(value, REDACTED)
    return redact_text(line)


def _secret_values(values: Mapping[str, str]) -> list[str]:
    shown = (*_SHOWN_OPTIONS, "filter")
    return sorted((v for name, v in values.items() if name not in shown and v), key=len)[::-1]
