"""``pgrealtime/README.md``, the map of the packages, names what is there and leaves nothing out."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

import pgrealtime

_PACKAGE = Path(pgrealtime.__file__).parent
_MAP = (_PACKAGE / "README.md").read_text(encoding="utf-8")
_WALKS = (
    "A change, from the stream to a socket",
    "A subscribe call",
    "A rule, from YAML to a decision",
)


def _references(text: str) -> Sequence[tuple[Path, str]]:
    """Return each file that is named, and the dotted name after the colon or ``""``."""
    found = re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", text)
    return [
        ((_PACKAGE.parent if path.startswith("tests/") else _PACKAGE) / path, name)
        for path, name in found
    ]


def _section(title: str) -> str:
    return _MAP.partition(f"## {title}\n")[2].partition("\n## ")[0]


def _defines(path: Path, name: str) -> bool:
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [
            node
            for node in body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.name == part
        ]
        if not found:
            return False
        body = found[0].body
    return True


def test_every_file_and_function_of_the_map_exists() -> None:
    """A walk that names a function which has moved leads astray."""
    named = set(_references(_MAP))
    assert {path for path, _ in named if not path.is_file()} == set()
    assert {(path, name) for path, name in named if name and not _defines(path, name)} == set()


@pytest.mark.parametrize("title", _WALKS)
def test_every_walk_names_functions(title: str) -> None:
    """Each step of a walk says which function takes it."""
    steps = [line for line in _section(title).splitlines() if re.match(r"\d+\. ", line)]
    assert len(steps) >= 8
    assert [step for step in steps if not any(name for _, name in _references(step))] == []


def test_every_package_and_root_module_is_in_the_picture() -> None:
    """A package that the picture lacks would be found by nobody."""
    packages = {
        f"{path.parent.relative_to(_PACKAGE)}/"
        for path in _PACKAGE.rglob("__init__.py")
        if path.parent != _PACKAGE
    }
    modules = {path.name for path in _PACKAGE.glob("*.py") if not path.name.startswith("__")}
    table = "".join(line for line in _section("The packages").splitlines() if line[:1] == "|")
    drawn = set(re.findall(r"`([\w/]+(?:/|\.py))`", table))
    assert (packages | modules) - drawn == set()
    assert {name for name in drawn if not (_PACKAGE / name).exists()} == set()
