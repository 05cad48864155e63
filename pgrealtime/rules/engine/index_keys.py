"""The keys of index entries: read from a row, or named by PostgreSQL. Shared by all rules.

``index_paths`` makes them of a rule's comparisons, ``index`` keeps members by them, ``batch_query``
asks PostgreSQL for the keys that only it can name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from itertools import count
from weakref import WeakValueDictionary

from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.rules.engine.test import Test
from pgrealtime.rules.language.comparison import is_double
from pgrealtime.rules.language.parameters import Parameter, ParameterClass
from pgrealtime.rules.language.predicate import Condition, Term, condition_parameters
from pgrealtime.rules.memory.compare import SqliteValue
from pgrealtime.rules.memory.index_key import KeyComparison
from pgrealtime.rules.memory.text_values import parse_numeric
from pgrealtime.rules.sql.conditions import SqlValues, translate_key_values


class RowKeyReader:
    """Reads the keys of a row that index entries are found by.

    Attributes:
        read_keys: Returns the row's keys; NULL is None.
        columns: The columns of the row that it reads.
        serial: Puts readers in an order that does not depend on any rule.
        has_single_key: Whether every row has exactly one key.
    """

    __slots__ = ("__weakref__", "columns", "has_single_key", "read_keys", "serial")

    def __init__(self, key_comparison: KeyComparison, serial: int, *, has_single_key: bool) -> None:
        self.read_keys: Callable[[Row], Sequence[SqliteValue]] = key_comparison.read_row_keys
        self.columns = key_comparison.column_names
        self.serial = serial
        self.has_single_key = has_single_key


class RemoteKey:
    """A key of a row that PostgreSQL names: the values of a term on related rows.

    It comes from a test ``where && term = value``, with joins of its own.

    Attributes:
        collection: The row's collection.
        term: What is compared with the caller's value.
        where: What else must be true of the joined rows, without caller's values; None if nothing.
        is_numeric: Whether the values are numbers; else they are texts.
    """

    def __init__(
        self,
        collections: Collections,
        collection: Collection,
        term: Term,
        where: Condition | None,
        parameter_classes: Mapping[Parameter, ParameterClass],
        *,
        is_numeric: bool,
    ) -> None:
        self.collection = collection
        self.term = term
        self.where = where
        self.is_numeric = is_numeric
        self._collections = collections
        self._parameter_classes = parameter_classes

    @cached_property
    def sql_values(self) -> SqlValues:
        """The SELECT of the key's values for a row, translated when it is first used.

        Raises:
            RuleUnsupportedError: PostgreSQL can't evaluate it exactly.
        """
        return translate_key_values(
            self.term, self.where, self._collections, self._parameter_classes
        )

    def parse_key(self, text: str) -> SqliteValue:
        """Return the key of index entries for a value in PostgreSQL's text form."""
        if not self.is_numeric:
            return text
        return float(text) if is_double(self.term) else parse_numeric(text)


class KeyRegistry:
    """Makes each key once for all rules that use it, so that these share index entries."""

    def __init__(self) -> None:
        self._row_key_readers: WeakValueDictionary[Hashable, RowKeyReader] = WeakValueDictionary()
        self._remote_keys: WeakValueDictionary[Hashable, RemoteKey] = WeakValueDictionary()
        self._serials = count()

    def row_key_reader(
        self, test: Test, key_comparison: KeyComparison, *, has_single_key: bool
    ) -> RowKeyReader:
        """Return the reader of a key that one of the test's comparisons reads from rows."""
        identity = (test.collection.name, key_comparison.reader_identity)
        reader = self._row_key_readers.get(identity)
        if reader is None:
            reader = RowKeyReader(
                key_comparison, next(self._serials), has_single_key=has_single_key
            )
            self._row_key_readers[identity] = reader
        return reader

    def remote_key(
        self, test: Test, term: Term, where: Condition | None, *, is_numeric: bool
    ) -> RemoteKey:
        """Return the key that PostgreSQL names for a term of the test."""
        parameters = () if where is None else condition_parameters(where)
        classes = {parameter: test.parameter_classes[parameter] for parameter in parameters}
        identity = (test.collection.name, term, where, tuple(classes.items()), is_numeric)
        remote_key = self._remote_keys.get(identity)
        if remote_key is None:
            remote_key = RemoteKey(
                test.collections, test.collection, term, where, classes, is_numeric=is_numeric
            )
            self._remote_keys[identity] = remote_key
        return remote_key
