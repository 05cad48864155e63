"""Writes the records found for an expand option as JSON, within a size limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import msgspec
from msgspec import Raw

from pgrealtime.expand.node import RecordNode
from pgrealtime.expand.plan import ExpandBranch, ExpandPath, ExpandViewer, _merge_paths
from pgrealtime.records.encode import View

RenderRecord: TypeAlias = Callable[[RecordNode, View, bytes | None], bytes]
"""Makes the record of a node, given what it shows as ``expand``."""


_encode_json = msgspec.json.Encoder().encode


class ExpandTooLargeError(Exception):
    """What a record would show as ``expand`` is larger than it may be."""


def render_expand(
    root: RecordNode, viewer: ExpandViewer, render_record: RenderRecord, *, max_bytes: int
) -> bytes | None:
    """Return the JSON of the member ``expand``; None for a record without one.

    Args:
        root: The record.
        viewer: Who sees it.
        render_record: Makes the related ones.
        max_bytes: Bytes that it may have.

    Raises:
        ExpandTooLargeError: It has more. Few rows make many bytes: a path that leads back and forth
            shows them again and again, a hundred posts of one author a million times in six steps.
        ValueError: A related row can't be shown.
        LookupError: Likewise.
    """
    whole = [route.hops for route in viewer.plan.paths if _is_path_visible(root, route)]
    branches = _merge_paths(whole)
    return (
        _ExpandWriter(viewer, render_record, max_bytes).write_members(root, branches)
        if branches
        else None
    )


def _is_path_visible(root: RecordNode, path: ExpandPath) -> bool:
    """Whether nothing on the way was refused: one refusal and the path adds nothing at all."""
    level: Iterable[RecordNode] = [root]
    for step in path.hops:
        following: dict[RecordNode, None] = {}
        for node in level:
            children = node.children.get(step.name)
            if children is None:
                return False
            following.update(dict.fromkeys(children))
        level = following
    return not (path.has_unknown_name and any(level))


class _ExpandWriter:
    """Writes related records, each once however often it is shown.

    Args:
        viewer: Who sees them.
        render_record: Makes records.
        max_bytes: Bytes that those beside each other may have.
    """

    def __init__(self, viewer: ExpandViewer, render_record: RenderRecord, max_bytes: int) -> None:
        self._viewer = viewer
        self._render_record = render_record
        self._max_bytes = max_bytes
        self._written_records: dict[RecordNode, Raw] = {}
        """A node stands for a record at one place of the plan, so the same is below it."""

    def write_members(self, node: RecordNode, branches: Mapping[str, ExpandBranch]) -> bytes:
        """Return the JSON of ``expand``.

        Raises:
            ExpandTooLargeError: It has more bytes than it may.
        """
        members: dict[str, Raw | list[Raw]] = {}
        size = 0
        for name in sorted(branches, key=str.encode):
            records: list[Raw] = []
            for child in node.children.get(name) or ():
                record = self._write_record(child, branches[name])
                size += len(record)
                if size > self._max_bytes:
                    raise ExpandTooLargeError
                records.append(record)
            if records:
                members[name] = records if branches[name].hop.is_list else records[0]
        return _encode_json(members)

    def _write_record(self, child: RecordNode, branch: ExpandBranch) -> Raw:
        record = self._written_records.get(child)
        if record is None:
            below = self.write_members(child, branch.branches) if branch.branches else None
            view = View(sees_hidden=self._viewer.sees_hidden, sees_email=child.sees_email)
            record = self._written_records[child] = Raw(self._render_record(child, view, below))
        return record
