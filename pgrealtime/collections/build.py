"""Configuration and catalogue brought together: a table as PocketBase means a collection."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from pgrealtime.catalog.model import (
    Catalog,
    Column,
    ReplicaIdentity,
    Table,
    TableKind,
    Type,
    TypeKind,
)
from pgrealtime.catalog.naming import quote_identifier, quote_table_name
from pgrealtime.changes import TableName
from pgrealtime.collections.model import (
    Collection,
    Collections,
    Field,
    FieldKind,
    Junction,
    Relation,
    derive_collection_id,
)
from pgrealtime.config.model import CollectionConfig, RelationConfig
from pgrealtime.errors import ConfigError, ConfigProblem
from pgrealtime.spelling import did_you_mean


def build_collections(configured: Mapping[str, CollectionConfig], catalog: Catalog) -> Collections:
    """Return the collections that the configuration makes of the catalogue's tables.

    Rules are taken over as they stand; whether they fit is the rules room's question.

    Raises:
        ConfigError: With every problem found, under paths such as ``collections.posts.table``.
    """
    collections, problems = build_with_problems(configured, catalog)
    if problems:
        raise ConfigError(problems)
    return collections


def build_with_problems(
    configured: Mapping[str, CollectionConfig], catalog: Catalog
) -> tuple[Collections, tuple[ConfigProblem, ...]]:
    """Return every problem, and the collections whose table and key could be made out.

    With problems the collections serve further checks only.
    """
    problems = [*check_names(configured)]
    drafts = {
        name: draft
        for name, config in configured.items()
        if (draft := _resolve_table(name, config, catalog, problems)) is not None
    }
    problems += _duplicate_table_problems(drafts.values())
    built = tuple(
        _CollectionBuilder(draft, drafts, catalog, problems).build_collection()
        for draft in drafts.values()
    )
    return Collections(built, server_encoding=catalog.server_encoding), tuple(problems)


def configured_table_names(
    configured: Mapping[str, CollectionConfig], schemas: Iterable[str]
) -> tuple[TableName, ...]:
    """Return every table that the configuration may mean: what the catalogue must be read for."""
    texts = [config.table for config in configured.values()]
    texts += [
        relation.through
        for config in configured.values()
        for relation in config.relations.values()
        if relation.through
    ]
    names = (name for text in texts for name in _candidate_tables(text, tuple(schemas)))
    return tuple(dict.fromkeys(names))


# -- what can be said without a catalogue

_NAME_PATTERN = re.compile(r"[A-Za-z0-9_]+")


def check_names(configured: Mapping[str, CollectionConfig]) -> Iterator[ConfigProblem]:
    """Yield what is wrong with the configured collections whatever the database holds."""
    ids = Counter(_collection_id_of(name, config) for name, config in configured.items())
    for name, config in configured.items():
        path = f"collections.{name}"
        if (fault := name_problem(name)) is not None:
            yield ConfigProblem(path, f'a collection can\'t be named "{name}": {fault}')
        if (
            ids[_collection_id_of(name, config)] > 1
            or _collection_id_of(name, config) in configured
        ):
            yield ConfigProblem(f"{path}.collection_id", "another collection has this id or name")
        if not _candidate_tables(config.table, ("",)):
            yield ConfigProblem(f"{path}.table", "not a table's name: write it as schema.table")
        for field_name, relation in config.relations.items():
            yield from _check_relation(f"{path}.relations.{field_name}", relation, configured)


def _check_relation(
    path: str, relation: RelationConfig, configured: Mapping[str, CollectionConfig]
) -> Iterator[ConfigProblem]:
    if relation.collection not in configured:
        yield ConfigProblem(
            f"{path}.collection",
            f'there is no collection "{relation.collection}"',
            did_you_mean(relation.collection, configured),
        )
    if not relation.through and (relation.source or relation.target):
        yield ConfigProblem(
            path, "source and target are columns of a junction table", "set through too"
        )


def _collection_id_of(name: str, config: CollectionConfig) -> str:
    return config.collection_id or derive_collection_id(config.type, name)


def name_problem(name: str) -> str | None:
    """Say why rules, topics or records could not carry the name; None if they can."""
    if not _NAME_PATTERN.fullmatch(name):
        return "names are made of letters, digits and underscores"
    if "_via_" in name.lower():
        return 'rules use "_via_" for back relations'
    return None


_TABLE_NAME_PATTERN = re.compile(r'(?:("(?:[^"]|"")+"|[^".]+)\.)?("(?:[^"]|"")+"|[^".]+)')


def _candidate_tables(text: str, schemas: tuple[str, ...]) -> tuple[TableName, ...]:
    """Return the tables that a text may name: ``schema.table``, exact, quoted as in SQL or not."""
    match = _TABLE_NAME_PATTERN.fullmatch(text)
    if match is None:
        return ()
    name = _unquote(match[2])
    if match[1] is not None:
        return (TableName(_unquote(match[1]), name),)
    return tuple(TableName(schema, name) for schema in schemas)


def _unquote(part: str) -> str:
    return part[1:-1].replace('""', '"') if part.startswith('"') else part


# -- tables and their keys

_UNSERVED_TABLE_KINDS = {
    TableKind.VIEW: "a view",
    TableKind.MATERIALIZED_VIEW: "a materialized view",
    TableKind.FOREIGN: "a foreign table",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _ResolvedTable:
    """A collection whose table and key are known."""

    name: str
    config: CollectionConfig
    table: Table
    key: Column

    @property
    def path(self) -> str:
        return f"collections.{self.name}"


def _resolve_table(
    name: str, config: CollectionConfig, catalog: Catalog, problems: list[ConfigProblem]
) -> _ResolvedTable | None:
    path = f"collections.{name}"
    found = _find_table(config.table, catalog)
    if isinstance(found, ConfigProblem):
        if _candidate_tables(config.table, ("",)):  # else check_names has said it
            problems.append(replace(found, path=f"{path}.table"))
        return None
    faults = list(_table_problems(found, f"{path}.table"))
    key = _find_key(found, config, path)
    if isinstance(key, Column):
        problems += faults or _key_problems(found, key, path)
        return _ResolvedTable(name=name, config=config, table=found, key=key)
    problems += faults or [key]
    return None


def _find_table(text: str, catalog: Catalog) -> Table | ConfigProblem:
    schemas = catalog.schemas or tuple(dict.fromkeys(name.schema for name in catalog.tables))
    candidates = _candidate_tables(text, schemas)
    found = next((catalog.tables[name] for name in candidates if name in catalog.tables), None)
    if found is not None:
        return found
    known = {table.name: str(table) for table in catalog.tables}
    hint = did_you_mean(text, known.values())
    if not hint and candidates and (meant := did_you_mean(candidates[0].name, known)):
        hint = meant
    return ConfigProblem("", f'there is no table "{text}"', hint)


def _table_problems(table: Table, path: str) -> Iterator[ConfigProblem]:
    """Yield why the table's changes would not all reach us, with what mends it."""
    name = table.name
    if table.kind in _UNSERVED_TABLE_KINDS:
        yield ConfigProblem(
            path, f'"{name}" is {_UNSERVED_TABLE_KINDS[table.kind]}: it sends no changes'
        )
        return
    if table.partition_of is not None:
        root = table.partition_of
        yield ConfigProblem(path, f'"{name}" is a partition of "{root}"', f"set table: {root}")
        return
    if table.is_unlogged:
        yield ConfigProblem(
            path,
            f'"{name}" is unlogged: it sends no changes',
            _alter_leaf_tables(table, "SET LOGGED"),
        )
    if table.replica_identity is ReplicaIdentity.NOTHING:
        yield ConfigProblem(
            path,
            f'"{name}" has REPLICA IDENTITY NOTHING: its updates and deletes name no row',
            _alter_leaf_tables(table, "REPLICA IDENTITY DEFAULT"),
        )


