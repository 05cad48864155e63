"""``pgrealtime explain-error`` knows every code that the program raises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from click.testing import CliRunner

import pgrealtime
from pgrealtime import errors
from pgrealtime.cli.main import main
from pgrealtime.error_codes import ERROR_CODES
from pgrealtime.errors import PgRealtimeError

_PACKAGE = Path(pgrealtime.__file__).parent

_COMPOSED = {
    "bus/seal.py": "call_",
}
"""Modules that put a code together -> its beginning."""


def test_every_code_that_is_raised_can_be_explained() -> None:
    raised = {code for path in _modules() for code in _codes(path)}

    assert len(raised) > 90
    assert raised - set(ERROR_CODES) == set()


def test_every_code_has_a_cause_and_a_cure() -> None:
    for code, known in ERROR_CODES.items():
        assert re.fullmatch("[a-z]+(_[a-z0-9]+)*", code)
        assert known.cause.endswith(".")
        assert known.cure


def test_the_command_explains_one_or_lists_all() -> None:
    run = CliRunner().invoke
    one = run(main, ["explain-error", "slot_busy"])
    every = run(main, ["explain-error"])
    none = run(main, ["explain-error", "slot_buzy"])

    cure = "The service waits, and takes over when that process ends; end it before slot drop."
    assert one.output == f"slot_busy\ncause  Another process reads the slot.\ncure   {cure}\n"
    listed = re.findall(r"^  (\w+) ", every.output, re.MULTILINE)
    assert listed == list(ERROR_CODES)
    assert (none.exit_code, 'perhaps you meant "slot_busy"' in none.output) == (2, True)


def _modules() -> list[Path]:
    found = sorted(_PACKAGE.rglob("*.py"))
    return [path for path in found if path.name != "error_codes.py"]


def _codes(path: Path) -> Iterator[str]:
    """Yield the codes of errors that a module raises, and of classes of errors that it has."""
    prefix = _COMPOSED.get(path.relative_to(_PACKAGE).as_posix())
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.keyword(arg="code", value=ast.Constant(value=str(code))):
                yield code
            case ast.Call(func=ast.Name(name), args=[ast.Constant(value=str(reason))]) if (
                prefix and name == "_ignored"
            ):
                yield prefix + reason
            case ast.Call(func=ast.Name(name) | ast.Attribute(attr=name), keywords=given):
                if all(keyword.arg != "code" for keyword in given):
                    yield from _own_code(getattr(errors, name, None))
            case ast.ClassDef(body=body):
                yield from _assigned_codes(body)
            case _:
                continue


def _assigned_codes(body: list[ast.stmt]) -> Iterator[str]:
    for statement in body:
        match statement:
            case ast.Assign(targets=[ast.Name("code")], value=ast.Constant(value=str(code))):
                yield code
            case _:
                continue


def _own_code(raised: object) -> Iterator[str]:
    """Yield the code of a class of errors."""
    if isinstance(raised, type) and issubclass(raised, PgRealtimeError):
        yield raised.code
