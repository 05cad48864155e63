"""Topics with options, as clients submit them."""

import json
from urllib.parse import quote


def topic(name: str, **query: str) -> str:
    """Return the topic with a query in its options, if there is one."""
    return f"{name}?options={quote(json.dumps({'query': query}))}" if query else name
