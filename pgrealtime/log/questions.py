"""What replicas ask of the owner, and what it answers, over core NATS. Pure."""

from typing import TypeAlias

import msgspec
from msgspec import Struct

from pgrealtime.changes import TableName
from pgrealtime.errors import LogMessageError, PgRealtimeError
from pgrealtime.log.message import WIRE_VERSION
from pgrealtime.lsn import LSN


class PositionQuestion(Struct, frozen=True, array_like=True, tag=1):
    """Which message of the log has the last commit up to an LSN, once it is stored?"""

    lsn: LSN


class TablesQuestion(Struct, frozen=True, array_like=True, tag=2):
    """Can the stream carry these tables as well?"""

    tables: tuple[TableName, ...]
    record_keys: tuple[tuple[TableName, tuple[str, ...]], ...]


class GapQuestion(Struct, frozen=True, array_like=True, tag=3):
    """Append a gap of the tables, please."""

    reason: str
    tables: tuple[TableName, ...]


Question: TypeAlias = PositionQuestion | TablesQuestion | GapQuestion


class Answer(Struct, frozen=True, array_like=True):
    """What the owner answers."""

    version: int = WIRE_VERSION
    error_code: str = ""
    """Empty: yes."""
    message: str = ""
    detail: str = ""
    hint: str = ""
    sequence: int = 0
    """Who has read the log up to there has what was asked for."""

    def raise_error(self) -> None:
        """Raise the error that the owner met, if it did."""
        if self.error_code:
            raise PgRealtimeError(
                self.message, detail=self.detail, hint=self.hint, code=self.error_code
            )


_questions: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
_answers = msgspec.msgpack.Decoder(Answer)


def decode_question(payload: bytes) -> Question:
    """Return the question.

    Raises:
        LogMessageError: It is none.
    """
    try:
        return _questions.decode(payload)
    except msgspec.DecodeError as error:
        raise LogMessageError("a question can't be read") from error


def decode_answer(payload: bytes) -> Answer:
    """Return the answer.

    Raises:
        LogMessageError: It is none.
    """
    try:
        return _answers.decode(payload)
    except msgspec.DecodeError as error:
        raise LogMessageError("an answer can't be read") from error


def refusal(error: PgRealtimeError) -> Answer:
    """Return the answer that says why not."""
    return Answer(
        error_code=error.error_code, message=error.message, detail=error.detail, hint=error.hint
    )
