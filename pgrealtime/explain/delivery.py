"""Explains whether the caller receives events of a record on a topic. ``explain`` calls it."""

from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection
from pgrealtime.errors import RuleError
from pgrealtime.explain import text
from pgrealtime.explain.parts import RuleOutcome
from pgrealtime.explain.record import RecordExplainer
from pgrealtime.explain.text import ConditionVerdict
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.index import PredicateIndex
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.engine.row_evaluation import RowEvaluation
from pgrealtime.rules.language.parameters import MacroValues
from pgrealtime.rules.language.predicate import AdmitAll, DenyAll
from pgrealtime.rules.language.resolve import filter_text, resolve_filter
from pgrealtime.rules.sql.reference import ReferenceQuery, auth_collection_of, reference_query


class DeliveryExplainer(RecordExplainer):
    """Explains whether the caller receives events of the record on the topic."""

    label = topic_noun = "topic"
    rule_context = "realtime"

    def _find_collection(self, name_or_id: str) -> Collection | None:
        return self._collections.find(name_or_id)

    def _no_collection(self, name: str) -> tuple[list[str], str]:
        del name
        accepted = "such a subscription is accepted and receives nothing, as in PocketBase"
        return [accepted], "the topic names no collection"

    def _collection_refusal(self, collection: Collection) -> str:
        if collection.is_streamed:
            return ""
        return f'"{collection.name}" can only be read (stream: false)'

    async def _explain_row(self, collection: Collection, row: Row, record_id: str) -> str:
        del record_id  # the engine gets the row
        is_visible, reason = await self.explain_image(collection, row, "record")
        self._parts.add_lines("note", text.CAVEAT)
        return "" if is_visible else reason

    def columns_read(self, collection: Collection) -> frozenset[str]:
        """Return the columns of the collection's row that the topic's rule reads."""
        is_whole = self._topic.record_id is None
        rule = collection.list_rule if is_whole else collection.view_rule
        made = reference_query(self._collections, collection, rule, self._request)
        return frozenset(made.column_names if isinstance(made, ReferenceQuery) else ())

    async def explain_image(
        self,
        collection: Collection,
        row: Row,
        label: str,
        unknown_columns: frozenset[str] = frozenset(),
    ) -> tuple[bool | None, str]:
        """Evaluate by parts, with the reference query and with the engine; report a difference.

        Returns the engine's verdict, None if it has none, and why the parts don't admit the row.
        Of ``unknown_columns`` the engine doesn't get the values.
        """
        is_whole = self._topic.record_id is None
        key = "list_rule" if is_whole else "view_rule"
        rule = collection.list_rule if is_whole else collection.view_rule
        made = reference_query(self._collections, collection, rule, self._request)
        describe = text.row_lines if label == "record" else text.column_lines
        self._parts.add_lines(label, *describe(collection, row, made))
        rule_verdict, rule_reason = await self._parts.explain_rule(collection, row, key, rule)
        filter_verdict, filter_reason = await self._explain_filter(collection, row)
        plain = await self._reference_verdict(made, row)
        known = {name: value for name, value in row.items() if name not in unknown_columns}
        engine = await self._engine_verdict(collection, known)
        parts = bool(rule_verdict.value and filter_verdict.value)
        failure = plain.failure or rule_verdict.failure or filter_verdict.failure
        if not failure and engine is not None and {bool(plain.value), parts} != {engine}:
            lines = text.disagreement_lines(plain=bool(plain.value), engine=engine, parts=parts)
            self._parts.add_lines("BUG", *lines)
        reasons = filter(None, (rule_reason, filter_reason))
        return engine, "; ".join(reasons) or plain.failure or "see BUG above"

    async def _explain_filter(self, collection: Collection, row: Row) -> RuleOutcome:
        wanted = self._topic.query.get("filter", "")
        if not wanted:
            return ConditionVerdict(True), ""
        self._parts.add_lines("filter", *wanted.splitlines())
        auth = auth_collection_of(self._collections, self._request)
        try:
            filter_text(self._topic.query, is_superuser=self._is_superuser)
            resolve_filter(
                wanted, self._collections, collection, auth, is_superuser=self._is_superuser
            )
        except RuleError as error:
            self._lines += text.refusal_lines(wanted, error)
            return ConditionVerdict(False), f"the filter is refused: {error.message}"
        return await self._parts.explain_parts(collection, row, wanted, is_filter=True)

    async def _reference_verdict(
        self, compiled: AdmitAll | DenyAll | ReferenceQuery, row: Row
    ) -> ConditionVerdict:
        """Return the reference query's verdict on rule and filter together."""
        match compiled:
            case AdmitAll():
                return ConditionVerdict(True)
            case DenyAll():
                return ConditionVerdict(False)
            case ReferenceQuery():
                question = compiled.sql_query([row], self._parts.now)
                if self._with_sql:
                    self._parts.add_lines("sql", *text.sql_lines(question, compiled))
                rows = await self._session.fetch_rows(question)
                return rows if isinstance(rows, ConditionVerdict) else ConditionVerdict(bool(rows))

    async def _engine_verdict(self, collection: Collection, row: Row) -> bool | None:
        """Return the rule engine's verdict, which decides in the service.

        None if it reads a column that the row lacks, or a question has no answer.
        """
        bound = Matcher(self._collections).bind_topic(
            collection, self._topic, self._caller.principal, self._caller.own_row
        )
        if isinstance(bound, DenyAll):
            return False
        evaluation: Evaluation[int, BoundPredicate] = Evaluation(MacroValues(self._parts.now))
        evaluated: RowEvaluation[BoundPredicate] = RowEvaluation(
            row,
            collection.column_names.difference(row),
            evaluation.macro_values,
            is_missing_column_unknown=True,
        )
        evaluation.rows[0] = evaluated
        if self._topic.record_id is None:
            index: PredicateIndex[BoundPredicate] = PredicateIndex()
            index.add(bound)
            evaluated.evaluate_index(index)
        else:
            evaluated.evaluate_members([bound])
        await self._session.answer_questions(evaluation)
        if bound in evaluation.hits(0):
            return True
        unknown = evaluation.undecided_members | evaluation.members_missing_columns()[1]
        return None if bound in unknown else False