def _alter_leaf_tables(table: Table, action: str) -> str:
    """Return the SQL that changes every table that holds the rows."""
    return " ".join(
        f"ALTER TABLE {quote_table_name(name)} {action};" for name in table.leaves or [table.name]
    )


def _find_key(table: Table, config: CollectionConfig, path: str) -> Column | ConfigProblem:
    """Return the column shown as id.

    A primary key of several columns has no text that every client would spell alike, so that it
    needs another unique column, named by ``id``.
    """
    if config.id:
        column = table.find_column(config.id)
        return _unknown_column_problem(f"{path}.id", table, config.id) if column is None else column
    names = table.primary_key
    if len(names) == 1 and (column := table.find_column(names[0])) is not None:
        return column
    # Postgres has no unique column there but the one that the table is partitioned by.
    whole = "a partitioned table can be served if it is partitioned by its id alone"
    is_partitioned = table.kind is TableKind.PARTITIONED
    if names:
        what = f'the primary key of "{table.name}" has {len(names)} columns: {", ".join(names)}'
        mend = whole if is_partitioned else "set id to one column that is unique and NOT NULL"
        return ConfigProblem(f"{path}.id", what, mend)
    return ConfigProblem(
        f"{path}.table",
        f'"{table.name}" has no primary key: its updates and deletes name no row',
        whole
        if is_partitioned
        else f"ALTER TABLE {quote_table_name(table.name)} {_key_to_add(table)};",
    )


