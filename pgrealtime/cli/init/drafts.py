"""Drafts a collection for each table of a schema, with all rules locked and a rule to begin with.

Pure; called by ``init``. Drafts are validated by ``collections.build`` and by ``rules``.
"""

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from pgrealtime.catalog.model import Catalog, Column, Table, TableKind
from pgrealtime.changes import (
    RECORD_ID_COLUMN,
    TableName,
    quote_identifier,
    quote_table_name,
)
from pgrealtime.cli.init import accounts
from pgrealtime.cli.init.model import CollectionDraft, ConfigDraft, SchemaSurvey, TableFault
from pgrealtime.cli.init.names import (
    config_table_name,
    field_name,
    field_renames,
    name_collections,
)
from pgrealtime.cli.init.relations import junction_table_of, with_junctions
from pgrealtime.cli.init.rule_suggestions import SIGNED_IN_RULE, RuleSuggestions
from pgrealtime.collections.build import build_with_problems
from pgrealtime.collections.field_kinds import SECRET_FIELDS, field_kind_of
from pgrealtime.collections.model import Collections, FieldKind
from pgrealtime.collections.names import name_problem
from pgrealtime.config.model import (
    CollectionConfig,
    CollectionLoginConfig,
    FieldsConfig,
    RelationConfig,
)
from pgrealtime.errors import ConfigProblem


def draft_config(
    survey: SchemaSurvey, names: Mapping[TableName, str] = MappingProxyType({})
) -> ConfigDraft:
    """Return a draft for each table of the catalogue that becomes a collection.

    ``names`` has the collections of tables that have one already.
    """
    catalog, extensions, unreadable = survey.catalog, survey.extensions, survey.unreadable
    left_out = dict(_omitted_tables(catalog, extensions))
    standalone = [t for t in catalog.tables.values() if _is_standalone(t, extensions)]
    tables = _sort_tables(standalone, catalog)
    auths = accounts.auth_tables(tables)
    # Behind the tables, so that these keep their names.
    tables += [t for t in catalog.tables.values() if t.name not in left_out and _is_read_only(t)]
    named = name_collections(tables, names)
    drafts = [_draft_collection(name, t, is_auth=t.name in auths) for name, t in named]
    drafts = _with_table_faults(drafts, catalog, unreadable)
    served = {draft.table.name: draft for draft in drafts if not draft.faults}
    pairs = {
        draft.table.name: pair
        for draft in drafts
        if (draft.faults or draft.key_name == RECORD_ID_COLUMN)
        and draft.table.name not in unreadable
        and (pair := junction_table_of(draft.table, served)) is not None
    }
    only_pairs = {name for name, pair in pairs.items() if name not in served or pair.is_bare}
    drafts = [draft for draft in drafts if draft.table.name not in only_pairs]
    served = {name: draft for name, draft in served.items() if name not in only_pairs}
    related = with_junctions(served, pairs, left_out)
    settled, unfit = _drop_inconsistent(related, catalog)
    finished = {**_with_suggested_rules(settled, catalog), **unfit}
    all_drafts = tuple(finished.get(draft.name, draft) for draft in drafts)
    return ConfigDraft(drafts=all_drafts, omitted=left_out)


# -- which tables


READ_ONLY_TABLE_KINDS = {
    TableKind.VIEW: "a view",
    TableKind.MATERIALIZED_VIEW: "a materialized view",
    TableKind.FOREIGN: "a foreign table",
}
"""What sends no changes and can be read only."""


def _is_read_only(table: Table) -> bool:
    """Whether it sends no changes but has what seems to be a key."""
    return table.kind in READ_ONLY_TABLE_KINDS and table.find_column("id") is not None


def _is_standalone(table: Table, extensions: Container[TableName]) -> bool:
    is_table = table.kind in (TableKind.TABLE, TableKind.PARTITIONED)
    return is_table and table.partition_of is None and table.name not in extensions


def _omitted_tables(
    catalog: Catalog, extensions: Mapping[TableName, str]
) -> Iterator[tuple[TableName, str]]:
    for name, table in catalog.tables.items():
        if name in extensions:
            yield name, f"belongs to the extension {extensions[name]}"
        elif table.kind in READ_ONLY_TABLE_KINDS and not _is_read_only(table):
            yield name, f"{READ_ONLY_TABLE_KINDS[table.kind]} without a column id"
        elif table.partition_of is not None and table.partition_of not in catalog.tables:
            yield name, f"a partition of {table.partition_of}, whose schema isn't among these"


