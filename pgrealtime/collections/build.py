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
from pgrealtime.changes import TableName
from pgrealtime.collections.model import (
    Collection,
    Collections,
    Field,
    FieldKind,
    Junction,
    Relation,
    collection_id,
)
from pgrealtime.config.model import CollectionConfig, RelationConfig
from pgrealtime.errors import ConfigError, Problem
from pgrealtime.spelling import perhaps


def build(configured: Mapping[str, CollectionConfig], catalog: Catalog) -> Collections:
    """Return the collections that the configuration makes of the catalogue's tables.

    Rules are taken over as they stand; whether they fit is the rules room's question.

    Raises:
        ConfigError: With every problem found, under paths such as ``collections.posts.table``.
    """
    collections, problems = examine(configured, catalog)
    if problems:
        raise ConfigError(problems)
    return collections


def examine(
    configured: Mapping[str, CollectionConfig], catalog: Catalog
) -> tuple[Collections, tuple[Problem, ...]]:
    """Return every problem, and the collections whose table and key could be made out.

    With problems the collections serve further checks only.
    """
    problems = [*check_names(configured)]
    drafts = {
        name: draft
        for name, config in configured.items()
        if (draft := _draft(name, config, catalog, problems)) is not None
    }
    problems += _tables_shown_twice(drafts.values())
    built = tuple(
        _Shaping(draft, drafts, catalog, problems).collection() for draft in drafts.values()
    )
    return Collections(built, encoding=catalog.encoding), tuple(problems)


