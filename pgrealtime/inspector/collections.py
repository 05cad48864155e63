"""Lists the collections in force with their rules, and a rule as SQL."""

import asyncio
from collections.abc import Iterator, Mapping

from pgrealtime.auth.principal import GUEST, AuthRecord, Principal
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.collections.streamed_tables import collection_name_of
from pgrealtime.errors import ConfigProblem, LookError, RuleError
from pgrealtime.inspector.answers import CollectionList, CollectionRow, CollectionSql, RuleSql
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.formula import tests_of
from pgrealtime.rules.language.predicate import AdmitAll, DenyAll
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.sql.reference import reference_query


def list_collections(
    collections: Collections,
    problems: tuple[ConfigProblem, ...],
    subscription_counts: Mapping[str, int],
) -> CollectionList:
    """Return the collections, and what is wrong with them."""
    reasons = {collection_name_of(problem): problem.message for problem in problems}
    rows = [
        CollectionRow(
            name=one.name,
            type=one.type,
            table=str(one.table.name),
            key=one.key.name,
            list_rule=one.list_rule,
            view_rule=one.view_rule,
            manage_rule=one.manage_rule,
            auth_rule=one.auth_rule if one.type == "auth" else "",
            is_streamed=one.is_streamed,
            subscriptions=subscription_counts.get(one.name, 0),
            problem=reasons.get(one.name, ""),
        )
        for one in collections.values()
    ]
    left_out = [f"{name}: {text}" for name, text in reasons.items() if name not in collections]
    return CollectionList(rows=rows, left_out=left_out)


async def collection_sql(
    collections: Collections, compiler: RuleCompiler, name: str
) -> CollectionSql:
    """Return a collection's rules as SQL, for guests and for callers of each auth collection.

    Yields to the loop between two of them: one takes some milliseconds.

    Raises:
        LookError: There is no such collection.
    """
    collection = collections.find(name)
    if collection is None:
        raise LookError("there is no such collection")
    rules: list[RuleSql] = []
    for key in ("list_rule", "view_rule"):
        for principal in _principals(collections):
            rules.append(_rule_sql(collections, compiler, collection, key, principal))
            await asyncio.sleep(0)
    return CollectionSql(name=collection.name, rules=rules)


def _principals(collections: Collections) -> Iterator[Principal]:
    yield GUEST
    for one in collections.values():
        if one.type == "auth":
            yield AuthRecord(collection_id=one.id, collection_name=one.name, id="id")


def _rule_sql(
    collections: Collections,
    compiler: RuleCompiler,
    collection: Collection,
    key: str,
    principal: Principal,
) -> RuleSql:
    rule: str | None = getattr(collection, key)
    caller = principal.collection_name if isinstance(principal, AuthRecord) else "guest"
    request = RuleRequest(principal=principal)
    sql = text = decided_by = ""
    try:
        match reference_query(collections, collection, rule, request):
            case AdmitAll():
                text = "everybody passes"
            case DenyAll(reason=reason):
                text = reason
            case made:
                sql = made.sql
                bound = compiler.bind_caller(collection, rule, request)
                if isinstance(bound, DenyAll):
                    text = bound.reason
                else:
                    tests = tests_of(bound.specialization.formula)
                    asks = any(test.in_process is None for test in tests)
                    decided_by = "PostgreSQL" if asks else "the process"
    except RuleError as error:
        text = error.message
    return RuleSql(rule=key, caller=caller, sql=sql, text=text, decided_by=decided_by)
