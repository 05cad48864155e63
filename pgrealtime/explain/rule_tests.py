"""Decides the rule tests of the configuration, each with the rule engine, as the service would.

Called by ``check``. All of them are decided in one read-only snapshot of the database, from which
related rows are read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from datetime import date

from pgrealtime.auth.authenticator import record_of_claims
from pgrealtime.auth.principal import GUEST, AuthRecord, Caller, ClaimValue, Superuser
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import Config, RuleTestCaller, RuleTestConfig
from pgrealtime.errors import AuthError, ConfigProblem
from pgrealtime.explain.caller import NamedUser, resolve_caller
from pgrealtime.explain.delivery import DeliveryExplainer
from pgrealtime.explain.session import ExplainSession, open_explain_session
from pgrealtime.explain.text import ConditionVerdict
from pgrealtime.postgres.connect import open_query_pool
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.protocol.topic import Topic
from pgrealtime.spelling import did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleTestResults:
    """The results of all tests."""

    decisions: int
    """How many: one for each record, rule and caller."""
    failures: tuple[ConfigProblem, ...]
    """Those that weren't as expected, with the parts of the rule that decided."""
    problems: tuple[ConfigProblem, ...]
    """Tests that can't be decided, since they name what isn't there."""


class _UndecidableError(Exception):
    """A test names what isn't there; ``key`` of the test is wrong."""

    def __init__(self, key: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.key = key
        self.message = message
        self.hint = hint


async def run_rule_tests(config: Config, collections: Collections) -> RuleTestResults:
    """Decide every test.

    Raises:
        DatabaseUnreachableError: The database doesn't answer.
        SetupError: A table can't be read.
    """
    decisions = 0
    failures: list[ConfigProblem] = []
    problems: list[ConfigProblem] = []
    # Callers are read while the session has a connection.
    size = max(2, config.database.pool_size)
    database = config.database.model_copy(update={"wait_for": 0.0, "pool_size": size})
    async with open_query_pool(database) as pool, open_explain_session(pool) as session:
        callers = _Callers(config, collections, pool)
        for n, test in enumerate(config.tests):
            try:
                async for failure in _decide(n, test, collections, session, callers):
                    decisions += 1
                    failures += [failure] if failure is not None else []
            except _UndecidableError as error:
                path = ".".join(filter(None, (f"tests.{n}", error.key)))
                problems.append(ConfigProblem(path, error.message, error.hint))
    return RuleTestResults(decisions=decisions, failures=tuple(failures), problems=tuple(problems))


async def _decide(
    n: int,
    test: RuleTestConfig,
    collections: Collections,
    session: ExplainSession,
    callers: _Callers,
) -> AsyncIterator[ConfigProblem | None]:
    """Yield for each decision None, or how it failed."""
    collection = collections.find(test.collection)
    if collection is None:
        hint = did_you_mean(test.collection, collections)
        raise _UndecidableError("collection", f'there is no collection "{test.collection}"', hint)
    row = await _find_row(test, collection, session)
    record_id = row[collection.key.name]
    record = f"{collection.name}/{record_id}" if record_id else f"the record of {collection.name}"
    for key, position, given in _expectations(test):
        caller = await callers.find(given, f"{key}.{position}")
        for rule_key in test.rule_keys:
            lines: list[str] = []
            topic = _topic(collection, row, is_list=rule_key == "list_rule")
            explainer = DeliveryExplainer(
                session, collections, caller, topic, lines, with_sql=False
            )
            if test.record:
                _require_values(test, collection, explainer.columns_read(collection))
            is_visible, why_not = await explainer.explain_image(collection, row, "values")
            if is_visible is None:
                raise _UndecidableError(
                    f"{key}.{position}", f"{rule_key} wasn't decided: {why_not}"
                )
            if is_visible is (key == "allow"):
                yield None
                continue
            may = f"may see {record}" if is_visible else f"may not see {record}"
            yield ConfigProblem(
                f"tests.{n}.{key}.{position}",
                f"{test.name or record}: by {rule_key} {given.user} {may}",
                "" if is_visible else why_not,
                marked_text="\n".join(f"    {line}" for line in lines),
            )


def _expectations(test: RuleTestConfig) -> Iterator[tuple[str, int, RuleTestCaller]]:
    for key, callers in (("allow", test.allow), ("deny", test.deny)):
        for position, caller in enumerate(callers):
            yield key, position, caller


def _topic(collection: Collection, row: Row, *, is_list: bool) -> Topic:
    record_id = None if is_list else row[collection.key.name] or ""
    text = f"{collection.name}/{'*' if record_id is None else record_id}"
    return Topic(text=text, collection_name_or_id=collection.name, record_id=record_id)


# -- records


async def _find_row(test: RuleTestConfig, collection: Collection, session: ExplainSession) -> Row:
    if test.id:
        row = await session.fetch_row_by_id(collection, test.id)
        if row is None:
            message = f'"{collection.name}" has no record "{test.id}"'
            raise _UndecidableError("id", message, "or give the fields of a record instead of id")
        return row
    values: dict[str, object] = {}
    for name, value in test.record.items():
        column = collection.column_of(name)
        if name not in collection.fields_by_name:
            hint = did_you_mean(name, collection.fields_by_name)
            message = f'"{collection.name}" has no field "{name}"'
            raise _UndecidableError(f"record.{name}", message, hint)
        if column is None:
            message = f'"{name}" is read from its junction table, and can\'t be given'
            raise _UndecidableError(f"record.{name}", message, "name a record that exists by id")
        values[column.name] = str(value) if isinstance(value, date) else value
    columns = [column.name for column in collection.table.columns if not column.id_sources]
    given = await session.text_forms(collection, {name: values.get(name) for name in columns})
    if not isinstance(given, ConditionVerdict):
        return {**given, collection.key.name: given.get(collection.key.name)}
    for name in test.record:
        column = collection.column_of(name)
        assert column is not None
        form = await session.text_forms(collection, {column.name: values[column.name]})
        if isinstance(form, ConditionVerdict):
            message = f"PostgreSQL takes this for no value of type {column.type.name}"
            raise _UndecidableError(f"record.{name}", message)
    raise _UndecidableError("record", f'PostgreSQL can\'t make a row of "{collection.table.name}"')


def _require_values(
    test: RuleTestConfig, collection: Collection, columns_read: frozenset[str]
) -> None:
    """Raise if a column is NULL in the test's record that no row can have so."""
    for field in collection.fields:
        column = field.column
        if column is None or column.name not in columns_read or not column.not_null:
            continue
        if test.record.get(field.name) is None:
            message = f'the rule reads "{field.name}", which is never NULL: give it a value'
            raise _UndecidableError("record", message)


# -- callers


class _Callers:
    """Finds the callers that tests name, and keeps them."""

    def __init__(self, config: Config, collections: Collections, pool: QueryPool) -> None:
        self._config = config
        self._collections = collections
        self._pool = pool
        self._found: dict[str, Caller] = {}

    async def find(self, given: RuleTestCaller, key: str) -> Caller:
        """Return the caller that a test names at a key."""
        if given.user not in self._found:
            self._found[given.user] = await self._load(given.user, key)
        caller = self._found[given.user]
        if not isinstance(caller.principal, AuthRecord):
            if given.claims:
                raise _UndecidableError(f"{key}.claims", f"{given.user} has no claims")
            return caller
        claims = self._claims(given, caller.principal.collection_name, key)
        return replace(caller, principal=replace(caller.principal, claims=claims))

    async def _load(self, user: str, key: str) -> Caller:
        collection, slash, record_id = user.partition("/")
        if not slash:
            return Caller(GUEST if user == "guest" else Superuser(""))
        if collection not in self._collections and collection in self._issuer_collections:
            return Caller(record_of_claims({}, collection, record_id))
        try:
            spec = NamedUser(collection, record_id)
            return (await resolve_caller(self._config, self._collections, self._pool, spec))[0]
        except AuthError as error:
            raise _UndecidableError(key, error.message) from error

    @property
    def _issuer_collections(self) -> set[str]:
        return {issuer.collection for issuer in self._config.auth.issuers}

    def _claims(
        self, given: RuleTestCaller, collection: str, key: str
    ) -> tuple[tuple[str, ClaimValue], ...]:
        """Return the claims as a token of the collection's issuers would give them."""
        issuers = [one for one in self._config.auth.issuers if one.collection == collection]
        names = list(dict.fromkeys(name for issuer in issuers for name in issuer.claims))
        for name in given.claims:
            if name not in names:
                message = f'no issuer of "{collection}" has "{name}" among its claims'
                hint = did_you_mean(name, names)
                raise _UndecidableError(f"{key}.claims.{name}", message, hint)
        return tuple((name, _claim_value(given.claims.get(name))) for name in names)


def _claim_value(value: str | float | bool | None) -> ClaimValue:  # noqa: FBT001
    return int(value) if isinstance(value, bool) else value
