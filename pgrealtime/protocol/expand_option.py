"""The option ``expand``, read: which relations of a record are wanted (protocol page 5.6).

A path that names something that isn't a relation adds nothing, not even what its beginning alone
would add: ``author.zzz`` and ``author.zzz,author`` leave a record without ``expand``, while
``author.zzz,author.team`` is ``author.team``. So paths come first, whoever knows the collections
drops the ones that lead nowhere, and ``tree`` joins the rest. Seen on PocketBase 0.40.6.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias

ExpandNames: TypeAlias = tuple[str, ...]
"""Names of relations, from the record outwards."""

ExpandTree: TypeAlias = "Mapping[str, ExpandTree]"
"""Relations of a record, each with those wanted of the records it leads to."""

MAX_EXPAND_DEPTH: Final = 6


def parse_expand(text: str) -> tuple[ExpandNames, ...]:
    """Return the paths asked for, without those that are the beginning of another.

    Spaces don't count wherever they stand, nor do dots at either end. Names beyond the sixth
    are cut off.
    """
    items = (item.strip(".") for item in text.replace(" ", "").split(","))
    paths = dict.fromkeys(tuple(item.split(".")[:MAX_EXPAND_DEPTH]) for item in items if item)
    beginnings = {path[:length] for path in paths for length in range(1, len(path))}
    return tuple(path for path in paths if path not in beginnings)


def merge_into_tree(paths: Iterable[ExpandNames]) -> ExpandTree:
    """Join paths that begin alike."""
    root: dict[str, ExpandTree] = {}
    for path in paths:
        node = root
        for name in path:
            node = node.setdefault(name, {})  # type: ignore[assignment]  # ours are all dicts
    return root
