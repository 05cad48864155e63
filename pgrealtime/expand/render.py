"""Writes loaded related records as the JSON of the member ``expand``, within a size limit.

``load`` calls it once the snapshot has ended. Pure.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import msgspec
from msgspec import Raw

from pgrealtime.expand.node import RecordNode
from pgrealtime.expand.plan import ExpandBranch, ExpandPath, ExpandViewer, merge_paths
from pgrealtime.records.encode import View

RenderRecord: TypeAlias = Callable[[RecordNode, View, bytes | None], bytes]
"""Makes the JSON of a node's record; takes the JSON of its own ``expand``, if it has one."""

_encode_json = msgspec.json.Encoder().encode


class ExpandTooLargeError(Exception):
    """A record's ``expand`` has more bytes than it may have."""


def render_expand(
    root: RecordNode, viewer: ExpandViewer, render_record: RenderRecord, *, max_bytes: int
) -> bytes | None:
    """Return the JSON of the member ``expand`` for a viewer; None for a record without one.

    Raises:
        ExpandTooLargeError: It has more than ``max_bytes``.
        ValueError: A related row can't be encoded.
        LookupError: Likewise.
    """
    return ExpandRenderer([root], viewer, render_record, max_bytes=max_bytes).render(root)


class ExpandRenderer:
    """Writes the member ``expand`` of records that are shown together, for one viewer.

    A path of the option is followed for all of them at once: where it is refused for one, it adds
    nothing to any. ``max_bytes`` bounds each record's member.
    """

    def __init__(
        self,
        roots: Sequence[RecordNode],
        viewer: ExpandViewer,
        render_record: RenderRecord,
        *,
        max_bytes: int,
    ) -> None:
        self._branches = merge_paths(
            path.hops for path in viewer.plan.paths if _is_path_visible(roots, path)
        )
        self._writer = _ExpandWriter(viewer, render_record, max_bytes)

    def render(self, root: RecordNode) -> bytes | None:
        """Return the JSON for one of the records, or raise as ``render_expand``."""
        return self._writer.write_members(root, self._branches) if self._branches else None


def _is_path_visible(roots: Sequence[RecordNode], path: ExpandPath) -> bool:
    """Whether no record on the path was refused: a path with one refusal adds nothing at all."""
    level: Iterable[RecordNode] = roots
    for hop in path.hops:
        next_level: dict[RecordNode, None] = {}
        for node in level:
            children = node.children.get(hop.name)
            if children is None:
                return False
            next_level.update(dict.fromkeys(children))
        level = next_level
    return not (path.has_unknown_name and any(level))


class _ExpandWriter:
    """Writes related records; one that is shown several times is encoded once."""

    def __init__(self, viewer: ExpandViewer, render_record: RenderRecord, max_bytes: int) -> None:
        self._viewer = viewer
        self._render_record = render_record
        self._max_bytes = max_bytes
        self._written_records: dict[RecordNode, Raw] = {}
        """A node belongs to one branch of the plan, so its children are the same each time."""

    def write_members(self, node: RecordNode, branches: Mapping[str, ExpandBranch]) -> bytes:
        """Return the JSON of a record's ``expand``, its names sorted by their bytes."""
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
