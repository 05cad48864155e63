"""What the README points to is there, and the codes it lists are those that the program says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from pgrealtime import errors
from tests.config_values import parse_config

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "README.md").read_text(encoding="utf-8")
_NOT_FOR_OPERATORS = ("internal", "stream_closed")
"""Codes of faults within, and of our own stop."""


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", _README)
    assert len(links) > 20
    assert [link for link in links if not (_ROOT / link).exists()] == []


def test_the_configuration_it_shows_is_one() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", _README, re.DOTALL)
    text = re.sub(r"^ {3}", "", shown, flags=re.MULTILINE)
    environ = {"DATABASE_URL": "postgresql://127.0.0.1/app", "APP_JWT_SECRET": "x" * 32}

    assert set(parse_config(yaml.safe_load(text), environ).collections) == {"users", "posts"}


def test_every_code_of_setting_up_is_listed() -> None:
    """Whoever looks an error up finds it."""
    table = _README.partition("## Errors")[2].partition("## ")[0]
    listed = set(re.findall(r"`([a-z_]+)`", table))
    rooms = ("wal", "cli", "explain", "service", "catalog", "postgres", "bus", "demo")
    said = {code for room in rooms for code in _codes(room)}

    assert {code for code in said if not code.startswith(_NOT_FOR_OPERATORS)} - listed == set()


def _codes(room: str) -> Iterator[str]:
    paths = sorted((_ROOT / "pgrealtime" / room).rglob("*.py"))
    assert paths, f"there is no {room}"
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.keyword(arg="code", value=ast.Constant(value=str(code))):
                    yield code
                case ast.Call(func=ast.Name(name), keywords=given) if hasattr(errors, name):
                    if all(keyword.arg != "code" for keyword in given):
                        yield from _own_code(getattr(errors, name))
                case _:
                    continue


def _own_code(raised: object) -> Iterator[str]:
    """Yield the code of a class of errors."""
    if isinstance(raised, type) and issubclass(raised, errors.PgRealtimeError):
        yield raised.code
