"""Parses the option ``expand`` to paths of relations (protocol, 5.6). Used by ``expand.plan``.

A path with a name that isn't a relation adds nothing, not even its valid beginning: ``author.zzz``
and ``author.zzz,author`` leave a record without ``expand``, while ``author.zzz,author.team`` is
``author.team``. So whole paths are returned, and the caller, who knows the collections, drops the
invalid ones. As observed with PocketBase 0.40.6.
"""

from __future__ import annotations

from typing import Final, TypeAlias

ExpandNames: TypeAlias = tuple[str, ...]
"""Names of relations, from the record outwards."""

MAX_EXPAND_DEPTH: Final = 6


def parse_expand(text: str) -> tuple[ExpandNames, ...]:
    """Return the paths of the option, without those that are the beginning of another.

    Spaces are ignored everywhere, dots at both ends of a path. Paths are cut after six names.
    """
    items = (item.strip(".") for item in text.replace(" ", "").split(","))
    paths = dict.fromkeys(tuple(item.split(".")[:MAX_EXPAND_DEPTH]) for item in items if item)
    beginnings = {path[:length] for path in paths for length in range(1, len(path))}
    return tuple(path for path in paths if path not in beginnings)
