"""Which room may import which, and what pure code may not touch: the picture, held to the code."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import pgrealtime

_PACKAGE = Path(pgrealtime.__file__).parent

_FLOOR = (
    *("errors", "lsn", "changes", "history", "snapshot", "text_forms", "spelling", "caches"),
    *("fairness", "config"),
)
"""What every room stands on."""

_ENGINE = (
    *(*_FLOOR, "catalog.model", "collections.model", "auth.principal"),
    *("rules.language", "rules.sql", "rules.memory"),
)

_BELOW_HUB = (
    *("catalog.model", "catalog.assumptions", "collections", "protocol", "records", "rules"),
    *("rule_queries", "expand"),
    *("auth.principal", "auth.record", "changelog.memory", "changelog.row_history"),
    "observe.redact",
)
"""What the hub stands on besides. Its own order: events, connections, evaluation, delivery, state,
catchup, and the modules at its root."""

_ALLOWED: dict[str, tuple[str, ...]] = {
    "": (),  # pgrealtime/__init__.py
    "errors": (),
    "error_codes": (),
    "lsn": (),
    "text_forms": (),
    "spelling": (),
    "caches": (),
    "fairness": (),
    "changes": ("lsn",),
    "snapshot": ("lsn",),
    "history": ("changes",),
    "config": ("errors", "spelling"),
    "catalog": _FLOOR,
    "postgres": (*_FLOOR, "catalog"),
    "protocol": _FLOOR,
    "changelog": _FLOOR,
    "observe": _FLOOR,
    "bus": (*_FLOOR, "postgres.url", "observe.redact"),
    "bus.nats": (*_FLOOR, "bus", "log.connection", "log.tasks"),
    "collections": (*_FLOOR, "catalog"),
    "collections.load": (*_FLOOR, "catalog", "collections", "postgres", "observe.redact"),
    "auth.principal": ("lsn", "snapshot"),
    "auth.record": (*_FLOOR, "catalog", "collections", "auth.principal"),
    "auth": (*_FLOOR, "catalog", "collections", "postgres", "observe.redact"),
    "wal": (*_FLOOR, "catalog.model", "postgres.url", "observe.redact"),
    "log": (*_FLOOR, "catalog.model", "wal", "changelog", "observe", "feed"),
    "feed": (*_FLOOR, "catalog.model", "wal", "changelog", "observe"),
    "records": (*_FLOOR, "catalog.model", "collections"),
    "rules.language": ("errors", "spelling", "collections.model", "auth.principal"),
    "rules.sql": (
        *("errors", "changes", "catalog.model", "catalog.record_ids", "collections.model"),
        *("auth.principal", "rules.language"),
    ),
    "rules.memory": (
        *("changes", "text_forms", "catalog.model", "collections.model", "rules.language"),
    ),
    "rules.engine": _ENGINE,
    # From text to plan without index and evaluation; the index without questions.
    "rules.engine.compiler": (
        *_ENGINE,
        *(f"rules.engine.{name}" for name in ("formula", "index_keys", "plan")),
    ),
    "rules.engine.index": (
        *_ENGINE,
        *(f"rules.engine.{name}" for name in ("formula", "index_keys", "index_paths", "plan")),
    ),
    "rules": _FLOOR,
    "rules.rule_set": (*_FLOOR, "collections", "rules"),
    "rule_queries": (*_FLOOR, "catalog", "collections", "postgres", "observe.redact", "rules"),
    "expand": (
        *(*_FLOOR, "catalog", "collections", "postgres", "protocol", "records", "rules"),
        *("auth.principal", "changelog.row_history", "rule_queries"),
    ),
    "reads": (
        *(*_FLOOR, "catalog", "collections", "postgres", "protocol", "records", "rules"),
        *("auth.principal", "rule_queries", "expand"),
    ),
    "hub.events": (
        *(*_FLOOR, "catalog", "collections", "changelog.memory"),
        *("auth.principal", "auth.record"),
    ),
    "hub.connections": (*_FLOOR, *_BELOW_HUB, "hub.events"),
    "hub.evaluation": (*_FLOOR, *_BELOW_HUB, "hub.events", "hub.connections"),
    "hub.delivery": (*_FLOOR, *_BELOW_HUB, "hub.events", "hub.connections", "hub.evaluation"),
    "hub.state": (
        *(*_FLOOR, *_BELOW_HUB),
        *("hub.events", "hub.connections", "hub.delivery", "hub.evaluation"),
    ),
    "hub.catchup": (
        *(*_FLOOR, *_BELOW_HUB),
        *("hub.events", "hub.connections", "hub.delivery", "hub.evaluation", "hub.state"),
    ),
    "hub": (*_FLOOR, *_BELOW_HUB),
    # Answers are trimmed by the same "fields" as records.
    "api": (
        *(*_FLOOR, "protocol", "records", "auth", "reads", "bus", "observe.metrics"),
        *("collections.model", "rules.language.request"),
        *("hub.hub", "hub.connections.connection"),
    ),
    "explain": (
        *(*_FLOOR, "catalog", "collections", "postgres", "protocol", "auth", "rules"),
        *("rule_queries", "records", "reads", "hub.evaluation", "observe.redact"),
    ),
    "inspector": (
        *(*_FLOOR, "catalog", "collections", "protocol", "auth.principal", "bus.base", "changelog"),
        *("hub", "rules", "rule_queries", "observe", "postgres", "explain"),
    ),
    "service": ("",),
    "workers": ("",),
    "cli": ("",),
    "demo": ("",),
    "__main__": ("cli.main",),
}
"""Room or module -> what it may import beside itself. The longest name that fits a file counts;
``""`` on the right is everything."""

_IMPORTERS: dict[str, tuple[str, ...]] = {
    "explain": ("inspector", "cli"),
    "inspector": ("service", "workers"),
    "service": ("workers", "cli", "demo"),
    "workers": ("cli",),
    "demo": ("cli",),
    "cli": ("__main__",),
    "__main__": (),
}
"""The top rooms -> the only other rooms that may import them."""

_PURE = (
    *("errors", "error_codes", "lsn", "changes", "snapshot", "text_forms", "spelling"),
    *(
        "config.units",
        "config.model",
        "config.sources",
        "config.validate",
        "catalog.model",
    ),
    *(
        "protocol",
        "collections.model",
        "collections.build",
        "collections.names",
        "collections.tables",
        "collections.field_kinds",
        "collections.validate",
        "records",
        "rules",
    ),
    *("log.message", "log.reading", "log.beat", "log.questions", "log.union"),
    *("wal.wire", "wal.message", "wal.wal2json", "wal.pgoutput", "wal.assembler", "wal.feedback"),
    "changelog.memory",
    *("auth.principal", "auth.record", "auth.token", "auth.passwords"),
    *("hub.events", "hub.connections.group", "hub.connections.output"),
    *("hub.evaluation.matcher", "hub.state.callers", "hub.state.gaps"),
    "hub.state.progress",
    *("bus.calls", "bus.seal"),
    *("api.error_responses", "api.subscribe_body", "api.login_body", "api.cors"),
    *("rule_queries.slow_queries", "explain.text", "feed.repeats", "feed.wire"),
    "feed.window",
    *("expand.plan", "expand.node", "expand.render", "expand.undo", "expand.link_history"),
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
    for top, importers in _IMPORTERS.items():
        if _is_in(target, top) and room not in (top, *importers):
            return False
    # The package itself holds the version. A module with an entry of its own is lower than its
    # room, so the room isn't "own" to it.
    if target == "" or (source != room and _is_in(target, room)) or target == source:
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


def _package_of(module: str) -> str:
    is_package = _PACKAGE.joinpath(*module.split(".")).is_dir()
    return module if is_package or "." not in module else module.rpartition(".")[0]


@pytest.mark.parametrize("node", [str, _package_of], ids=["module", "package"])
def test_nothing_imports_another_in_a_circle(node: Callable[[str], str]) -> None:
    """Packages within packages count singly."""
    graph = TopologicalSorter[str]()
    for edge in _all_edges():
        source, target = node(edge.source), node(edge.target)
        if edge.is_ours and source and target and source != target:
            graph.add(source, target)
    graph.prepare()  # raises CycleError, which shows the circle


def test_every_name_in_the_picture_is_there() -> None:
    """A list that names a module which is gone guards nothing."""
    named = {*_ALLOWED, *_IMPORTERS, *_PURE}
    named.update(name for allowed in _ALLOWED.values() for name in allowed)
    modules = {_name_of(path) for path in _PACKAGE.rglob("*.py")}
    assert named - modules == set()


def test_language_and_memory_know_no_sql() -> None:
    """A rule is parsed, resolved and evaluated in the process without sqlglot."""
    rooms = ("rules.language", "rules.memory")
    assert [
        str(edge)
        for edge in _all_edges()
        if any(_is_in(edge.source, room) for room in rooms) and _is_in(edge.target, "sqlglot")
    ] == []


def test_pure_code_touches_nothing_outside() -> None:
    """Time, randomness and the network reach it as arguments, so that it is tested with values."""
    assert [str(e) for e in _all_edges() if not e.is_ours and _touches_the_world(e)] == []


_WITHOUT_DRIVER = ("catalog", "changelog", "collections", "protocol", "records", "rules", "wal")
"""Rooms whose pure modules load neither driver nor server, through what they import neither."""


def test_pure_code_loads_no_driver_and_no_server_through_others() -> None:
    """Decoders and rules run where there is no libpq."""
    ours: dict[str, set[str]] = {}
    outside: dict[str, set[str]] = {}
    for edge in _all_edges():
        (ours if edge.is_ours else outside).setdefault(edge.source, set()).add(edge.target)
    loading = {}
    for module in sorted(ours.keys() | outside.keys()):
        if module.startswith(_WITHOUT_DRIVER) and any(_is_in(module, room) for room in _PURE):
            reached, waiting = {module}, [module]
            while waiting:
                waiting += (new := ours.get(waiting.pop(), set()) - reached)
                reached |= new
            loaded = {name.split(".")[0] for one in reached for name in outside.get(one, ())}
            if heavy := loaded & {"aiohttp", "psycopg", "psycopg_pool"}:
                loading[module] = heavy
    assert loading == {}


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("wal.stream", "catalog.model", True),
        ("wal.stream", "wal.wire", True),
        ("wal.stream", "hub.hub", False),
        ("wal.slot", "catalog.introspect", False),
        ("hub.hub", "rules.sql.reference", True),
        ("hub.hub", "changelog.memory", True),
        ("hub.events.event", "changelog.row_history", False),
        ("hub.hub", "wal.slot", False),
        ("hub.evaluation.matcher", "auth.principal", True),
        ("hub.evaluation.matcher", "auth.token", False),
        ("rule_queries.executor", "hub.events.event", False),
        ("expand.load", "hub.events.event", False),
        ("expand.load", "rule_queries.session", True),
        ("hub.evaluation.evaluator", "hub.delivery.enrichment", False),
        ("hub.state.registry", "hub.evaluation.matcher", True),
        ("hub.state.registry", "hub.catchup.tasks", False),
        ("hub.connections.connection", "hub.state.callers", False),
        ("hub.catchup.tasks", "hub.dispatcher", False),
        ("rules.sql.conditions", "hub.evaluation.matcher", False),
        ("auth.principal", "auth.token", False),
        ("lsn", "config.model", False),
        ("api.realtime", "service.build", False),
        ("service.build", "wal.slot", True),
        ("cli.main", "service.build", True),
        ("service.reload", "cli.main", False),
        ("service.build", "explain.explain", False),
        ("explain.explain", "service.build", False),
        ("demo.run", "cli.main", False),
        ("cellar.door", "lsn", False),
    ],
)
def test_the_picture_says(source: str, target: str, *, allowed: bool) -> None:
    assert _may_import(source, target) is allowed


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("import pgrealtime.hub.evaluation.matcher", "hub.evaluation.matcher"),
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
        ("rules.engine.plan", "import time", True),
        ("rules.engine.plan", "from urllib.request import urlopen", True),
        ("rules.engine.plan", "from urllib.parse import quote", False),
        ("wal.stream", "import asyncio", False),
        ("changelog.memory", "from psycopg import pq", True),
    ],
)
def test_the_world_is_recognised(source: str, text: str, *, touches: bool) -> None:
    [edge] = _edges(text, source=source, is_package=False, place="here.py")
    assert _touches_the_world(edge) is touches
