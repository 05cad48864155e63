"""Builds collections, as PocketBase means the word, from the configuration and the catalogue.

Called at the start, by a reload, and by the commands ``check``, ``explain`` and ``init``. Rules
are copied as texts; ``rules.rule_set`` checks them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pgrealtime.catalog.model import Catalog, Column, Table, TypeKind
from pgrealtime.collections import validate
from pgrealtime.collections.field_kinds import CONFIGURABLE_KINDS, SECRET_FIELDS, field_kind_of
from pgrealtime.collections.model import (
    Collection,
    Collections,
    Field,
    FieldKind,
    Junction,
    Relation,
)
from pgrealtime.collections.names import check_names, collection_id_of
from pgrealtime.collections.order import default_order, order_problems
from pgrealtime.collections.tables import (
    ResolvedTable,
    find_table,
    resolve_tables,
    unknown_column_problem,
)
from pgrealtime.config.model import CollectionConfig, RelationConfig
from pgrealtime.errors import ConfigError, ConfigProblem


def build_collections(
    configured: Mapping[str, CollectionConfig],
    catalog: Catalog,
    claim_names: frozenset[str] = frozenset(),
    *,
    is_strict: bool = False,
) -> Collections:
    """Return the configured collections, with the settings that ``Collections`` explains.

    Raises:
        ConfigError: With every problem found, under paths such as ``collections.posts.table``.
    """
    collections, problems = build_with_problems(
        configured, catalog, claim_names, is_strict=is_strict
    )
    if problems:
        raise ConfigError(problems)
    return collections


def build_with_problems(
    configured: Mapping[str, CollectionConfig],
    catalog: Catalog,
    claim_names: frozenset[str] = frozenset(),
    *,
    is_strict: bool = False,
) -> tuple[Collections, tuple[ConfigProblem, ...]]:
    """Return the collections whose table and key are found, and every problem.

    If there are problems the collections serve for further checks only.
    """
    problems = [*check_names(configured)]
    resolved = resolve_tables(configured, catalog, problems)
    built = tuple(
        _CollectionBuilder(table, resolved, catalog, problems).build()
        for table in resolved.values()
    )
    problems += validate.claim_problems(claim_names, built)
    collections = Collections(
        built,
        server_encoding=catalog.server_encoding,
        claim_names=claim_names,
        is_strict=is_strict,
    )
    return collections, tuple(problems)


@dataclass(frozen=True, slots=True)
class _CollectionBuilder:
    """Builds one collection; appends its problems to the list."""

    resolved: ResolvedTable
    all_resolved: Mapping[str, ResolvedTable]
    catalog: Catalog
    problems: list[ConfigProblem]

    def build(self) -> Collection:
        resolved, config = self.resolved, self.resolved.config
        columns = [c for c in resolved.table.columns if resolved.is_included(c)]
        fields = [field for column in columns for field in self._fields_of(column)]
        column_fields = {field.name for field in fields}
        self.problems.extend(validate.configured_name_problems(resolved, column_fields))
        fields += self._junction_fields(column_fields)
        self.problems.extend(validate.login_problems(resolved, {field.name for field in fields}))
        self.problems.extend(validate.field_problems(resolved, fields))
        self.problems.extend(order_problems(resolved, fields))
        return Collection(
            name=resolved.name,
            id=collection_id_of(resolved.name, config),
            type=config.type,
            table=resolved.table,
            key=resolved.key,
            fields=tuple(fields),
            list_rule=config.list_rule,
            view_rule=config.view_rule,
            manage_rule=config.manage_rule,
            auth_rule=config.auth_rule,
            order=default_order(resolved, fields),
            mirrors=config.mirrors,
            is_streamed=config.stream,
        )

    def _report(self, key: str, message: str, hint: str = "") -> None:
        self.problems.append(self.resolved.problem(key, message, hint))

    # -- fields of columns

    def _fields_of(self, column: Column) -> Iterator[Field]:
        field = self._column_field(column)
        yield field
        if column == self.resolved.key and (relation := self._key_relation(field)) is not None:
            yield relation

    def _key_relation(self, id_field: Field) -> Field | None:
        """Return the key as a relation, if it is one: to the other half of a one-to-one pair."""
        resolved, name = self.resolved, self.resolved.key_relation_name
        kind, _ = field_kind_of(resolved.key.type)
        if name is None or kind not in (FieldKind.TEXT, FieldKind.NUMBER):
            return None
        is_hidden = name in resolved.config.fields.hide
        field = replace(id_field, name=name, kind=kind, is_hidden=is_hidden)
        field = self._with_relation(field, resolved.key)
        return None if field.relation is None else field

    def _column_field(self, column: Column) -> Field:
        config = self.resolved.config
        name = self.resolved.field_name(column)
        kind, is_multiple = field_kind_of(column.type)
        is_named_secret = self.resolved.is_auth and name in SECRET_FIELDS
        is_secret = is_named_secret or column.name in config.login.secret_columns
        is_enum = column.type.base.kind is TypeKind.ENUM
        field = Field(
            name=name,
            column=column,
            kind=self._configured_kind(name, kind),
            type=column.type,
            is_multiple=is_multiple,
            is_select=is_enum or config.fields.types.get(name) == "select",
            is_hidden=is_secret or name in config.fields.hide,
            is_secret=is_secret,
        )
        if column == self.resolved.key:
            return replace(field, kind=FieldKind.TEXT)
        return self._with_relation(field, column)

    def _configured_kind(self, name: str, kind: FieldKind) -> FieldKind:
        """Return the kind that ``fields.types`` gives the field, or else that of its column."""
        wanted = self.resolved.config.fields.types.get(name)
        if wanted is None:
            return kind
        possible = CONFIGURABLE_KINDS.get(kind, {})
        if wanted not in possible:
            hint = f"possible are {', '.join(possible)}" if possible else ""
            self._report(f"fields.types.{name}", f'its column can\'t be shown as "{wanted}"', hint)
        return possible.get(wanted, kind)

    # -- relations

    def _with_relation(self, field: Field, column: Column) -> Field:
        """Return the field as a relation, if the configuration or a foreign key makes it one."""
        relation = self.resolved.config.relations.get(field.name)
        if relation is None:
            target = self._foreign_key_target(column)
        elif relation.through or relation.collection not in self.all_resolved:
            return field
        else:
            target = relation.collection
        if target is None:
            return field
        if field.kind not in (FieldKind.TEXT, FieldKind.NUMBER):
            self._report(f"relations.{field.name}", f"a {field.kind.value} column holds no ids")
            return field
        return replace(field, kind=FieldKind.RELATION, relation=Relation(collection_name=target))

    def _foreign_key_target(self, column: Column) -> str | None:
        """Return the collection whose key a foreign key of this column alone references."""
        targets = sorted(
            other.name
            for other in self.all_resolved.values()
            for foreign_key in self.resolved.table.foreign_keys
            if foreign_key.column_names == (column.name,)
            and foreign_key.target == other.table.name
            and foreign_key.target_column_names == (other.key.name,)
        )
        if len(set(targets)) > 1:
            is_key = column == self.resolved.key
            name = self.resolved.key_relation_name if is_key else self.resolved.field_name(column)
            path = f"relations.{name}"
            message = f"foreign keys point to {' and '.join(targets)}"
            self._report(path, message, "say which is meant")
        return targets[0] if targets else None

    def _junction_fields(self, column_fields: set[str]) -> Iterator[Field]:
        for name, relation in self.resolved.config.relations.items():
            path = f"relations.{name}"
            if relation.through and name in column_fields:
                self._report(path, f'a column is shown as "{name}" already')
            elif relation.through:
                if (field := self._junction_field(name, relation)) is not None:
                    yield field
            elif name not in column_fields:
                problem = validate.unknown_field_problem(self.resolved, path, name, column_fields)
                self.problems.append(problem)

    def _junction_field(self, name: str, relation: RelationConfig) -> Field | None:
        path = f"relations.{name}"
        table = find_table(relation.through, self.catalog)
        if isinstance(table, ConfigProblem):
            self._report(f"{path}.through", table.message, table.hint)
            return None
        related = self.all_resolved.get(relation.collection)
        if related is None:
            return None
        source = self._junction_column(f"{path}.source", table, relation.source, self.resolved)
        target = self._junction_column(f"{path}.target", table, relation.target, related)
        if source is None or target is None:
            return None
        if source == target:
            self._report(path, "source and target are the same column", "set both")
            return None
        junction = Junction(
            table=table,
            source_column=source.name,
            target_column=target.name,
            updates=relation.updates,
        )
        return Field(
            name=name,
            column=None,
            kind=FieldKind.RELATION,
            type=target.type,
            is_multiple=True,
            is_hidden=name in self.resolved.config.fields.hide,
            relation=Relation(collection_name=relation.collection, junction=junction),
        )

    def _junction_column(
        self, key: str, table: Table, configured: str, referenced: ResolvedTable
    ) -> Column | None:
        """Return the configured column, or the only one that references the collection's key."""
        if configured:
            column = table.find_column(configured)
            if column is None:
                path = f"collections.{self.resolved.name}.{key}"
                self.problems.append(unknown_column_problem(path, table, configured))
            return column
        columns = [
            foreign_key.column_names[0]
            for foreign_key in table.foreign_keys
            if foreign_key.target == referenced.table.name
            and foreign_key.target_column_names == (referenced.key.name,)
        ]
        if len(columns) != 1:
            count = "no" if not columns else "more than one"
            message = f'{count} foreign key of "{table.name}" points to "{referenced.name}"'
            self._report(key, message, "name the column")
            return None
        return table.find_column(columns[0])