def _key_to_add(table: Table) -> str:
    unique = next((names[0] for names in table.unique_keys if len(names) == 1), None)
    if unique is not None:
        return f"ADD PRIMARY KEY ({quote_identifier(unique)})"
    if table.find_column("id") is not None:
        return 'ADD PRIMARY KEY ("id")'
    return 'ADD COLUMN "id" bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY'


def _unknown_column_problem(path: str, table: Table, name: str) -> ConfigProblem:
    return ConfigProblem(
        path,
        f'there is no column "{name}" in "{table.name}"',
        did_you_mean(name, (column.name for column in table.columns)),
    )


def _key_problems(table: Table, key: Column, path: str) -> list[ConfigProblem]:
    """Say why the key would not name one row, or not be known of a deleted one."""
    column = quote_identifier(key.name)
    if (key.name,) not in table.unique_keys:
        add = f"ALTER TABLE {quote_table_name(table.name)} ADD UNIQUE ({column});"
        return [ConfigProblem(f"{path}.id", f'column "{key.name}" is not unique by itself', add)]
    if not key.not_null:
        add = f"ALTER TABLE {quote_table_name(table.name)} ALTER COLUMN {column} SET NOT NULL;"
        return [ConfigProblem(f"{path}.id", f'column "{key.name}" may be NULL', add)]
    if key.name not in table.replica_identity_columns:
        return [
            ConfigProblem(
                f"{path}.id",
                f'the replica identity of "{table.name}" lacks "{key.name}": '
                "deletes would not say of what record",
                _alter_leaf_tables(table, "REPLICA IDENTITY FULL"),
            )
        ]
    return []


def _duplicate_table_problems(resolved_tables: Iterable[_ResolvedTable]) -> Iterator[ConfigProblem]:
    first: dict[TableName, str] = {}
    for draft in resolved_tables:
        name = draft.table.name
        if name in first:
            message = f'collection "{first[name]}" shows "{name}" already'
            yield ConfigProblem(f"{draft.path}.table", message)
        first.setdefault(name, draft.name)


# -- fields

_KIND_BY_TYPE = {
    "int2": FieldKind.NUMBER,
    "int4": FieldKind.NUMBER,
    "int8": FieldKind.NUMBER,
    "numeric": FieldKind.NUMBER,
    "float4": FieldKind.NUMBER,
    "float8": FieldKind.NUMBER,
    "bool": FieldKind.BOOL,
    "date": FieldKind.DATE,
    "timestamp": FieldKind.DATE,
    "timestamptz": FieldKind.DATE,
    "json": FieldKind.JSON,
    "jsonb": FieldKind.JSON,
    "point": FieldKind.GEO_POINT,
    "bytea": FieldKind.BYTES,
}
"""Of types in pg_catalog; every other one is shown as its text."""

