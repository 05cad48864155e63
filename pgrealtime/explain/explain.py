"""Explains whether a caller would receive an event of a record on a topic, and why.

``cli.explain`` calls it. The verdict is the rule engine's, as in the service, and must equal that
of the reference query. Each part of a rule is also evaluated as a rule of its own. All statements
run in one read-only snapshot. ``read`` explains whether the caller would find the record.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import psycopg

from pgrealtime.auth.principal import Caller, Guest
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.load import read_configured_catalog
from pgrealtime.collections.model import Collections
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.config.model import Config
from pgrealtime.errors import ConfigError
from pgrealtime.explain import text
from pgrealtime.explain.caller import CallerSpec, resolve_caller
from pgrealtime.explain.delivery import DeliveryExplainer
from pgrealtime.explain.mirror import MirrorExplainer
from pgrealtime.explain.parts import labelled_lines
from pgrealtime.explain.read import ReadExplainer
from pgrealtime.explain.record import RecordExplainer
from pgrealtime.explain.session import ExplainSession, open_explain_session
from pgrealtime.postgres.connect import open_query_pool
from pgrealtime.protocol.topic import Topic, parse_topic
from pgrealtime.rules.rule_set import rule_problems


@dataclass(frozen=True, slots=True)
class Explanation:
    """The verdict and the lines that explain it."""

    is_delivered: bool
    """Of a read: whether the record is found."""
    lines: tuple[str, ...]
    """Safe to print on a terminal; the last one is the verdict."""


async def explain_delivery(
    config: Config,
    caller_spec: CallerSpec,
    topic: str,
    record_id: str | None,
    *,
    with_sql: bool = False,
) -> Explanation:
    """Evaluate a record as it is now for a caller's subscription.

    The topic is as submitted, with its options; the id is None if it names the record. ``with_sql``
    adds the statements to the lines, without the values of hidden fields.

    Raises:
        ConfigError: The configuration is invalid.
        DatabaseUnreachableError: The database doesn't answer.
        AuthError: Code ``user_unknown``: the collection or the user does not exist.
        SetupError: A table can't be read.
    """
    return await _explain(
        config, caller_spec, topic, record_id, DeliveryExplainer, with_sql=with_sql
    )


async def explain_mirror(
    config: Config,
    caller_spec: CallerSpec,
    topic: str,
    record_id: str | None,
    before: Mapping[str, object],
    *,
    with_sql: bool = False,
) -> Explanation:
    """Explain what a caller's mirror is told of an update of a record to what it is now.

    ``before`` has the fields that had other values before, as JSON has them. Of a record that is
    gone it has all that the rule reads: its deletion is explained. Raises as ``explain_delivery``.
    """
    make_explainer = partial(MirrorExplainer, before=before)
    return await _explain(config, caller_spec, topic, record_id, make_explainer, with_sql=with_sql)


async def explain_read(
    config: Config,
    caller_spec: CallerSpec,
    topic: str,
    record_id: str | None,
    *,
    with_sql: bool = False,
) -> Explanation:
    """Look for a record as it is now in a caller's list; if the topic names it, view it.

    The topic's options are the query of the request. Raises as ``explain_delivery``.
    """
    return await _explain(config, caller_spec, topic, record_id, ReadExplainer, with_sql=with_sql)


class _MakeExplainer(Protocol):
    def __call__(
        self,
        session: ExplainSession,
        collections: Collections,
        caller: Caller,
        topic: Topic,
        lines: list[str],
        *,
        with_sql: bool,
    ) -> RecordExplainer: ...


async def _explain(
    config: Config,
    caller_spec: CallerSpec,
    topic: str,
    record_id: str | None,
    make_explainer: _MakeExplainer,
    *,
    with_sql: bool,
) -> Explanation:
    is_read = make_explainer is ReadExplainer
    # A command must fail at once where the service would wait for its database.
    changed = {"wait_for": 0.0}
    if is_read:
        changed["statement_timeout"] = config.reads.statement_timeout
    database = config.database.model_copy(update=changed)
    async with open_query_pool(database) as pool:
        catalog = await read_configured_catalog(config, pool)
        collections = build_collections(
            config.collections,
            catalog,
            config.auth.claim_names,
            is_strict=config.records.hidden == "strict",
        )
        if problems := tuple(rule_problems(collections)):
            raise ConfigError(problems)
        with suppress(psycopg.Error):  # reading the record reports it
            await pool.configure_row_security(reachable_tables(collections).values())
        caller, caller_lines = await resolve_caller(config, collections, pool, caller_spec)
        parsed_topic = parse_topic(topic)
        wanted_id = parsed_topic.record_id if record_id is None else record_id
        lines = [*labelled_lines("caller", *caller_lines)]
        outcome = ""
        if isinstance(caller.principal, Guest) and not config.auth.allow_guests:
            refused = "read" if is_read else "subscribe"
            reason = f"guests may not {refused} (auth.allow_guests)"
        elif is_read and not config.reads.enabled:
            reason = "nothing can be read (reads.enabled)"
        else:
            async with open_explain_session(pool) as session:
                explainer = make_explainer(
                    session, collections, caller, parsed_topic, lines, with_sql=with_sql
                )
                reason = await explainer.explain_record(wanted_id or "")
                outcome = explainer.outcome
    positive = "found" if is_read else "delivered"
    verdict = f"not {positive}: {reason}" if reason else positive + outcome
    return Explanation(not reason, tuple(map(text.escape_unprintable, (*lines, verdict))))
