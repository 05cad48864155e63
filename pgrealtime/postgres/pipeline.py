"""Sends several statements at once and receives their results: one round trip for all of them.

``postgres.pool`` begins and ends transactions by it together with what is asked in them. psycopg's
own pipelines take as long as a round trip for each statement.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

import psycopg
from psycopg.abc import Buffer, PQGen
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGconn, PGresult
from psycopg.waiting import Ready, Wait

from pgrealtime.caches import WeightedCache

_MAX_PREPARED: Final = 100
"""Statements that a connection keeps prepared; beyond, the one unused for longest is closed."""
_MAX_RUN_ONCE: Final = 1000
_MAX_NUMBERED_CHARACTERS: Final = 8 * 1024 * 1024
_PLACEHOLDER: Final = re.compile(r"%\((\w+)\)s|%%")

_Key: TypeAlias = tuple[str, tuple[int, ...] | None]
"""A statement and the types of its values."""


class Statement(NamedTuple):
    """One statement; with values it has psycopg's named placeholders, and ``%%`` for a ``%``."""

    text: str
    params: Mapping[str, object] | None = None


class PreparedStatements:
    """The statements that a connection has prepared: those that it runs for the second time."""

    def __init__(self) -> None:
        self._names: OrderedDict[_Key, bytes] = OrderedDict()
        self._run_once: OrderedDict[int, None] = OrderedDict()
        """Hashes of keys: a statement may have 300 KB."""
        self._unwanted: list[bytes] = []
        self._count = 0

    def find(self, key: _Key) -> bytes | None:
        """Return the name of a statement that is prepared."""
        name = self._names.get(key)
        if name is not None:
            self._names.move_to_end(key)
        return name

    def add(self, key: _Key) -> bytes | None:
        """Return the name by which to prepare a statement; None if it runs for the first time."""
        if hash(key) not in self._run_once:
            self._run_once[hash(key)] = None
            if len(self._run_once) > _MAX_RUN_ONCE:
                self._run_once.popitem(last=False)
            return None
        if len(self._names) >= _MAX_PREPARED:
            self._unwanted.append(self._names.popitem(last=False)[1])
        self._count += 1
        name = self._names[key] = b"pgrealtime_%d" % self._count
        return name

    def forget(self) -> None:
        """Close all: after an error it isn't known which are prepared, or are still of use."""
        self._unwanted += self._names.values()
        self._names.clear()

    def take_unwanted(self) -> list[bytes]:
        """Return the names that are to be closed, once; there may be no statement of a name."""
        unwanted, self._unwanted = self._unwanted, []
        return unwanted


def exchange(
    pgconn: PGconn, statements: Sequence[Statement], prepared: PreparedStatements | None
) -> PQGen[list[PGresult]]:
    """Send statements, receive their results; return of those that have rows the texts of these.

    One that fails ends the pipeline: its error is the last result, and later statements, a COMMIT
    too, aren't run. ``prepared`` is None where the next transaction may run in another session.

    Raises:
        psycopg.OperationalError: The connection broke.
        psycopg.DataError: A value can't be sent; nothing was sent.
        UnicodeEncodeError: Likewise.
    """
    bound = [_bind(statement) for statement in statements]
    is_complete = False
    pgconn.enter_pipeline_mode()
    try:
        _send(pgconn, bound, prepared)
        pgconn.pipeline_sync()
        while pgconn.flush():
            if (yield Wait.RW) & Ready.R:
                pgconn.consume_input()
        results = yield from _receive(pgconn)
        pgconn.exit_pipeline_mode()
        is_complete = True
    finally:
        if not is_complete:
            pgconn.finish()  # results are outstanding: nothing else can be asked
    if prepared is not None and results and is_error(results[-1]):
        prepared.forget()
    return results


def is_error(result: PGresult) -> bool:
    """Whether a result is that of a statement that failed."""
    return result.status == ExecStatus.FATAL_ERROR


def raise_if_error(result: PGresult) -> None:
    """Raise the ``psycopg.Error`` that a result is, if it is one."""
    if is_error(result):
        raise error_from_result(result)


def values_of(result: PGresult) -> list[tuple[object, ...]]:
    """Return a result's rows as the driver's values."""
    transformer = Transformer()
    transformer.set_pgresult(result)
    return transformer.load_rows(0, result.ntuples, tuple)


class _Bound(NamedTuple):
    key: _Key
    text: bytes
    values: Sequence[Buffer | None] | None
    formats: Sequence[Format] | None


def _bind(statement: Statement) -> _Bound:
    text, params = statement
    if params is None:
        return _Bound((text, None), text.encode(), None, None)
    numbered, names = _numbered.get(text, lambda: (_number(text), len(text)))
    values = _transformer.dump_sequence(
        [params[name] for name in names], [PyFormat.AUTO] * len(names)
    )
    return _Bound((text, _transformer.types), numbered, values, _transformer.formats)


def _number(text: str) -> tuple[bytes, tuple[str, ...]]:
    """Return the statement with ``$1``, ``$2`` for psycopg's placeholders, and their names."""
    numbers: dict[str, int] = {}

    def number(found: re.Match[str]) -> str:
        name = found[1]
        return "%" if name is None else f"${numbers.setdefault(name, len(numbers) + 1)}"

    return _PLACEHOLDER.sub(number, text).encode(), tuple(numbers)


_numbered: Final = WeightedCache[str, tuple[bytes, tuple[str, ...]]](_MAX_NUMBERED_CHARACTERS)


_transformer: Final = Transformer()
"""Of no connection: it encodes texts as UTF-8, which a statement before these may have to set."""


def _send(
    pgconn: PGconn, statements: Sequence[_Bound], prepared: PreparedStatements | None
) -> None:
    for unwanted in prepared.take_unwanted() if prepared is not None else ():
        pgconn.send_close_prepared(unwanted)
    for key, text, values, formats in statements:
        types = key[1]
        name = None
        if prepared is not None:
            name = prepared.find(key)
            if name is None and (name := prepared.add(key)) is not None:
                pgconn.send_prepare(name, text, types)
        if name is None:
            pgconn.send_query_params(text, values, types, formats)
        else:
            pgconn.send_query_prepared(name, values, formats)


def _receive(pgconn: PGconn) -> PQGen[list[PGresult]]:
    results: list[PGresult] = []
    ends_in_a_row = 0
    while True:
        while pgconn.is_busy():
            if (yield Wait.R):
                pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:  # the end of one statement's results
            ends_in_a_row += 1
            if ends_in_a_row > 1:
                raise psycopg.OperationalError("the connection is lost")
            continue
        ends_in_a_row = 0
        if result.status == ExecStatus.PIPELINE_SYNC:
            return results
        if result.status in {ExecStatus.TUPLES_OK, ExecStatus.FATAL_ERROR}:
            results.append(result)