def _sort_tables(tables: Sequence[Table], catalog: Catalog) -> list[Table]:
    auths = accounts.auth_tables(tables)
    order = {schema: n for n, schema in enumerate(catalog.schemas)}
    return sorted(tables, key=lambda t: (_sort_rank(t, auths), order[t.name.schema], t.name.name))


def _sort_rank(table: Table, auths: Container[TableName]) -> int:
    """Return the sort key: auth tables first, of these the one that a ``user_id`` refers to."""
    if table.name not in auths:
        return len(accounts.USER_TABLES) + 1
    names, name = accounts.USER_TABLES, table.name.name.lower()
    return names.index(name) if name in names else len(names)


# -- drafts of single tables

_ACTIVE_FLAGS = ("is_active", "isactive", "active", "is_enabled", "enabled")
_BLOCKED_FLAGS = (
    *("is_disabled", "disabled", "is_blocked", "blocked", "is_banned", "banned"),
    *("is_suspended", "suspended"),
)


def _auth_rule(draft: CollectionDraft) -> str:
    """Return a rule for who may log in from columns such as ``is_active``; empty without any."""
    flags = {
        column.name.lower(): field
        for column in draft.table.columns
        if field_kind_of(column.type) == (FieldKind.BOOL, False)
        and name_problem(field := field_name(draft, column)) is None
    }
    active = [f"{flags[name]} = true" for name in _ACTIVE_FLAGS if name in flags]
    blocked = [f"{flags[name]} = false" for name in _BLOCKED_FLAGS if name in flags]
    return " && ".join(active + blocked)


def _draft_collection(name: str, table: Table, *, is_auth: bool) -> CollectionDraft:
    is_streamed = table.kind not in READ_ONLY_TABLE_KINDS
    key, configured_key = _choose_key(table) if is_streamed else ("id", "id")
    renames = field_renames(table, key, is_auth=is_auth)
    login = accounts.login_config(table, renames, key) if is_auth else CollectionLoginConfig()
    config = CollectionConfig(
        table=config_table_name(table.name),
        type="auth" if is_auth else "base",
        id=configured_key,
        stream=is_streamed,
        fields=FieldsConfig(rename=renames),
        login=login,
    )
    draft = CollectionDraft(name=name, table=table, key_name=key, config=config)
    hide = tuple(field_name(draft, column) for column in _columns_to_hide(draft))
    fields = FieldsConfig(rename=renames, hide=hide)
    auth_rule = _auth_rule(draft) if login.password_hash else ""
    has_passwords = is_auth and accounts.text_column(table, accounts.PASSWORD_COLUMNS) is not None
    return replace(
        draft,
        config=config.model_copy(update={"fields": fields, "auth_rule": auth_rule}),
        lacks_identity=has_passwords and not accounts.login_identity(table),
    )


def _columns_to_hide(draft: CollectionDraft) -> Iterator[Column]:
    pointing = {name for key in draft.table.foreign_keys for name in key.column_names}
    config = draft.config
    for column in draft.table.columns:
        is_in_no_record = column.name in config.login.secret_columns or (
            config.type == "auth" and field_name(draft, column) in SECRET_FIELDS
        )
        is_key = column.name in pointing or column.name == draft.key_name
        if accounts.looks_secret(column) and not is_key and not is_in_no_record:
            yield column


def _choose_key(table: Table) -> tuple[str, str]:
    """Return the column to show as id, and the value of the setting ``id``.

    If no column is suitable, return the one that will be there once the fix is applied.
    """
    if len(table.primary_key) == 1:
        return table.primary_key[0], ""
    unique = [c.name for c in table.columns if c.not_null and (c.name,) in table.unique_keys]
    logged = [name for name in unique if name in table.replica_identity_columns]
    if logged:
        return logged[0], logged[0]
    in_fact = [c.name for c in table.columns if table.is_unique_but_for_partitions(c.name)]
    ids = [name for name in in_fact if name not in table.partition_columns]
    if len(ids) == 1 and ids[0] in table.replica_identity_columns:
        return ids[0], ids[0]
    if not table.primary_key:
        return next((names[0] for names in table.unique_keys if len(names) == 1), "id"), ""
    return RECORD_ID_COLUMN, ""


