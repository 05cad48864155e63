"""Log lines that programs and operators can read, and a logger that never raises."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

import pgrealtime
from pgrealtime.config.model import LoggingConfig
from pgrealtime.errors import SlotLostError
from pgrealtime.observe.log import configure_logging

log = structlog.get_logger()


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Restore the process's logging afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("pgrealtime")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def _lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def _without_time(stream: io.StringIO) -> list[dict[str, Any]]:
    lines = _lines(stream)
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line.pop("timestamp"))
    return lines


def test_elsewhere_than_on_a_terminal_a_line_is_one_json_object() -> None:
    stream = io.StringIO()
    configure_logging(LoggingConfig(), stream)
    log.info("slot.created", slot="pgrealtime", lsn="16/B374D848", temporary=True)
    assert _without_time(stream) == [
        {
            "level": "info",
            "event": "slot.created",
            "slot": "pgrealtime",
            "lsn": "16/B374D848",
            "temporary": True,
        }
    ]


def test_a_value_cannot_start_a_line_of_its_own() -> None:
    """A topic with a line break can't forge a log entry."""
    stream = io.StringIO()
    configure_logging(LoggingConfig(), stream)
    log.warning("topic.refused", topic='x\n{"event": "server.stopped"}', odd="\ud800")
    assert [line["event"] for line in _lines(stream)] == ["topic.refused"]


def _on_a_terminal(config: LoggingConfig) -> str:
    reader, writer = os.openpty()
    try:
        with os.fdopen(writer, "w", encoding="utf-8") as terminal:
            configure_logging(config, terminal)
            log.warning("connection.dropped", reason="stalled", topic="a\x1b[2J\nb")
            terminal.flush()
            return os.read(reader, 10_000).decode()
    finally:
        os.close(reader)


def test_a_terminal_gets_readable_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    line = _on_a_terminal(LoggingConfig())
    assert re.fullmatch(
        r"\S+Z \[warning  \] connection\.dropped +"
        r"reason='stalled' topic='a\\x1b\[2J\\nb'\r\n",
        line,
    )


def test_a_terminal_gets_colours_unless_it_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in _on_a_terminal(LoggingConfig())


def test_the_format_can_be_chosen() -> None:
    assert json.loads(_on_a_terminal(LoggingConfig(format="json")))["reason"] == "stalled"
    stream = io.StringIO()
    configure_logging(LoggingConfig(format="console"), stream)
    log.info("server.started")
    assert re.fullmatch(r"\S+Z \[info     \] server\.started\s*\n", stream.getvalue())


@pytest.mark.parametrize(
    ("level", "logged"),
    [
        ("debug", ["a.debugged", "a.informed", "a.warned", "a.failed"]),
        ("info", ["a.informed", "a.warned", "a.failed"]),
        ("warning", ["a.warned", "a.failed"]),
        ("error", ["a.failed"]),
    ],
)
def test_only_the_configured_level_and_above_are_logged(level: Any, logged: list[str]) -> None:
    stream = io.StringIO()
    configure_logging(LoggingConfig(level=level), stream)
    log.debug("a.debugged")
    log.info("a.informed")
    log.warning("a.warned")
    log.error("a.failed")
    assert [line["event"] for line in _lines(stream)] == logged


def test_one_of_our_errors_becomes_keys() -> None:
    """Operators filter and alert by the code."""
    stream = io.StringIO()
    configure_logging(LoggingConfig(), stream)
    log.error("slot.lost", error=SlotLostError("was invalidated", detail="D.", hint="H."))
    log.error("slot.lost", error=SlotLostError("was invalidated"))
    log.error("page.failed", error=ValueError("token=abc"))
    assert _without_time(stream) == [
        {
            "level": "error",
            "event": "slot.lost",
            "error": "was invalidated",
            "code": "slot_lost",
            "detail": "D.",
            "hint": "H.",
        },
        {"level": "error", "event": "slot.lost", "error": "was invalidated", "code": "slot_lost"},
        {"level": "error", "event": "page.failed", "error": "ValueError: token=[hidden]"},
    ]


def test_secrets_are_hidden_in_keys_values_context_and_exceptions() -> None:
    stream = io.StringIO()
    configure_logging(LoggingConfig(), stream)
    with structlog.contextvars.bound_contextvars(authorization="abc"):
        try:
            raise ValueError("password=s3cret")
        except ValueError:
            log.exception("auth.failed", url="postgresql://u:s3cret@h/d")
    [line] = _lines(stream)
    assert line["authorization"] == "[hidden]"
    assert line["url"] == "postgresql://u:[hidden]@h/d"
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["exception"].endswith("ValueError: password=[hidden]")


def test_libraries_are_logged_from_warning_on_with_the_same_redaction() -> None:
    """A library's free text is no event name, and its secrets are redacted too."""
    stream = io.StringIO()
    configure_logging(LoggingConfig(level="debug"), stream)
    library = logging.getLogger("aiohttp.server")
    library.info("chatter")
    library.warning("refused %s", "password=s3cret")
    try:
        raise ValueError("token=abc")
    except ValueError:
        library.exception("failed")
    refused, failed = _without_time(stream)
    assert refused == {
        "level": "warning",
        "event": "library.logged",
        "logger": "aiohttp.server",
        "message": "refused password=[hidden]",
    }
    assert failed["exception"].endswith("ValueError: token=[hidden]")


def test_warnings_become_lines_too() -> None:
    """A single line that isn't JSON breaks a log pipeline."""
    stream = io.StringIO()
    configure_logging(LoggingConfig(), stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(capture=False)
    [line] = _lines(stream)
    assert (line["event"], line["logger"]) == ("library.logged", "py.warnings")
    assert "DeprecationWarning: old" in line["message"]


def test_a_closed_pipe_does_not_break_the_code_that_logs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Delivery goes on when the log's pipe is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as raw:
        pipe = io.TextIOWrapper(raw, write_through=True)
        configure_logging(LoggingConfig(), pipe)
        log.info("server.started")
        pipe.detach()
    assert "BrokenPipeError" in capsys.readouterr().err


def test_configuring_again_moves_loggers_that_exist() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging(LoggingConfig(), first)
    log.info("a.happened")
    configure_logging(LoggingConfig(level="error"), second)
    log.info("b.happened")
    log.error("c.failed")
    assert [line["event"] for line in _lines(first)] == ["a.happened"]
    assert [line["event"] for line in _lines(second)] == ["c.failed"]


def _event_names() -> Iterator[tuple[str, ast.expr]]:
    package = Path(pgrealtime.__file__).parent
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(
                        value=ast.Name(id="log" | "_log") | ast.Attribute(attr="log" | "_log"),
                        attr="debug" | "info" | "warning" | "error" | "exception" | "critical",
                    ),
                    args=[name, *_],
                ):
                    yield f"{path.relative_to(package)}:{node.lineno}", name
                case _:
                    pass


def test_every_event_in_the_code_is_a_constant_subject_and_fact() -> None:
    """An operator finds the origin of a log line with one grep."""
    odd = [
        place
        for place, name in _event_names()
        if not (
            isinstance(name, ast.Constant)
            and isinstance(name.value, str)
            and re.fullmatch(r"[a-z][a-z_]*\.[a-z][a-z_]*", name.value)
        )
    ]
    assert odd == []
