"""Sets up logging: structlog for this program, and libraries through the same redaction.

An event is a constant ``subject.fact`` in the past tense, everything else a key::

    log = structlog.get_logger()
    log.info("slot.created", slot=name, lsn=format_lsn(lsn))
    log.error("slot.lost", error=fault)

``error`` takes the exception itself; code, detail and hint of a PgRealtimeError become keys.
"""

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
    """Write every log line from now on to the stream, standard error by default.

    A terminal gets readable lines, any other stream one JSON object per line, unless configured
    otherwise. Libraries log from ``warning`` on, whatever the configured level is. May be called
    again; it applies to loggers obtained before, too.
    """
    stream = sys.stderr if stream is None else stream
    level = logging.getLevelNamesMapping()[config.level.upper()]
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # A StreamHandler survives a closed pipe; structlog's own loggers would raise in the code that
    # logs.
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
        # Values may come from the network: escape line breaks and terminal sequences in them.
        repr_native_str=True,
        exception_formatter=structlog.dev.plain_traceback,
    )


def _name_library_event(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Log a library's free text under the constant event ``library.logged``."""
    event["message"] = event["event"]
    event["event"] = "library.logged"
    return event


def _flatten_error(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace an error of this program by keys for its message, code, detail and hint."""
    error = event.get("error")
    if isinstance(error, PgRealtimeError):
        event.update(error=error.message, code=error.error_code)
        event.update({k: v for k in ("detail", "hint") if (v := getattr(error, k))})
    return event


def _describe_exc_info(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    error = event.pop("exc_info", None)
    if isinstance(error, tuple):  # as sys.exc_info returns it
        error = error[1]
    elif error is True:
        error = sys.exception()
    if isinstance(error, BaseException):
        event["exception"] = describe_traceback(error)
    return event


def _redact_all(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Redact secrets, and put the keys of every line first."""
    first = {key: event.pop(key) for key in ("timestamp", "level", "event")}
    return first | {key: redact(value, key=key) for key, value in event.items()}
