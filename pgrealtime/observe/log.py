"""Sets up logging: ours by structlog, the libraries' through the same redaction and renderer.

An event is a constant ``subject.fact`` in the past tense, everything else a key::

    log = structlog.get_logger()
    log.info("slot.created", slot=name, lsn=format_lsn(lsn))
    log.error("slot.lost", error=fault)

``error`` takes the exception itself; of ours its code, detail and hint become keys of their own.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from pgrealtime.config.model import LoggingConfig
from pgrealtime.errors import PgRealtimeError
from pgrealtime.observe.redact import describe_traceback, redact

_PACKAGE = "pgrealtime"


def configure_logging(config: LoggingConfig, stream: TextIO | None = None) -> None:
    """Send every log line from now on to the stream, standard error by default.

    A terminal gets readable lines, anything else one JSON object per line, unless the
    configuration says which. Libraries are heard from ``warning`` on, whatever our own level is.
    Can be called again; loggers obtained before follow.
    """
    stream = sys.stderr if stream is None else stream
    level = logging.getLevelNamesMapping()[config.level.upper()]
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # A StreamHandler survives a reader that went away; structlog's own loggers would raise at
    # whoever logs.
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, structlog.stdlib.add_logger_name, _name_library_event],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _flatten_error,
                _describe_exc_info,
                _redact_all,
                _renderer(config, stream),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
    logging.getLogger(_PACKAGE).setLevel(level)
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[*common, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: logging.getLogger(_PACKAGE),
    )


def _renderer(config: LoggingConfig, stream: TextIO) -> Processor:
    is_terminal = stream.isatty()
    if config.format == "json" or (config.format == "auto" and not is_terminal):
        return structlog.processors.JSONRenderer()
    return structlog.dev.ConsoleRenderer(
        colors=is_terminal and not os.environ.get("NO_COLOR"),
        # Values come from the network too: a line break or an escape sequence in one mustn't
        # reach the terminal as such.
        repr_native_str=True,
        exception_formatter=structlog.dev.plain_traceback,
    )


def _name_library_event(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Give a library's free text the name of an event, so that ours alone are constants."""
    event["message"] = event["event"]
    event["event"] = "library.logged"
    return event


def _flatten_error(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Spread one of our errors over the keys that people filter by."""
    error = event.get("error")
    if isinstance(error, PgRealtimeError):
        event["error"] = error.message
        event["code"] = error.error_code
        if error.detail:
            event["detail"] = error.detail
        if error.hint:
            event["hint"] = error.hint
    return event


def _describe_exc_info(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    error = _exception_of(event.pop("exc_info", None))
    if error is not None:
        event["exception"] = describe_traceback(error)
    return event


def _exception_of(exc_info: object) -> BaseException | None:
    match exc_info:
        case BaseException() as error:
            return error
        case (_, BaseException() as error, _):
            return error
        case True:
            return sys.exception()
        case _:
            return None


def _redact_all(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Hide secrets, and put first what every line has."""
    first = {key: event.pop(key) for key in ("timestamp", "level", "event")}
    return first | {key: redact(value, key=key) for key, value in event.items()}
