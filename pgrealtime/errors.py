"""Every exception of the program, in one tree, in PostgreSQL's form with a stable code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class PgRealtimeError(Exception):
    """A fault with a stable code, a short message and, where known, what mends it.

    Args:
        message: Lower case, factual, no full stop; names in double quotes.
        detail: What was seen, in whole sentences.
        hint: What to do about it, in whole sentences; SQL and commands ready to paste.
        code: Overrides the class's code where one class stands for several faults.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    """Whether waiting and trying again can succeed without anybody doing anything."""

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
        """The stable word that the README lists."""
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
    """One finding in a configuration: where, what, and how to mend it."""

    path: str
    """Dotted path of the key, such as ``collections.posts.list_rule``."""
    message: str
    hint: str = ""
    line: int | None = None
    """1-based line in the file, where it is known."""
    marked_text: str = ""
    """Lines that show the place, such as a rule with carets under it."""


class ConfigError(PgRealtimeError):
    """The configuration can't be used; carries every problem found in one run."""

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


def describe_problem(source_name: str, problem: ConfigProblem) -> str:
    """Return the finding as people read it, with its place in the file."""
    place = source_name if problem.line is None else f"{source_name}:{problem.line}"
    text = f"{place}: {problem.path}: {problem.message}"
    if problem.hint:
        text += f" ({problem.hint})"
    return f"{text}\n{problem.marked_text}" if problem.marked_text else text


class SetupError(PgRealtimeError):
    """The server or the schema isn't ready: wal_level, wal2json, rights, replica identity."""

    code = "setup_incomplete"


class DatabaseUnreachableError(PgRealtimeError):
    """The server doesn't answer, or refuses the login."""

    code = "database_unreachable"
    retryable = True


class WalError(PgRealtimeError):
    """Something about the slot or the stream from Postgres."""

    code = "wal"


class SlotBusyError(WalError):
    """The slot, or the last free slot or walsender, is in use; later it may not be."""

    code = "slot_busy"
    retryable = True


class SlotLostError(WalError):
    """The slot is gone or invalidated: changes were missed."""

    code = "slot_lost"
    retryable = True


class StreamInterruptedError(WalError):
    """The connection carrying the stream ended; a new one may succeed."""

    code = "stream_interrupted"
    retryable = True


class UnexpectedMessageError(WalError):
    """The decoder said something that can't follow what it said before."""

    code = "unexpected_message"
    retryable = True


class RuleError(PgRealtimeError):
    """A rule or filter that can't be used; knows the place in its text.

    Args:
        message: As in PgRealtimeError.
        start: Offset in characters of the first character concerned.
        end: Offset after the last one.
    """

    code = "rule_invalid"

    def __init__(
        self, message: str, *, start: int, end: int, hint: str = "", code: str | None = None
    ) -> None:
        super().__init__(message, hint=hint, code=code)
        self.start = start
        self.end = end


class RuleSyntaxError(RuleError):
    """The text is not of the language."""

    code = "rule_syntax"


class RuleNameError(RuleError):
    """A name in the rule that nothing answers to."""

    code = "rule_name"


class RuleUnsupportedError(RuleError):
    """PocketBase accepts it, this program can't decide it exactly and so refuses it."""

    code = "rule_unsupported"


class AuthError(PgRealtimeError):
    """A token or password that doesn't hold. The message never contains it."""

    code = "auth_failed"


class SubscriptionError(PgRealtimeError):
    """A subscribe call that must be refused."""

    code = "subscription_refused"


class SubscriptionLimitError(SubscriptionError):
    """A topic that is fine by itself, and one too many of its kind.

    Args:
        message: Of which there are too many.
        topic: As submitted.
        limit_name: Which one; the API has its words.
        maximum: How many there may be.
    """

    code = "subscription_limit"

    def __init__(self, message: str, *, topic: str, limit_name: str, maximum: int) -> None:
        super().__init__(message)
        self.topic = topic
        self.limit_name = limit_name
        self.maximum = maximum


class ChangelogError(PgRealtimeError):
    """A position that the changelog can't serve."""

    code = "changelog"