# -- faults of tables


def _with_table_faults(
    drafts: Sequence[CollectionDraft], catalog: Catalog, unreadable: Mapping[TableName, TableFault]
) -> list[CollectionDraft]:
    tried = {
        draft.name: draft.config
        if draft.table.find_column(draft.config.id)
        else draft.config.model_copy(update={"id": ""})
        for draft in drafts
    }
    by_name = {draft.name: draft for draft in drafts}
    faults: dict[str, list[TableFault]] = defaultdict(list)
    for draft in drafts:
        if draft.table.name in unreadable:
            faults[draft.name].append(unreadable[draft.table.name])
    for problem in build_with_problems(tried, catalog)[1]:
        _, name, key, *_ = (*problem.path.split("."), "")
        if key in ("table", "id"):
            faults[name].append(TableFault(problem.message, _fix_for(by_name[name], problem)))
    return [replace(draft, faults=tuple(faults[draft.name])) for draft in drafts]


def _fix_for(draft: CollectionDraft, problem: ConfigProblem) -> str:
    table = draft.table
    is_keyless = problem.message.startswith("the primary key of ")
    has_key = table.kind is TableKind.PARTITIONED or table.find_column(draft.key_name) is not None
    if is_keyless and not has_key:
        alter = f"ALTER TABLE {quote_table_name(table.name)}"
        key = quote_identifier(draft.key_name)
        made = f"ADD COLUMN {key} bigint GENERATED ALWAYS AS IDENTITY UNIQUE"
        return f"{alter} {made}; {alter} REPLICA IDENTITY FULL;"
    return problem.hint


def _drop_inconsistent(
    served: Mapping[str, CollectionDraft], catalog: Catalog
) -> tuple[Mapping[str, CollectionDraft], Mapping[str, CollectionDraft]]:
    """Return the drafts that are valid together, and those that had to be removed for it."""
    unfit: dict[str, CollectionDraft] = {}
    while True:
        _, problems = build_with_problems({d.name: d.config for d in served.values()}, catalog)
        if not problems:
            return served, unfit
        faults: dict[str, list[TableFault]] = defaultdict(list)
        for problem in problems:
            faults[problem.path.split(".")[1]].append(TableFault(problem.message, problem.hint))
        unfit |= {n: replace(served[n], faults=tuple(found)) for n, found in faults.items()}
        remaining = {name: draft for name, draft in served.items() if name not in unfit}
        served = {name: _without_relations_to(draft, unfit) for name, draft in remaining.items()}


def _without_relations_to(draft: CollectionDraft, removed: Container[str]) -> CollectionDraft:
    relations = draft.config.relations
    left = {name: r for name, r in relations.items() if r.collection not in removed}
    return replace(draft, config=draft.config.model_copy(update={"relations": left}))


# -- rules


def _with_suggested_rules(
    served: Mapping[str, CollectionDraft], catalog: Catalog
) -> Mapping[str, CollectionDraft]:
    collections = _build_drafts(served, catalog)
    guessed = {
        name: {owner_field: RelationConfig(collection=target)}
        for name, (owner_field, target) in RuleSuggestions(collections).guess_owner_fields()
        if served[name].config.stream
    }
    drafts = {
        name: replace(draft, guessed_relations=guessed.get(name, {}))
        for name, draft in served.items()
    }
    suggestions = RuleSuggestions(_build_drafts(drafts, catalog))
    return {
        name: replace(
            draft,
            suggested_rule=""
            if not draft.config.stream
            or (rule == SIGNED_IN_RULE and accounts.may_have_credential_ids(draft))
            else rule,
        )
        for name, draft in drafts.items()
        for rule in (suggestions.suggest_rule(name),)
    }


def _build_drafts(drafts: Mapping[str, CollectionDraft], catalog: Catalog) -> Collections:
    configs = {
        name: draft.config.model_copy(
            update={"relations": {**draft.config.relations, **draft.guessed_relations}}
        )
        for name, draft in drafts.items()
    }
    return build_with_problems(configs, catalog)[0]