_CONFIGURABLE_KINDS = {
    FieldKind.TEXT: {
        **dict.fromkeys(("text", "editor", "email", "url", "select"), FieldKind.TEXT),
        "file": FieldKind.FILE,
    },
    FieldKind.NUMBER: {"number": FieldKind.NUMBER, "text": FieldKind.TEXT},
    FieldKind.BOOL: {"bool": FieldKind.BOOL},
    FieldKind.DATE: {"date": FieldKind.DATE, "autodate": FieldKind.DATE},
    FieldKind.JSON: {"json": FieldKind.JSON, "geoPoint": FieldKind.GEO_POINT},
    FieldKind.GEO_POINT: {"geoPoint": FieldKind.GEO_POINT},
    FieldKind.GEOMETRY: {"geoPoint": FieldKind.GEO_POINT},
}
"""What ``fields.types`` may say of a column, by what its type says."""

RESERVED_MEMBERS = {"collectionId", "collectionName", "expand"}
"""Members of every record beside its fields."""

SECRET_FIELDS = {
    "password",
    "passwordHash",
    "password_hash",
    "password_digest",
    "hashed_password",
    "encrypted_password",
    "tokenKey",
    "token_key",
}
"""Fields of auth collections that no record shows: PocketBase's two and what others call them."""

AUTH_FIELD_KINDS = {
    "email": FieldKind.TEXT,
    "emailVisibility": FieldKind.BOOL,
    "verified": FieldKind.BOOL,
}
"""Fields of auth collections that mean something to the server."""


def field_kind_of(data_type: Type) -> tuple[FieldKind, bool]:
    """Return the kind that a column's type speaks of, and whether it holds several."""
    base = data_type.base
    if base.kind is TypeKind.ARRAY and base.element is not None:
        return field_kind_of(base.element)[0], True
    if base.kind is TypeKind.COMPOSITE:
        return FieldKind.COMPOSITE, False
    if base.schema == "pg_catalog":
        return _KIND_BY_TYPE.get(base.name, FieldKind.TEXT), False
    if base.extension == "postgis" and base.name in {"geometry", "geography"}:
        return FieldKind.GEOMETRY, False
    return FieldKind.TEXT, False


