"""Which room may import which, and what pure code may not touch: the picture, held to the code."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import pgrealtime

_PACKAGE = Path(pgrealtime.__file__).parent

_FLOOR = (
    *("errors", "lsn", "units", "json_reader", "query_string", "changes", "sources", "config"),
    *("text_forms", "database_url", "networks"),
)
"""What every room stands on."""

_ALLOWED: dict[str, tuple[str, ...]] = {
    "": (),  # pgrealtime/__init__.py
    "errors": (),
    "lsn": (),
    "units": (),
    "json_reader": (),
    "query_string": (),
    "text_forms": (),
    "networks": (),
    "database_url": ("errors",),
    "changes": ("lsn",),
    "sources": ("errors",),
    "config": ("errors", "sources", "units"),
    "catalog": _FLOOR,
    "changelog": _FLOOR,
    "observe": _FLOOR,
    "auth.principal": (),
    "auth.record": (*_FLOOR, "catalog.model", "collections", "auth.principal"),
    "collections": (*_FLOOR, "catalog.model"),
    "records": (*_FLOOR, "catalog.model", "collections"),
    "rules": (*_FLOOR, "catalog.model", "collections", "auth.principal"),
    # The auth record is a row of a collection.
    "auth": (
        *_FLOOR,
        "catalog.model",
        "catalog.keys",
        "catalog.naming",
        "collections",
        "pool",
        "observe.redact",
    ),
    "wal": (*_FLOOR, "catalog.model", "observe.redact"),
    "relay": (*_FLOOR, "catalog.model", "wal", "changelog", "observe"),
    "pool": (),
    "turns": (),
    "hub": (
        *(*_FLOOR, "catalog.model", "catalog.keys", "catalog.naming", "collections"),
        *("rules", "records"),
        *("auth.principal", "auth.record", "changelog.base", "observe", "pool", "turns"),
    ),
    # Answers are trimmed by the same "fields" as records.
    "api": (*_FLOOR, "collections", "records", "auth", "hub", "observe", "turns"),
    "vitals": ("",),
    "reload": ("",),
    "run": ("",),
    "operate": ("",),
    "demo": ("",),
    "cli": ("",),
    "__main__": ("cli",),
}
"""Room or module -> what it may import beside itself. The longest name that fits a file counts;
``""`` on the right is everything."""

_NOT_FOR_OTHERS = ("vitals", "reload", "run", "operate", "demo", "cli", "__main__")
"""The top: nothing below imports it."""

_PURE = (
    *("errors", "lsn", "units", "json_reader", "query_string", "changes", "text_forms"),
    "networks",
    *("collections", "catalog.model", "catalog.keys"),
    *("wal.wire", "wal.message", "wal.wal2json", "wal.pgoutput", "wal.assembler", "wal.feedback"),
    *("changelog.base", "changelog.memory", "rules", "records"),
    *("auth.principal", "auth.record", "auth.token", "auth.passwords"),
    *("hub.topic", "hub.registry", "hub.match", "hub.frame"),
    *("api.problems", "api.body", "api.forms", "api.cors", "operate.telling"),
)
"""Code without loop, socket, clock and log; what keeps state does so without touching the world."""

_WORLD = (
    *("aiohttp", "aiohttp_sse", "asyncio", "http", "select", "socket", "ssl", "urllib.request"),
    *("logging", "structlog", "psycopg", "psycopg_pool", "random", "secrets", "signal"),
    *("subprocess", "threading", "time", "uvloop"),
)


class Edge(NamedTuple):
    """One import: where it stands, who imports, what."""

    place: str
    source: str
    """Dotted name below the package; empty for the package itself."""
    target: str
    """Likewise, if ``is_ours``; otherwise the full name of the foreign module."""
    is_ours: bool

    def __str__(self) -> str:
        return f"{self.place}: {self.source} -> {self.target}"


def _name_of(path: Path) -> str:
    parts = path.relative_to(_PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _edges(text: str, *, source: str, is_package: bool, place: str) -> Iterator[Edge]:
    """Yield every import of the text, those inside functions and TYPE_CHECKING included."""
    package = f"pgrealtime.{source}".rstrip(".")
    if not is_package:
        package = package.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=names):
                targets = [alias.name for alias in names]
            case ast.ImportFrom(module=module, names=names, level=level):
                dots = "." * level + (module or "")
                base = importlib.util.resolve_name(dots, package)
                targets = [_as_module(base, alias.name) for alias in names]
            case _:
                continue
        for target in targets:
            is_ours = target.split(".")[0] == "pgrealtime"
            name = target.removeprefix("pgrealtime").lstrip(".") if is_ours else target
            yield Edge(f"{place}:{node.lineno}", source, name, is_ours)


def _as_module(base: str, name: str) -> str:
    """Return ``base.name`` if that is a module of ours, or else ``base``."""
    parts = base.split(".")
    if parts[0] != "pgrealtime":
        return base
    inside = _PACKAGE.joinpath(*parts[1:], name)
    return f"{base}.{name}" if inside.is_dir() or inside.with_suffix(".py").exists() else base


def _all_edges() -> Iterator[Edge]:
    for path in sorted(_PACKAGE.rglob("*.py")):
        yield from _edges(
            path.read_text(),
            source=_name_of(path),
            is_package=path.name == "__init__.py",
            place=str(path.relative_to(_PACKAGE.parent)),
        )


def _is_in(name: str, room: str) -> bool:
    return room in ("", name) or name.startswith(room + ".")


def _room(source: str) -> str | None:
    rooms = [room for room in _ALLOWED if (_is_in(source, room) if room else not source)]
    return max(rooms, key=len, default=None)


def _may_import(source: str, target: str) -> bool:
    room = _room(source)
    if room is None:
        return False
    if any(_is_in(target, top) for top in _NOT_FOR_OTHERS) and room not in _NOT_FOR_OTHERS:
        return False
    own = source.split(".", maxsplit=1)[0]
    # The package itself holds the version. A module with an entry of its own is lower than its
    # room, so the room isn't "own" to it.
    if target == "" or (room == own and _is_in(target, own)):
        return True
    return any(_is_in(target, allowed) for allowed in _ALLOWED[room])


def _touches_the_world(edge: Edge) -> bool:
    is_pure = any(_is_in(edge.source, room) for room in _PURE)
    return is_pure and any(_is_in(edge.target, module) for module in _WORLD)


def test_every_import_points_down() -> None:
    """Nobody has to know the rooms above to understand one."""
    assert [str(e) for e in _all_edges() if e.is_ours and not _may_import(e.source, e.target)] == []


def test_every_module_has_a_place_in_the_picture() -> None:
    """A new room is drawn before it is built."""
    names = {_name_of(path) for path in _PACKAGE.rglob("*.py")}
    assert {name for name in names if _room(name) is None} == set()


def test_pure_code_touches_nothing_outside() -> None:
    """Time, randomness and the network reach it as arguments, so that it is tested with values."""
    assert [str(e) for e in _all_edges() if not e.is_ours and _touches_the_world(e)] == []


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("wal.stream", "catalog.model", True),
        ("wal.stream", "wal.wire", True),
        ("wal.stream", "hub.registry", False),
        ("wal.slot", "catalog.introspect", False),
        ("hub.dispatch", "rules.reference", True),
        ("hub.dispatch", "changelog.base", True),
        ("hub.dispatch", "changelog.memory", False),
        ("hub.dispatch", "wal.slot", False),
        ("hub.match", "auth.principal", True),
        ("hub.match", "auth.token", False),
        ("rules.lower", "hub.match", False),
        ("auth.principal", "auth.token", False),
        ("lsn", "config", False),
        ("api.realtime", "run", False),
        ("run", "wal.slot", True),
        ("cli", "run", True),
        ("cellar.door", "lsn", False),
    ],
)
def test_the_picture_says(source: str, target: str, *, allowed: bool) -> None:
    assert _may_import(source, target) is allowed


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("import pgrealtime.hub.match", "hub.match"),
        ("from pgrealtime.lsn import LSN", "lsn"),
        ("from pgrealtime import lsn", "lsn"),
        ("from pgrealtime import __version__", ""),
        ("from pgrealtime.catalog import model", "catalog.model"),
        ("from . import model", "catalog.model"),
        ("from .model import Table", "catalog.model"),
        ("from ..lsn import LSN", "lsn"),
        ("if TYPE_CHECKING:\n    from pgrealtime.lsn import LSN", "lsn"),
        ("def late():\n    import pgrealtime.lsn", "lsn"),
    ],
)
def test_every_form_of_import_is_seen(text: str, target: str) -> None:
    """An import can't hide in a function, behind TYPE_CHECKING or in dots."""
    [edge] = [
        edge
        for edge in _edges(text, source="catalog.introspect", is_package=False, place="here.py")
        if edge.is_ours
    ]
    assert (edge.source, edge.target) == ("catalog.introspect", target)


@pytest.mark.parametrize(
    ("source", "text", "touches"),
    [
        ("rules.plan", "import time", True),
        ("rules.plan", "from urllib.request import urlopen", True),
        ("rules.plan", "from urllib.parse import quote", False),
        ("wal.stream", "import asyncio", False),
        ("changelog.memory", "from psycopg import pq", True),
    ],
)
def test_the_world_is_recognised(source: str, text: str, *, touches: bool) -> None:
    [edge] = _edges(text, source=source, is_package=False, place="here.py")
    assert _touches_the_world(edge) is touches