def table_names(
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
    names = (name for text in texts for name in _candidates(text, tuple(schemas)))
    return tuple(dict.fromkeys(names))


# -- what can be said without a catalogue

_NAME = re.compile(r"[A-Za-z0-9_]+")


def check_names(configured: Mapping[str, CollectionConfig]) -> Iterator[Problem]:
    """Yield what is wrong with the configured collections whatever the database holds."""
    ids = Counter(_id_of(name, config) for name, config in configured.items())
    for name, config in configured.items():
        path = f"collections.{name}"
        if (fault := name_fault(name)) is not None:
            yield Problem(path, f'a collection can\'t be named "{name}": {fault}')
        if ids[_id_of(name, config)] > 1 or _id_of(name, config) in configured:
            yield Problem(f"{path}.collection_id", "another collection has this id or name")
        if not _candidates(config.table, ("",)):
            yield Problem(f"{path}.table", "not a table's name: write it as schema.table")
        for field_name, relation in config.relations.items():
            yield from _check_relation(f"{path}.relations.{field_name}", relation, configured)


def _check_relation(
    path: str, relation: RelationConfig, configured: Mapping[str, CollectionConfig]
) -> Iterator[Problem]:
    if relation.collection not in configured:
        yield Problem(
            f"{path}.collection",
            f'there is no collection "{relation.collection}"',
            perhaps(relation.collection, configured),
        )
    if not relation.through and (relation.source or relation.target):
        yield Problem(path, "source and target are columns of a junction table", "set through too")


def _id_of(name: str, config: CollectionConfig) -> str:
    return config.collection_id or collection_id(config.type, name)


def name_fault(name: str) -> str | None:
    """Say why rules, topics or records could not carry the name; None if they can."""
    if not _NAME.fullmatch(name):
        return "names are made of letters, digits and underscores"
    if "_via_" in name.lower():
        return 'rules use "_via_" for back relations'
    return None


_QUALIFIED = re.compile(r'(?:("(?:[^"]|"")+"|[^".]+)\.)?("(?:[^"]|"")+"|[^".]+)')


def _candidates(text: str, schemas: tuple[str, ...]) -> tuple[TableName, ...]:
    """Return the tables that a text may name: ``schema.table``, exact, quoted as in SQL or not."""
    match = _QUALIFIED.fullmatch(text)
    if match is None:
        return ()
    name = _unquoted(match[2])
    if match[1] is not None:
        return (TableName(_unquoted(match[1]), name),)
    return tuple(TableName(schema, name) for schema in schemas)


def _unquoted(part: str) -> str:
    return part[1:-1].replace('""', '"') if part.startswith('"') else part


# -- tables and their keys

_NOT_TABLES = {
    TableKind.VIEW: "a view",
    TableKind.MATERIALIZED_VIEW: "a materialized view",
    TableKind.FOREIGN: "a foreign table",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A collection whose table and key are known."""

    name: str
    config: CollectionConfig
    table: Table
    key: Column

    @property
    def path(self) -> str:
        return f"collections.{self.name}"


def _draft(
    name: str, config: CollectionConfig, catalog: Catalog, problems: list[Problem]
) -> _Draft | None:
    path = f"collections.{name}"
    found = _find_table(config.table, catalog)
    if isinstance(found, Problem):
        if _candidates(config.table, ("",)):  # else check_names has said it
            problems.append(replace(found, path=f"{path}.table"))
        return None
    faults = list(_table_faults(found, f"{path}.table"))
    key = _find_key(found, config, path)
    if isinstance(key, Column):
        problems += faults or _key_faults(found, key, path)
        return _Draft(name=name, config=config, table=found, key=key)
    problems += faults or [key]
    return None


def _find_table(text: str, catalog: Catalog) -> Table | Problem:
    schemas = catalog.schemas or tuple(dict.fromkeys(name.schema for name in catalog.tables))
    candidates = _candidates(text, schemas)
    found = next((catalog.tables[name] for name in candidates if name in catalog.tables), None)
    if found is not None:
        return found
    known = {table.name: str(table) for table in catalog.tables}
    hint = perhaps(text, known.values())
    if not hint and candidates and (meant := perhaps(candidates[0].name, known)):
        hint = meant
    return Problem("", f'there is no table "{text}"', hint)


def _table_faults(table: Table, path: str) -> Iterator[Problem]:
    """Yield why the table's changes would not all reach us, with what mends it."""
    name = table.name
    if table.kind in _NOT_TABLES:
        yield Problem(path, f'"{name}" is {_NOT_TABLES[table.kind]}: it sends no changes')
        return
    if table.partition_of is not None:
        root = table.partition_of
        yield Problem(path, f'"{name}" is a partition of "{root}"', f"set table: {root}")
        return
    if table.is_unlogged:
        yield Problem(
            path, f'"{name}" is unlogged: it sends no changes', _for_rows(table, "SET LOGGED")
        )
    if table.replica_identity is ReplicaIdentity.NOTHING:
        yield Problem(
            path,
            f'"{name}" has REPLICA IDENTITY NOTHING: its updates and deletes name no row',
            _for_rows(table, "REPLICA IDENTITY DEFAULT"),
        )


def _for_rows(table: Table, action: str) -> str:
    """Return the SQL that changes every table that holds the rows."""
    return " ".join(
        f"ALTER TABLE {_qualified(name)} {action};" for name in table.leaves or [table.name]
    )


def _qualified(name: TableName) -> str:
    return f"{quoted(name.schema)}.{quoted(name.name)}"


def quoted(name: str) -> str:
    """Return the name as SQL has it, for people to paste."""
    return '"' + name.replace('"', '""') + '"'


def _find_key(table: Table, config: CollectionConfig, path: str) -> Column | Problem:
    """Return the column shown as id.

    A primary key of several columns has no text that every client would spell alike, so that it
    needs another unique column, named by ``id``.
    """
    if config.id:
        column = table.column(config.id)
        return _no_column(f"{path}.id", table, config.id) if column is None else column
    names = table.primary_key
    if len(names) == 1 and (column := table.column(names[0])) is not None:
        return column
    # Postgres has no unique column there but the one that the table is partitioned by.
    whole = "a partitioned table can be served if it is partitioned by its id alone"
    is_partitioned = table.kind is TableKind.PARTITIONED
    if names:
        what = f'the primary key of "{table.name}" has {len(names)} columns: {", ".join(names)}'
        mend = whole if is_partitioned else "set id to one column that is unique and NOT NULL"
        return Problem(f"{path}.id", what, mend)
    return Problem(
        f"{path}.table",
        f'"{table.name}" has no primary key: its updates and deletes name no row',
        whole if is_partitioned else f"ALTER TABLE {_qualified(table.name)} {_key_to_add(table)};",
    )


def _key_to_add(table: Table) -> str:
    unique = next((names[0] for names in table.unique if len(names) == 1), None)
    if unique is not None:
        return f"ADD PRIMARY KEY ({quoted(unique)})"
    if table.column("id") is not None:
        return 'ADD PRIMARY KEY ("id")'
    return 'ADD COLUMN "id" bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY'


def _no_column(path: str, table: Table, name: str) -> Problem:
    return Problem(
        path,
        f'there is no column "{name}" in "{table.name}"',
        perhaps(name, (column.name for column in table.columns)),
    )


def _key_faults(table: Table, key: Column, path: str) -> list[Problem]:
    """Say why the key would not name one row, or not be known of a deleted one."""
    column = quoted(key.name)
    if (key.name,) not in table.unique:
        add = f"ALTER TABLE {_qualified(table.name)} ADD UNIQUE ({column});"
        return [Problem(f"{path}.id", f'column "{key.name}" is not unique by itself', add)]
    if not key.not_null:
        add = f"ALTER TABLE {_qualified(table.name)} ALTER COLUMN {column} SET NOT NULL;"
        return [Problem(f"{path}.id", f'column "{key.name}" may be NULL', add)]
    if key.name not in table.identity_columns:
        return [
            Problem(
                f"{path}.id",
                f'the replica identity of "{table.name}" lacks "{key.name}": '
                "deletes would not say of what record",
                _for_rows(table, "REPLICA IDENTITY FULL"),
            )
        ]
    return []


def _tables_shown_twice(drafts: Iterable[_Draft]) -> Iterator[Problem]:
    first: dict[TableName, str] = {}
    for draft in drafts:
        name = draft.table.name
        if name in first:
            message = f'collection "{first[name]}" shows "{name}" already'
            yield Problem(f"{draft.path}.table", message)
        first.setdefault(name, draft.name)


# -- fields

_KINDS = {
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
    "point": FieldKind.GEO,
    "bytea": FieldKind.BYTES,
}
"""Of types in pg_catalog; every other one is shown as its text."""

_OVERRIDES = {
    FieldKind.TEXT: {
        **dict.fromkeys(("text", "editor", "email", "url", "select"), FieldKind.TEXT),
        "file": FieldKind.FILE,
    },
    FieldKind.NUMBER: {"number": FieldKind.NUMBER, "text": FieldKind.TEXT},
    FieldKind.BOOL: {"bool": FieldKind.BOOL},
    FieldKind.DATE: {"date": FieldKind.DATE, "autodate": FieldKind.DATE},
    FieldKind.JSON: {"json": FieldKind.JSON, "geoPoint": FieldKind.GEO},
    FieldKind.GEO: {"geoPoint": FieldKind.GEO},
    FieldKind.GEOMETRY: {"geoPoint": FieldKind.GEO},
}
"""What ``fields.types`` may say of a column, by what its type says."""

RESERVED = {"collectionId", "collectionName", "expand"}
"""Members of every record beside its fields."""

SECRETS = {
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

AUTH_KINDS = {
    "email": FieldKind.TEXT,
    "emailVisibility": FieldKind.BOOL,
    "verified": FieldKind.BOOL,
}
"""Fields of auth collections that mean something to the server."""


def kind_of(data_type: Type) -> tuple[FieldKind, bool]:
    """Return the kind that a column's type speaks of, and whether it holds several."""
    base = data_type.base
    if base.kind is TypeKind.ARRAY and base.element is not None:
        return kind_of(base.element)[0], True
    if base.kind is TypeKind.COMPOSITE:
        return FieldKind.COMPOSITE, False
    if base.schema == "pg_catalog":
        return _KINDS.get(base.name, FieldKind.TEXT), False
    if base.extension == "postgis" and base.name in {"geometry", "geography"}:
        return FieldKind.GEOMETRY, False
    return FieldKind.TEXT, False


@dataclass(frozen=True, slots=True)
class _Shaping:
    """Gives one collection its fields. Problems go to the shared list."""

    draft: _Draft
    drafts: Mapping[str, _Draft]
    catalog: Catalog
    problems: list[Problem]

    def collection(self) -> Collection:
        config, table = self.draft.config, self.draft.table
        fields = [self._field(column) for column in table.columns if self._is_included(column)]
        self._check_names_said({one.name for one in fields})
        fields += self._junction_fields({one.name for one in fields})
        self._check_login({one.name for one in fields})
        self._check_fields(fields)
        return Collection(
            name=self.draft.name,
            id=_id_of(self.draft.name, config),
            type=config.type,
            table=table,
            key=self.draft.key,
            fields=tuple(fields),
            list_rule=config.list_rule,
            view_rule=config.view_rule,
            manage_rule=config.manage_rule,
            auth_rule=config.auth_rule,
        )

    def _report(self, key: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem(f"{self.draft.path}.{key}", message, hint))

    def _is_included(self, column: Column) -> bool:
        include = self.draft.config.fields.include
        return "*" in include or column.name in include or column == self.draft.key

    def _name(self, column: Column) -> str:
        draft = self.draft
        if column == draft.key:
            return "id"
        is_visibility = draft.config.type == "auth" and column.name == "email_visibility"
        if is_visibility and draft.table.column("emailVisibility") is None:
            return draft.config.fields.rename.get(column.name, "emailVisibility")
        return draft.config.fields.rename.get(column.name, column.name)

    def _field(self, column: Column) -> Field:
        name = self._name(column)
        spoken, is_multiple = kind_of(column.type)
        kind = self._overridden(name, spoken)
        config = self.draft.config
        is_secret = column.name in config.login.secret_columns or (
            config.type == "auth" and name in SECRETS
        )
        shown = Field(
            name=name,
            column=column,
            kind=kind,
            type=column.type,
            is_multiple=is_multiple,
            is_select=column.type.base.kind is TypeKind.ENUM
            or config.fields.types.get(name) == "select",
            is_hidden=is_secret or name in self.draft.config.fields.hide,
            is_secret=is_secret,
        )
        if column == self.draft.key:
            return replace(shown, kind=FieldKind.TEXT)
        return self._related(shown, column)

    def _overridden(self, name: str, kind: FieldKind) -> FieldKind:
        wanted = self.draft.config.fields.types.get(name)
        if wanted is None:
            return kind
        possible = _OVERRIDES.get(kind, {})
        if wanted not in possible:
            choice = ", ".join(possible)
            hint = f"possible are {choice}" if possible else ""
            self._report(f"fields.types.{name}", f'its column can\'t be shown as "{wanted}"', hint)
        return possible.get(wanted, kind)

    # -- relations

    def _related(self, plain: Field, column: Column) -> Field:
        """Make a relation of the field if the configuration or a foreign key says so."""
        said = self.draft.config.relations.get(plain.name)
        if said is None:
            target = self._foreign_target(column)
        elif said.through or said.collection not in self.drafts:
            return plain
        else:
            target = said.collection
        if target is None:
            return plain
        if plain.kind not in (FieldKind.TEXT, FieldKind.NUMBER):
            self._report(f"relations.{plain.name}", f"a {plain.kind.value} column holds no ids")
            return plain
        return replace(plain, kind=FieldKind.RELATION, relation=Relation(collection=target))

    def _foreign_target(self, column: Column) -> str | None:
        """Return the collection that a foreign key of this column alone points to."""
        targets = sorted(
            draft.name
            for draft in self.drafts.values()
            for key in self.draft.table.foreign_keys
            if key.columns == (column.name,)
            and key.target == draft.table.name
            and key.target_columns == (draft.key.name,)
        )
        if len(set(targets)) > 1:
            names = " and ".join(targets)
            name = self._name(column)
            self._report(
                f"relations.{name}", f"foreign keys point to {names}", "say which is meant"
            )
        return targets[0] if targets else None

    def _junction_fields(self, taken: set[str]) -> list[Field]:
        fields = []
        for name, relation in self.draft.config.relations.items():
            if relation.through and name in taken:
                self._report(f"relations.{name}", f'a column is shown as "{name}" already')
            elif relation.through:
                made = self._junction_field(name, relation)
                fields += [made] if made is not None else []
            elif name not in taken:
                self._report_unknown(f"relations.{name}", name, taken)
        return fields

    def _junction_field(self, name: str, relation: RelationConfig) -> Field | None:
        path = f"relations.{name}"
        table = _find_table(relation.through, self.catalog)
        if isinstance(table, Problem):
            self._report(f"{path}.through", table.message, table.hint)
            return None
        related = self.drafts.get(relation.collection)
        if related is None:
            return None
        source = self._junction_column(f"{path}.source", table, relation.source, self.draft)
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
            is_hidden=name in self.draft.config.fields.hide,
            relation=Relation(
                collection=relation.collection,
                junction=Junction(table=table, source=source.name, target=target.name),
            ),
        )

    def _junction_column(
        self, path: str, table: Table, said: str, pointed_to: _Draft
    ) -> Column | None:
        """Return the column said, or the only one whose foreign key points to the collection."""
        if said:
            column = table.column(said)
            if column is None:
                problem = _no_column("", table, said)
                self._report(path, problem.message, problem.hint)
            return column
        found = [
            key.columns[0]
            for key in table.foreign_keys
            if key.target == pointed_to.table.name and key.target_columns == (pointed_to.key.name,)
        ]
        if len(found) != 1:
            count = "no" if not found else "more than one"
            message = f'{count} foreign key of "{table.name}" points to "{pointed_to.name}"'
            self._report(path, message, "name the column")
            return None
        return table.column(found[0])

    # -- names

    def _check_names_said(self, fields: set[str]) -> None:
        """Report every column and field that ``fields`` names and that isn't there."""
        said, table = self.draft.config.fields, self.draft.table
        for name in said.include:
            if name != "*" and table.column(name) is None:
                self.problems.append(_no_column(f"{self.draft.path}.fields.include", table, name))
        for name, field_name in said.rename.items():
            path = f"fields.rename.{name}"
            if table.column(name) is None:
                self.problems.append(_no_column(f"{self.draft.path}.{path}", table, name))
            elif name == self.draft.key.name and field_name != "id":
                self._report(path, 'the key is always shown as "id"')
        for name in set(said.types) - fields:
            self._report_unknown(f"fields.types.{name}", name, fields)
        self._check_hidden(fields)

    def _check_hidden(self, fields: set[str]) -> None:
        relations = self.draft.config.relations
        junctions = {name for name, relation in relations.items() if relation.through}
        for name in self.draft.config.fields.hide:
            if name == "id":
                self._report("fields.hide", "the id can't be hidden")
            elif name not in fields | junctions:
                self._report_unknown("fields.hide", name, fields)

    def _check_login(self, fields: set[str]) -> None:
        said, table = self.draft.config.login, self.draft.table
        if said.secret_columns and self.draft.config.type != "auth":
            self._report("login", "nobody logs in to a base collection", "set type: auth")
        if self.draft.config.manage_rule is not None and self.draft.config.type != "auth":
            message = "a base collection holds nobody's address"
            self._report("manage_rule", message, "set type: auth")
        if self.draft.config.auth_rule != "" and self.draft.config.type != "auth":
            self._report("auth_rule", "nobody logs in to a base collection", "set type: auth")
        for key in ("password_hash", "token_key"):
            name = getattr(said, key)
            if name and table.column(name) is None:
                self.problems.append(_no_column(f"{self.draft.path}.login.{key}", table, name))
        if said.password_hash:
            for name in set(said.identity) - fields:
                self._report_unknown("login.identity", name, fields)

    def _report_unknown(self, path: str, name: str, fields: Iterable[str]) -> None:
        column = self.draft.table.column(name)
        if column is None:
            hint = perhaps(name, fields)
        elif self._is_included(column):
            hint = f'the column is shown as "{self._name(column)}"'
        else:
            hint = "fields.include leaves the column out"
        self._report(path, f'there is no field "{name}"', hint)

    def _check_fields(self, fields: list[Field]) -> None:
        for name, count in Counter(one.name for one in fields).items():
            if count > 1:
                self._report("fields", f'two fields are named "{name}"', "rename one of them")
        for one in fields:
            fault = "every record has that member" if one.name in RESERVED else name_fault(one.name)
            if fault is not None:
                self._report(
                    "fields", f'a field can\'t be named "{one.name}": {fault}', "rename it"
                )
            if self.draft.config.type == "auth" and one.name in AUTH_KINDS:
                self._check_auth_field(one, AUTH_KINDS[one.name])

    def _check_auth_field(self, one: Field, wanted: FieldKind) -> None:
        if one.kind is not wanted or one.is_multiple:
            message = f'"{one.name}" of an auth collection must be a {wanted.value} column'
            self._report("fields", message, "rename it, or leave it out")
