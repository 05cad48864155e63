"""Every exception of the program, in PostgreSQL's form (message, detail, hint) with a stable code.

Raised by all rooms. The edges print it: commands as text, the API as a JSON error
(``api.error_responses``), the service in its log.
"""

import unicodedata
from dataclasses import dataclass
from typing import ClassVar


class PgRealtimeError(Exception):
    """An error with a stable code, a short message and, where known, a remedy.

    The message is lower case, without full stop, names in double quotes. Detail (what was observed)
    and hint (the remedy, SQL ready to paste) are whole sentences. ``code`` overrides the class's
    code where one class has several errors.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    """Whether a later attempt can succeed without an operator's action."""

    def __init__(
        self, message: str, *, detail: str = "", hint: str = "", code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail
        self.hint = hint
        self._code = code

    @property
    def error_code(self) -> str:
        """The stable code, which ``error_codes`` explains."""
        return self._code or type(self).code

    def __str__(self) -> str:
        lines = [f"{self.error_code}: {self.message}"]
        if self.detail:
            lines.append(f"DETAIL: {self.detail}")
        if self.hint:
            lines.append(f"HINT: {self.hint}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """A problem of the configuration: its key, a message and, where known, a remedy."""

    path: str
    """Dotted path of the key, such as ``collections.posts.list_rule``."""
    message: str
    hint: str = ""
    line: int | None = None
    """1-based line in the file, where it is known."""
    marked_text: str = ""
    """Further lines that mark the error, such as a rule with carets under it."""


class ConfigError(PgRealtimeError):
    """The configuration can't be used. Has every problem found in one run."""

    code = "config_invalid"

    def __init__(
        self, problems: tuple[ConfigProblem, ...], *, source_name: str = "configuration"
    ) -> None:
        count = len(problems)
        super().__init__(
            f"{source_name} has {count} problem{'s' if count != 1 else ''}",
            detail="\n".join(describe_problem(source_name, problem) for problem in problems),
        )
        self.problems = problems


class RuleTestError(PgRealtimeError):
    """Rule tests of the configuration came out otherwise than expected."""

    code = "rule_test_failed"

    def __init__(
        self, failures: tuple[ConfigProblem, ...], decisions: int, *, source_name: str
    ) -> None:
        super().__init__(
            f"{len(failures)} of {decisions} rule tests failed",
            detail="\n".join(describe_problem(source_name, failure) for failure in failures),
            hint="Change the rules, or what the tests expect.",
        )


def describe_problem(source_name: str, problem: ConfigProblem) -> str:
    """Return the problem as text, with file and line."""
    location = source_name if problem.line is None else f"{source_name}:{problem.line}"
    text = f"{location}: {problem.path}: {problem.message}"
    if problem.hint:
        text += f" ({problem.hint})"
    return f"{text}\n{problem.marked_text}" if problem.marked_text else text


class SetupError(PgRealtimeError):
    """Server or schema isn't set up: wal_level, wal2json, privileges, replica identity."""

    code = "setup_incomplete"


class DatabaseUnreachableError(PgRealtimeError):
    """The database server doesn't answer, or refuses the login."""

    code = "database_unreachable"
    retryable = True


class WalError(PgRealtimeError):
    """An error of the replication slot or stream."""

    code = "wal"


class SlotBusyError(WalError):
    """The slot is in use, or all slots or walsenders are; a later attempt may succeed."""

    code = "slot_busy"
    retryable = True


class SlotLostError(WalError):
    """The slot was dropped or invalidated: changes were missed."""

    code = "slot_lost"
    retryable = True


class StreamInterruptedError(WalError):
    """The replication connection ended; a new one may succeed."""

    code = "stream_interrupted"
    retryable = True


class UnexpectedMessageError(WalError):
    """The stream has a message that can't be read, or can't follow the one before."""

    code = "unexpected_message"
    retryable = True


class FrameError(PgRealtimeError):
    """Bytes of another process's feed can't be read."""

    code = "frame_undecodable"


class LogError(PgRealtimeError):
    """The log between owner and replicas can't be used.

    Codes: ``log_unfit`` (the stream has other limits), ``log_foreign`` (it is of another database),
    ``log_denied`` (the login, or a permission), ``log_tls``, ``log_unreadable``, ``log_newer``.
    """

    code = "log_unfit"


class LogAwayError(LogError):
    """NATS or the stream doesn't answer; a later attempt may succeed."""

    code = "log_away"
    retryable = True


class LogMessageError(LogError):
    """A message of the log can't be read."""

    code = "log_unreadable"


class WorkerGoneError(PgRealtimeError):
    """A process of the service has ended before it answered."""

    code = "worker_gone"
    retryable = True


class RuleError(PgRealtimeError):
    """A rule or filter can't be used; ``start`` and ``end`` are offsets in its characters."""

    code = "rule_invalid"

    def __init__(
        self, message: str, *, start: int, end: int, hint: str = "", code: str | None = None
    ) -> None:
        super().__init__(message, hint=hint, code=code)
        self.start = start
        self.end = end


class RuleSyntaxError(RuleError):
    """The text is not a rule: a syntax error."""

    code = "rule_syntax"


class RuleNameError(RuleError):
    """The rule has a name that no collection, field or function has."""

    code = "rule_name"


class RuleUnsupportedError(RuleError):
    """PocketBase accepts the rule; this program can't evaluate it exactly and refuses it."""

    code = "rule_unsupported"


class AuthError(PgRealtimeError):
    """A token or password is not valid. The message never contains it."""

    code = "auth_failed"


class SubscriptionError(PgRealtimeError):
    """A subscribe call is refused."""

    code = "subscription_refused"


class LookError(PgRealtimeError):
    """What an operator asks to look at isn't there."""

    code = "look_refused"


class SubscriptionLimitError(SubscriptionError):
    """A topic of a subscribe call is valid by itself but exceeds a limit.

    ``limit_name`` is the key of the text that ``api.error_responses`` has for the limit.
    """

    code = "subscription_limit"

    def __init__(self, message: str, *, topic: str, limit_name: str, maximum: int) -> None:
        super().__init__(message)
        self.topic = topic
        self.limit_name = limit_name
        self.maximum = maximum


class BusError(PgRealtimeError):
    """A subscribe call can't be passed on, or its answer can't be used."""

    code = "bus"


class HolderGoneError(BusError):
    """No process has the tag of the client id."""

    code = "holder_gone"

    def __init__(self, tag: str) -> None:
        super().__init__(f'no process has the tag "{tag}"')


class HolderSilentError(BusError):
    """The process that holds the connection doesn't answer, or can't be asked."""

    code = "holder_silent"


class ReadError(PgRealtimeError):
    """A list, or one record, is not given.

    Codes: ``read_collection_unknown``, ``read_locked`` (the rule is for superusers),
    ``read_reserved_request`` and ``read_reserved_collection`` (words of rules in filter or sort),
    ``read_invalid`` (anything else of a list), ``record_unknown``.
    """

    code = "read_invalid"


class ChangelogError(PgRealtimeError):
    """The changelog can't serve a position or append an entry."""

    code = "changelog"


def underline_span(text: str, start: int, end: int) -> str:
    """Return the line of the text that a span begins in, and at least one caret under the span."""
    begin = text.rfind("\n", 0, start) + 1
    line = text[begin:].partition("\n")[0].replace("\t", " ")
    before, marked = line[: start - begin], line[start - begin : end - begin]
    return f"    {line}\n    {' ' * _terminal_width(before)}{'^' * max(1, _terminal_width(marked))}"


def _terminal_width(text: str) -> int:
    """Return how wide a terminal shows the text: ideographs take two cells."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
