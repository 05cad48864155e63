"""Adds the relations to drafts that foreign keys alone don't give."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from pgrealtime.catalog.model import Column, ForeignKey, Table
from pgrealtime.changes import TableName
from pgrealtime.cli.init.model import CollectionDraft
from pgrealtime.cli.init.names import config_table_name, field_name, unused_name, valid_name
from pgrealtime.collections.field_kinds import AUTH_FIELD_KINDS, RESERVED_MEMBERS, field_kind_of
from pgrealtime.collections.model import FieldKind
from pgrealtime.config.model import FieldsConfig, RelationConfig


@dataclass(frozen=True, slots=True)
class _JunctionTable:
    """A table that only pairs rows of two tables."""

    table: Table
    source: ForeignKey
    source_collection: str
    """The collection that ``source`` references."""
    target: ForeignKey
    target_collection: str

    @property
    def is_bare(self) -> bool:
        """Whether it has no other columns than those of the pair."""
        return len(self.table.columns) == len(
            {*self.source.column_names, *self.target.column_names}
        )


def junction_table_of(
    table: Table, served: Mapping[TableName, CollectionDraft]
) -> _JunctionTable | None:
    """Return the junction if the table's key is two foreign keys to served collections."""
    names = table.primary_key or tuple(column.name for column in table.columns)
    ends = [_referenced_drafts(table, name, served)[:1] for name in names]
    match ends:
        case [[first], [second]]:
            return _orient_junction(table, first, second)
        case _:
            return None


def _referenced_drafts(
    table: Table, column: str, served: Mapping[TableName, CollectionDraft]
) -> list[tuple[ForeignKey, CollectionDraft]]:
    """Return the foreign keys of the column alone, with the drafts whose key they reference."""
    return [
        (key, draft)
        for key in table.foreign_keys
        if key.column_names == (column,)
        and (draft := served.get(key.target)) is not None
        and key.target_column_names == (draft.key_name,)
    ]


def _orient_junction(
    table: Table,
    first: tuple[ForeignKey, CollectionDraft],
    second: tuple[ForeignKey, CollectionDraft],
) -> _JunctionTable:
    """Choose the collection that shows the pairs.

    The one that the table is named after; or else the one that isn't an auth collection.
    """

    def claim(draft: CollectionDraft) -> tuple[bool, bool]:
        return bool(_suffix_after(table, draft.name)), draft.config.type != "auth"

    if claim(second[1]) > claim(first[1]):
        first, second = second, first
    return _JunctionTable(table, first[0], first[1].name, second[0], second[1].name)


def _suffix_after(table: Table, name: str) -> str:
    """Return what follows a collection's name in the table's: "tags" of post_tags for posts."""
    for beginning in (name, name.removesuffix("s")):
        if table.name.name.casefold().startswith(f"{beginning}_".casefold()):
            return table.name.name[len(beginning) + 1 :]
    return ""


def with_junctions(
    served: Mapping[TableName, CollectionDraft],
    pairs: Mapping[TableName, _JunctionTable],
    omitted: dict[TableName, str],
) -> Mapping[str, CollectionDraft]:
    """Return the drafts, by name, with the relations that foreign keys alone don't give."""
    drafts = {draft.name: _with_chosen_foreign_keys(draft, served) for draft in served.values()}
    for name, pair in pairs.items():
        draft = drafts[pair.source_collection]
        taken = {field_name(draft, column) for column in draft.table.columns}
        taken |= {"id", *RESERVED_MEMBERS, *draft.config.relations}
        wanted = valid_name(_suffix_after(pair.table, draft.name) or name.name, "pairs")
        junction_field = unused_name(wanted, taken)
        relation = RelationConfig(
            collection=pair.target_collection,
            through=config_table_name(name),
            source=pair.source.column_names[0],
            target=pair.target.column_names[0],
        )
        relations = {**draft.config.relations, junction_field: relation}
        config = draft.config.model_copy(update={"relations": relations})
        drafts[draft.name] = replace(draft, config=config)
        if name not in served:
            omitted[name] = f"its pairs are shown as {draft.name}.{junction_field}"
    return drafts


def _with_chosen_foreign_keys(
    draft: CollectionDraft, served: Mapping[TableName, CollectionDraft]
) -> CollectionDraft:
    """Choose among foreign keys of one column; leave out columns whose type can't hold ids."""
    relations: dict[str, RelationConfig] = {}
    unfit: set[str] = set()
    for column in draft.table.columns:
        referenced = _referenced_drafts(draft.table, column.name, served)
        targets = sorted({other.name for _, other in referenced})
        is_key = column.name == draft.key_name
        if not targets:
            continue
        if field_kind_of(column.type)[0] not in (FieldKind.TEXT, FieldKind.NUMBER):
            unfit |= set() if is_key else {column.name}
            continue
        if is_key and column.name == "id":
            draft = _with_named_key(draft, targets[0])
        if len(targets) > 1:
            relations[_relation_name(draft, column)] = RelationConfig(collection=targets[0])
    config = draft.config.model_copy(update={"relations": relations})
    if unfit:
        config = config.model_copy(update={"fields": _fields_without(draft, unfit)})
    return replace(draft, config=config)


def _relation_name(draft: CollectionDraft, column: Column) -> str:
    """Return the name of a column's field that is a relation, as which a key isn't called id."""
    if column.name == draft.key_name:
        return draft.config.fields.rename.get(column.name, column.name)
    return field_name(draft, column)


def _with_named_key(draft: CollectionDraft, target: str) -> CollectionDraft:
    """Name a key called id as the relation that it is: ``employee`` to a row of employees."""
    taken = {field_name(draft, column) for column in draft.table.columns}
    taken |= {*RESERVED_MEMBERS, *AUTH_FIELD_KINDS}
    name = unused_name(target.removesuffix("s") or target, taken)
    fields = draft.config.fields
    renamed = fields.model_copy(update={"rename": {**fields.rename, draft.key_name: name}})
    return replace(draft, config=draft.config.model_copy(update={"fields": renamed}))


def _fields_without(draft: CollectionDraft, unfit: Container[str]) -> FieldsConfig:
    columns = [column for column in draft.table.columns if column.name not in unfit]
    fields = draft.config.fields
    hide = {field_name(draft, column) for column in columns}
    return FieldsConfig(
        include=tuple(column.name for column in columns),
        hide=tuple(name for name in fields.hide if name in hide),
        rename={name: new_name for name, new_name in fields.rename.items() if name not in unfit},
    )
