"""Evaluates a rule or a filter of the caller by parts, for a row, and reports that in lines.

Events and reads are explained with it. Each part is evaluated as a rule of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TypeAlias

from pgrealtime.auth.principal import Superuser
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.errors import RuleError
from pgrealtime.explain import text
from pgrealtime.explain.session import ExplainSession
from pgrealtime.explain.text import ConditionVerdict, EvaluatedFragment
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.sql.breakdown import Clause, RuleFragment, fragment_queries, split_rule


def labelled_lines(label: str, *lines: str) -> Iterator[str]:
    """Yield the lines, the first behind the label."""
    for n, line in enumerate(lines):
        yield f"{'' if n else label:<10}{line}"


RuleOutcome: TypeAlias = tuple[ConditionVerdict, str]
"""The verdict of the rule or the filter, evaluated by parts; why it isn't TRUE, or empty."""


class PartsExplainer:
    """Explains rules and filters of one request, in lines."""

    def __init__(
        self,
        session: ExplainSession,
        collections: Collections,
        request: RuleRequest,
        lines: list[str],
    ) -> None:
        self._session = session
        self._collections = collections
        self._request = request
        self._lines = lines
        self.now = datetime.now(UTC)

    async def explain_rule(
        self, collection: Collection, row: Row, key: str, rule: str | None
    ) -> RuleOutcome:
        """Evaluate the rule that is asked for the request's caller."""
        passes = isinstance(self._request.principal, Superuser)
        self.add_lines(key, *text.rule_lines(rule, is_superuser=passes))
        if passes or rule == "":
            return ConditionVerdict(True), ""
        if rule is None:
            return ConditionVerdict(False), f"{key} is missing: superusers only"
        return await self.explain_parts(collection, row, rule, is_filter=False)

    async def explain_parts(
        self, collection: Collection, row: Row, rule: str, *, is_filter: bool
    ) -> RuleOutcome:
        """Evaluate a text and each of its parts; a filter reads what its sender may see."""
        whole = split_rule(rule)
        evaluated = await self._evaluate_fragment(collection, row, whole, is_filter=is_filter)
        self._lines += text.fragment_lines(evaluated, "  ")
        if evaluated.verdict.value:
            return evaluated.verdict, ""
        deciding = text.describe_fragments(text.deciding_fragments(evaluated))
        return evaluated.verdict, f"the filter: {deciding}" if is_filter else deciding

    async def _evaluate_fragment(
        self, collection: Collection, row: Row, fragment: RuleFragment, *, is_filter: bool
    ) -> EvaluatedFragment:
        """Evaluate a part by itself, and the fragments that it consists of."""
        sides: tuple[tuple[str, str], ...] = ()
        try:
            made = fragment_queries(
                fragment,
                self._collections,
                collection,
                request=self._request,
                row=row,
                now=self.now,
                is_filter=is_filter,
            )
        except RuleError as error:
            truth = ConditionVerdict(None, f"can't be evaluated for this caller: {error.message}")
        else:
            truth_query = made.reference_query.truth_query(row, self.now)
            truth = await self._session.fetch_verdict(truth_query)
            sides = tuple(
                [(s.text, await self._session.format_operand(s)) for s in made.operand_values]
            )
        if isinstance(fragment, Clause):
            return EvaluatedFragment(
                display_text=fragment.text(" "), verdict=truth, operand_values=sides
            )
        parts = [
            await self._evaluate_fragment(collection, row, part, is_filter=is_filter)
            for part in fragment.fragments
        ]
        return EvaluatedFragment(
            display_text=fragment.text(" "),
            verdict=truth,
            is_conjunction=fragment.is_conjunction,
            fragments=tuple(parts),
        )

    def add_lines(self, label: str, *lines: str) -> None:
        """Add lines, the first behind the label."""
        self._lines += labelled_lines(label, *lines)