@dataclass(frozen=True, slots=True)
class _CollectionBuilder:
    """Gives one collection its fields. Problems go to the shared list."""

    resolved: _ResolvedTable
    all_resolved: Mapping[str, _ResolvedTable]
    catalog: Catalog
    problems: list[ConfigProblem]

    def build_collection(self) -> Collection:
        config, table = self.resolved.config, self.resolved.table
        fields = [self._field(column) for column in table.columns if self._is_included(column)]
        self._check_configured_names({one.name for one in fields})
        fields += self._junction_fields({one.name for one in fields})
        self._check_login({one.name for one in fields})
        self._check_fields(fields)
        return Collection(
            name=self.resolved.name,
            id=_collection_id_of(self.resolved.name, config),
            type=config.type,
            table=table,
            key=self.resolved.key,
            fields=tuple(fields),
            list_rule=config.list_rule,
            view_rule=config.view_rule,
            manage_rule=config.manage_rule,
            auth_rule=config.auth_rule,
        )

    def _report(self, key: str, message: str, hint: str = "") -> None:
        self.problems.append(ConfigProblem(f"{self.resolved.path}.{key}", message, hint))

    def _is_included(self, column: Column) -> bool:
        include = self.resolved.config.fields.include
        return "*" in include or column.name in include or column == self.resolved.key

    def _field_name(self, column: Column) -> str:
        draft = self.resolved
        if column == draft.key:
            return "id"
        is_visibility = draft.config.type == "auth" and column.name == "email_visibility"
        if is_visibility and draft.table.find_column("emailVisibility") is None:
            return draft.config.fields.rename.get(column.name, "emailVisibility")
        return draft.config.fields.rename.get(column.name, column.name)

    def _field(self, column: Column) -> Field:
        name = self._field_name(column)
        spoken, is_multiple = field_kind_of(column.type)
        kind = self._configured_kind(name, spoken)
        config = self.resolved.config
        is_secret = column.name in config.login.secret_columns or (
            config.type == "auth" and name in SECRET_FIELDS
        )
        shown = Field(
            name=name,
            column=column,
            kind=kind,
            type=column.type,
            is_multiple=is_multiple,
            is_select=column.type.base.kind is TypeKind.ENUM
            or config.fields.types.get(name) == "select",
            is_hidden=is_secret or name in self.resolved.config.fields.hide,
            is_secret=is_secret,
        )
        if column == self.resolved.key:
            return replace(shown, kind=FieldKind.TEXT)
        return self._with_relation(shown, column)

    def _configured_kind(self, name: str, kind: FieldKind) -> FieldKind:
        wanted = self.resolved.config.fields.types.get(name)
        if wanted is None:
            return kind
        possible = _CONFIGURABLE_KINDS.get(kind, {})
        if wanted not in possible:
            choice = ", ".join(possible)
            hint = f"possible are {choice}" if possible else ""
            self._report(f"fields.types.{name}", f'its column can\'t be shown as "{wanted}"', hint)
        return possible.get(wanted, kind)

    # -- relations

    def _with_relation(self, plain_field: Field, column: Column) -> Field:
        """Make a relation of the field if the configuration or a foreign key says so."""
        said = self.resolved.config.relations.get(plain_field.name)
        if said is None:
            target = self._foreign_key_target(column)
        elif said.through or said.collection not in self.all_resolved:
            return plain_field
        else:
            target = said.collection
        if target is None:
            return plain_field
        if plain_field.kind not in (FieldKind.TEXT, FieldKind.NUMBER):
            self._report(
                f"relations.{plain_field.name}", f"a {plain_field.kind.value} column holds no ids"
            )
            return plain_field
        return replace(plain_field, kind=FieldKind.RELATION, relation=Relation(collection=target))

    def _foreign_key_target(self, column: Column) -> str | None:
        """Return the collection that a foreign key of this column alone points to."""
        targets = sorted(
            draft.name
            for draft in self.all_resolved.values()
            for key in self.resolved.table.foreign_keys
            if key.columns == (column.name,)
            and key.target == draft.table.name
            and key.target_columns == (draft.key.name,)
        )
        if len(set(targets)) > 1:
            names = " and ".join(targets)
            name = self._field_name(column)
            self._report(
                f"relations.{name}", f"foreign keys point to {names}", "say which is meant"
            )
        return targets[0] if targets else None

    def _junction_fields(self, taken_names: set[str]) -> list[Field]:
        fields = []
        for name, relation in self.resolved.config.relations.items():
            if relation.through and name in taken_names:
                self._report(f"relations.{name}", f'a column is shown as "{name}" already')
            elif relation.through:
                made = self._junction_field(name, relation)
                fields += [made] if made is not None else []
            elif name not in taken_names:
                self._report_unknown(f"relations.{name}", name, taken_names)
        return fields

    def _junction_field(self, name: str, relation: RelationConfig) -> Field | None:
        path = f"relations.{name}"
        table = _find_table(relation.through, self.catalog)
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
        return Field(
            name=name,
            column=None,
            kind=FieldKind.RELATION,
            type=target.type,
            is_multiple=True,
            is_hidden=name in self.resolved.config.fields.hide,
            relation=Relation(
                collection=relation.collection,
                junction=Junction(
                    table=table, source_column=source.name, target_column=target.name
                ),
            ),
        )

    def _junction_column(
        self, path: str, table: Table, configured: str, referenced: _ResolvedTable
    ) -> Column | None:
        """Return the column said, or the only one whose foreign key points to the collection."""
        if configured:
            column = table.find_column(configured)
            if column is None:
                problem = _unknown_column_problem("", table, configured)
                self._report(path, problem.message, problem.hint)
            return column
        found = [
            key.columns[0]
            for key in table.foreign_keys
            if key.target == referenced.table.name and key.target_columns == (referenced.key.name,)
        ]
        if len(found) != 1:
            count = "no" if not found else "more than one"
            message = f'{count} foreign key of "{table.name}" points to "{referenced.name}"'
            self._report(path, message, "name the column")
            return None
        return table.find_column(found[0])

    # -- names

    def _check_configured_names(self, field_names: set[str]) -> None:
        """Report every column and field that ``fields`` names and that isn't there."""
        said, table = self.resolved.config.fields, self.resolved.table
        for name in said.include:
            if name != "*" and table.find_column(name) is None:
                self.problems.append(
                    _unknown_column_problem(f"{self.resolved.path}.fields.include", table, name)
                )
        for name, field_name in said.rename.items():
            path = f"fields.rename.{name}"
            if table.find_column(name) is None:
                self.problems.append(
                    _unknown_column_problem(f"{self.resolved.path}.{path}", table, name)
                )
            elif name == self.resolved.key.name and field_name != "id":
                self._report(path, 'the key is always shown as "id"')
        for name in set(said.types) - field_names:
            self._report_unknown(f"fields.types.{name}", name, field_names)
        self._check_hidden(field_names)

    def _check_hidden(self, field_names: set[str]) -> None:
        relations = self.resolved.config.relations
        junctions = {name for name, relation in relations.items() if relation.through}
        for name in self.resolved.config.fields.hide:
            if name == "id":
                self._report("fields.hide", "the id can't be hidden")
            elif name not in field_names | junctions:
                self._report_unknown("fields.hide", name, field_names)

    def _check_login(self, field_names: set[str]) -> None:
        said, table = self.resolved.config.login, self.resolved.table
        if said.secret_columns and self.resolved.config.type != "auth":
            self._report("login", "nobody logs in to a base collection", "set type: auth")
        if self.resolved.config.manage_rule is not None and self.resolved.config.type != "auth":
            message = "a base collection holds nobody's address"
            self._report("manage_rule", message, "set type: auth")
        if self.resolved.config.auth_rule != "" and self.resolved.config.type != "auth":
            self._report("auth_rule", "nobody logs in to a base collection", "set type: auth")
        for key in ("password_hash", "token_key"):
            name = getattr(said, key)
            if name and table.find_column(name) is None:
                self.problems.append(
                    _unknown_column_problem(f"{self.resolved.path}.login.{key}", table, name)
                )
        if said.password_hash:
            for name in set(said.identity) - field_names:
                self._report_unknown("login.identity", name, field_names)

    def _report_unknown(self, path: str, name: str, field_names: Iterable[str]) -> None:
        column = self.resolved.table.find_column(name)
        if column is None:
            hint = did_you_mean(name, field_names)
        elif self._is_included(column):
            hint = f'the column is shown as "{self._field_name(column)}"'
        else:
            hint = "fields.include leaves the column out"
        self._report(path, f'there is no field "{name}"', hint)

    def _check_fields(self, fields: list[Field]) -> None:
        for name, count in Counter(one.name for one in fields).items():
            if count > 1:
                self._report("fields", f'two fields are named "{name}"', "rename one of them")
        for one in fields:
            fault = (
                "every record has that member"
                if one.name in RESERVED_MEMBERS
                else name_problem(one.name)
            )
            if fault is not None:
                self._report(
                    "fields", f'a field can\'t be named "{one.name}": {fault}', "rename it"
                )
            if self.resolved.config.type == "auth" and one.name in AUTH_FIELD_KINDS:
                self._check_auth_field(one, AUTH_FIELD_KINDS[one.name])

    def _check_auth_field(self, auth_field: Field, expected_kind: FieldKind) -> None:
        if auth_field.kind is not expected_kind or auth_field.is_multiple:
            message = (
                f'"{auth_field.name}" of an auth collection must be a {expected_kind.value} column'
            )
            self._report("fields", message, "rename it, or leave it out")
