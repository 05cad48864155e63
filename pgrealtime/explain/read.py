"""Explains whether a caller finds a record in a list, or may view it, and why.

The verdict is that of the statement that the service runs for the record's id. Rule and filter are
also evaluated by parts, and each key of the sort by itself, because a sort through a relation asks
the list rule of what it joins.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

from pgrealtime.catalog.model import canonical_id
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection
from pgrealtime.errors import ReadError, RuleError
from pgrealtime.explain import text
from pgrealtime.explain.parts import RuleOutcome
from pgrealtime.explain.record import RecordExplainer
from pgrealtime.explain.text import ConditionVerdict
from pgrealtime.reads.compiler import ListCompiler
from pgrealtime.reads.list_parameters import parse_list_parameters
from pgrealtime.records.fields import parse_fields
from pgrealtime.rules.language.list_query import reserved_word
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.sql.reference import reference_query


class ReadExplainer(RecordExplainer):
    """Explains one request for one record: a list, or the view of the record the topic names."""

    label = "read"
    topic_noun = "request"
    rule_context = "default"

    def _find_collection(self, name_or_id: str) -> Collection | None:
        return self._collections.find_ignoring_case(name_or_id)

    def _no_collection(self, name: str) -> tuple[list[str], str]:
        return [], f'there is no collection "{name}"'

    async def _explain_row(self, collection: Collection, row: Row, record_id: str) -> str:
        """Explain a list or a view."""
        if self._topic.record_id is None:
            return await self._explain_list(collection, row, record_id)
        return await self._explain_view(collection, row, record_id)

    @cached_property
    def _compiler(self) -> ListCompiler:
        return ListCompiler(self._collections)

    # -- lists

    async def _explain_list(self, collection: Collection, row: Row, record_id: str) -> str:
        rule, query = collection.list_rule, self._request.query
        filter_text, sort_text = query.get("filter", ""), query.get("sort", "")
        self._add_record_lines(collection, row, rule, self._request)
        outcomes = [
            await self._parts.explain_rule(collection, row, "list_rule", rule),
            await self._explain_filter(collection, row, filter_text),
            await self._explain_sort(collection, record_id, sort_text),
        ]
        has_rule = bool(rule) and not self._is_superuser
        parts = {"rule": has_rule, "filter": bool(filter_text), "sort": bool(sort_text)}
        verdict = await self._verdict(collection, rule, record_id, filter_text, sort_text)
        refusals = [*self._list_refusals(filter_text, sort_text), *self._field_refusals()]
        return self._reason(verdict, outcomes, refusals, [name for name in parts if parts[name]])

    async def _explain_filter(self, collection: Collection, row: Row, wanted: str) -> RuleOutcome:
        if not wanted:
            return ConditionVerdict(True), ""
        self._parts.add_lines("filter", *wanted.splitlines())
        if self._reserved_word(wanted) is not None:
            return ConditionVerdict(True), ""  # the whole request is refused
        try:
            await self._compiler.bind(collection, "", self._request, filter_text=wanted)
        except RuleError as error:
            self._lines += text.refusal_lines(wanted, error)
            return ConditionVerdict(False), f"the filter is refused: {error.message}"
        if not self._is_superuser:
            return await self._parts.explain_parts(collection, row, wanted, is_filter=True)
        # Superusers may use in lists what rules may.
        outcome = await self._parts.explain_parts(collection, row, wanted, is_filter=False)
        return outcome[0], outcome[1] and f"the filter: {outcome[1]}"

    async def _explain_sort(
        self, collection: Collection, record_id: str, wanted: str
    ) -> RuleOutcome:
        """Find out which keys of the sort remove the record."""
        if not wanted:
            return ConditionVerdict(True), ""
        self._parts.add_lines("sort", wanted)
        if self._reserved_word(wanted) is not None:
            return ConditionVerdict(True), ""
        try:
            await self._compiler.bind(collection, "", self._request, sort_text=wanted)
        except RuleError as error:
            self._lines.append(f"  refused: {error.message}")
            return ConditionVerdict(False), f"the sort is refused: {error.message}"
        removing: list[str] = []
        failure = ""
        for key in wanted.split(","):
            found = await self._fetch_verdict(collection, "", record_id, sort_text=key)
            self._lines += text.sort_key_lines(key.strip(), found)
            if not found.value:
                removing.append(key.strip())
                failure = failure or found.failure
        if not removing:
            return ConditionVerdict(True), ""
        reason = f"the sort: {', '.join(removing)} joins what the caller can't list"
        return ConditionVerdict(None if failure else False, failure), failure or reason

    def _reserved_word(self, *texts: str) -> str | None:
        """Return the first word that others than superusers may not use in the texts."""
        words = (reserved_word(one, "") for one in texts if not self._is_superuser)
        return next(filter(None, words), None)

    def _list_refusals(self, filter_text: str, sort_text: str) -> Iterator[str]:
        """Yield why a list is refused, apart from what filter and sort name."""
        word = self._reserved_word(filter_text, sort_text)
        if word is not None:
            yield f"only superusers can use {word} in filter and sort, even in a text"
        try:
            parse_list_parameters(self._request.query)
        except ReadError as error:
            yield f"the request is refused: {error.message}"

    def _field_refusals(self) -> Iterator[str]:
        if parse_fields(self._request.query.get("fields", "")) is None:
            yield "the request is refused: fields can't be read"

    # -- views

    async def _explain_view(self, collection: Collection, row: Row, record_id: str) -> str:
        """Explain by the view rule alone: filter and sort of a view are not looked at."""
        rule = collection.view_rule
        without = {k: v for k, v in self._request.query.items() if k != "filter"}
        request = RuleRequest(principal=self._request.principal, query=without)
        self._add_record_lines(collection, row, rule, request)
        outcome = await self._parts.explain_rule(collection, row, "view_rule", rule)
        verdict = await self._verdict(collection, rule, record_id)
        return self._reason(verdict, [outcome], [*self._field_refusals()], ["rule"])

    # -- the service's own statement

    async def _verdict(
        self,
        collection: Collection,
        rule: str | None,
        record_id: str,
        filter_text: str = "",
        sort_text: str = "",
    ) -> ConditionVerdict:
        """Return whether the statement of the service has the record."""
        if rule is None and not self._is_superuser:
            return ConditionVerdict(False)
        try:
            return await self._fetch_verdict(
                collection,
                rule or "",
                record_id,
                filter_text=filter_text,
                sort_text=sort_text,
                is_printed=self._with_sql,
            )
        except RuleError as error:
            return ConditionVerdict(None, error.message)

    async def _fetch_verdict(
        self,
        collection: Collection,
        rule: str,
        record_id: str,
        *,
        filter_text: str = "",
        sort_text: str = "",
        is_printed: bool = False,
    ) -> ConditionVerdict:
        bound = await self._compiler.bind(
            collection, rule, self._request, filter_text=filter_text, sort_text=sort_text
        )
        params = {**bound.params, "id": canonical_id(record_id, collection.key.type)}
        if is_printed:
            values = [f"{name} = {value!r}" for name, value in params.items()]
            self._parts.add_lines("sql", bound.sql.row, *values)
        return await self._session.fetch_is_found(bound.sql.row, params)

    def _add_record_lines(
        self, collection: Collection, row: Row, rule: str | None, request: RuleRequest
    ) -> None:
        made = reference_query(self._collections, collection, rule, request)
        self._parts.add_lines("record", *text.row_lines(collection, row, made))

    def _reason(
        self,
        verdict: ConditionVerdict,
        outcomes: Sequence[RuleOutcome],
        refusals: Sequence[str],
        parts: Sequence[str],
    ) -> str:
        """Return why the record isn't found; report a verdict that its parts contradict."""
        self._parts.add_lines("note", text.READ_CAVEAT)
        failure = verdict.failure or next((one.failure for one, _ in outcomes if one.failure), "")
        is_each_true = all(one.value for one, _ in outcomes)
        are_joined = is_each_true and not verdict.value and len(parts) > 1
        is_contradicted = bool(verdict.value) is not is_each_true and not are_joined
        if is_contradicted and not failure and not refusals:
            lines = text.read_disagreement_lines(statement=bool(verdict.value), parts=is_each_true)
            self._parts.add_lines("BUG", *lines)
        if verdict.value and not refusals:
            return ""
        reasons = [*refusals, *(reason for _, reason in outcomes if reason)]
        if not reasons and are_joined and not failure:
            names = f"{', '.join(parts[:-1])} and {parts[-1]}"
            return f"no one related row satisfies {names} together"
        return "; ".join(reasons) or failure or "see BUG above"
