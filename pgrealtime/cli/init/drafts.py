"""Drafts a collection for each table of a schema, with all rules locked and a rule to begin with.

Pure; called by ``init``. Drafts are validated by ``collections.build`` and by ``rules``.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from pgrealtime.catalog.model import Catalog, Column, ForeignKey, Table, TableKind
from pgrealtime.catalog.naming import quote_identifier, quote_table_name
from pgrealtime.changes import TableName
from pgrealtime.cli.init.suggest import SIGNED_IN_RULE, RuleSuggestions, split_words
from pgrealtime.collections.build import build_with_problems
from pgrealtime.collections.field_kinds import (
    AUTH_FIELD_KINDS,
    RESERVED_MEMBERS,
    SECRET_FIELDS,
    field_kind_of,
)
from pgrealtime.collections.model import Collections, FieldKind
from pgrealtime.collections.names import name_problem
from pgrealtime.config.model import (
    CollectionConfig,
    CollectionLoginConfig,
    FieldsConfig,
    RelationConfig,
)
from pgrealtime.errors import ConfigProblem


@dataclass(frozen=True, slots=True)
class TableFault:
    """Why a table can't be served as it is, and what mends it."""

    reason: str
    """Lower case, no full stop."""
    fix: str = ""
    """SQL, or a sentence; empty if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionDraft:
    """The draft of one collection."""

    name: str
    table: Table
    key_name: str
    """The column shown as id, or to be added for it."""
    config: CollectionConfig
    """Without rules."""
    faults: tuple[TableFault, ...] = ()
    """Each of them keeps it from being served."""
    lacks_identity: bool = False
    """Whether there are passwords, but no unique column to log in with."""
    guessed_relations: Mapping[str, RelationConfig] = field(default_factory=dict)
    """Relations that only the columns' names indicate."""
    suggested_rule: str = ""
    """For ``list_rule`` and ``view_rule``; empty if it can't be served, or shouldn't be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigDraft:
    """The drafts of all collections of a schema."""

    drafts: tuple[CollectionDraft, ...]
    """Auth collections first, then in the order of schemas and names."""
    omitted: Mapping[TableName, str]
    """Tables and views that become no collection -> the reason."""


def draft_config(
    catalog: Catalog,
    *,
    extensions: Mapping[TableName, str],
    unreadable: Mapping[TableName, TableFault],
) -> ConfigDraft:
    """Return a draft for each table of the catalogue that becomes a collection.

    Args:
        catalog: Of the schemas to serve.
        extensions: Tables of extensions, with the extension's name.
        unreadable: Tables that the role may not read.
    """
    left_out = dict(_omitted_tables(catalog, extensions))
    tables = _sort_tables(
        [table for name, table in catalog.tables.items() if _is_standalone(table, extensions)],
        catalog,
    )
    drafts = _with_table_faults(_draft_collections(tables), catalog, unreadable)
    served = {draft.table.name: draft for draft in drafts if not draft.faults}
    pairs = {
        draft.table.name: pair
        for draft in drafts
        if draft.faults
        and draft.table.name not in unreadable
        and (pair := _junction_table_of(draft.table, served)) is not None
    }
    drafts = [draft for draft in drafts if draft.table.name not in pairs]
    related = _with_junctions(served, pairs, left_out)
    settled, unfit = _drop_inconsistent(related, catalog)
    finished = {**_with_suggested_rules(settled, catalog), **unfit}
    return ConfigDraft(
        drafts=tuple(finished.get(draft.name, draft) for draft in drafts), omitted=left_out
    )


# -- which tables


_OMITTED_TABLE_KINDS = {
    TableKind.VIEW: "a view, which sends no changes",
    TableKind.MATERIALIZED_VIEW: "a materialized view, which sends no changes",
    TableKind.FOREIGN: "a foreign table, which sends no changes",
}


def _is_standalone(table: Table, extensions: Container[TableName]) -> bool:
    is_table = table.kind in (TableKind.TABLE, TableKind.PARTITIONED)
    return is_table and table.partition_of is None and table.name not in extensions


def _omitted_tables(
    catalog: Catalog, extensions: Mapping[TableName, str]
) -> Iterator[tuple[TableName, str]]:
    for name, table in catalog.tables.items():
        if name in extensions:
            yield name, f"belongs to the extension {extensions[name]}"
        elif table.kind in _OMITTED_TABLE_KINDS:
            yield name, _OMITTED_TABLE_KINDS[table.kind]
        elif table.partition_of is not None and table.partition_of not in catalog.tables:
            yield name, f"a partition of {table.partition_of}, whose schema isn't among these"


def _sort_tables(tables: Sequence[Table], catalog: Catalog) -> list[Table]:
    auths = _auth_tables(tables)
    order = {schema: n for n, schema in enumerate(catalog.schemas)}
    return sorted(tables, key=lambda t: (_sort_rank(t, auths), order[t.name.schema], t.name.name))


def _sort_rank(table: Table, auths: Container[TableName]) -> int:
    """Return the sort key: auth tables first, of these the one that a ``user_id`` refers to."""
    if table.name not in auths:
        return len(_USER_TABLES) + 1
    name = table.name.name.lower()
    return _USER_TABLES.index(name) if name in _USER_TABLES else len(_USER_TABLES)


# -- accounts

_EMAIL_COLUMNS = ("email", "email_address", "emailaddress", "e_mail", "mail")
_PASSWORD_COLUMNS = (
    *("password_hash", "passwordhash", "hashed_password", "encrypted_password"),
    *("password_digest", "crypted_password", "pass_hash", "pwd_hash", "password", "passwd", "pass"),
)
_USERNAME_COLUMNS = ("username", "user_name", "login", "name")
_USER_TABLES = (
    *("users", "user", "accounts", "account", "people", "persons", "person", "members", "member"),
    *("customers", "customer", "employees", "employee", "profiles", "profile"),
)


def _text_column(table: Table, names: Iterable[str]) -> Column | None:
    """Return the first of the named columns that holds one text."""
    texts = {
        c.name.lower(): c for c in table.columns if field_kind_of(c.type) == (FieldKind.TEXT, False)
    }
    return next((texts[name] for name in names if name in texts), None)


def _auth_tables(tables: Iterable[Table]) -> frozenset[TableName]:
    """Return the tables whose rows seem to be accounts.

    Those with an e-mail address and a password; if there is none, the one that is named so.
    """
    tables = list(tables)
    found = {
        t.name
        for t in tables
        if _text_column(t, _EMAIL_COLUMNS) and _text_column(t, _PASSWORD_COLUMNS)
    }
    if not found:
        named = {t.name.name.lower(): t.name for t in reversed(tables)}
        found = {named[name] for name in _USER_TABLES if name in named}
        found = set(sorted(found, key=lambda name: _USER_TABLES.index(name.name.lower()))[:1])
    return frozenset(found)


def _login_config(table: Table, renames: Mapping[str, str], key_name: str) -> CollectionLoginConfig:
    secret = _text_column(table, _PASSWORD_COLUMNS)
    identity = _login_identity(table)
    if secret is None or not identity or key_name in (secret.name, *identity):
        return CollectionLoginConfig()
    token_key = _text_column(table, ("token_key", "tokenkey"))
    return CollectionLoginConfig(
        identity=tuple(renames.get(name, name) for name in identity),
        password_hash=secret.name,
        token_key="" if token_key is None or token_key.name == key_name else token_key.name,
    )


def _login_identity(table: Table) -> tuple[str, ...]:
    """Return the unique column to log in with: the e-mail address, or else a user name."""
    found = [_text_column(table, names) for names in (_EMAIL_COLUMNS, _USERNAME_COLUMNS)]
    names = (column.name for column in found if column is not None)
    return tuple(name for name in names if (name,) in table.unique_keys)[:1]


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
        and name_problem(field := _field_name(draft, column)) is None
    }
    active = [f"{flags[name]} = true" for name in _ACTIVE_FLAGS if name in flags]
    blocked = [f"{flags[name]} = false" for name in _BLOCKED_FLAGS if name in flags]
    return " && ".join(active + blocked)


# -- names

_INVALID_CHARACTERS = re.compile(r"[^A-Za-z0-9]+")
_VIA_PATTERN = re.compile("_via_", re.IGNORECASE)


def _valid_name(name: str, fallback: str) -> str:
    """Return the name itself if rules can contain it, or else the most similar one."""
    if name_problem(name) is None:
        return name
    letters = unicodedata.normalize("NFKD", name)
    fit = _INVALID_CHARACTERS.sub(
        "_", "".join(c for c in letters if not unicodedata.combining(c))
    ).strip("_")
    while _VIA_PATTERN.search(fit):
        fit = _VIA_PATTERN.sub("_by_", fit)
    return fit or fallback


def _unused_name(name: str, taken: Container[str]) -> str:
    """Return the name, with a number appended if it is taken."""
    if name not in taken:
        return name
    return next(tried for n in count(2) if (tried := f"{name}_{n}") not in taken)


def _name_collections(tables: Iterable[Table]) -> Iterator[tuple[str, Table]]:
    """Yield each table with its collection's name.

    Names differ by more than case, which ``@collection`` ignores.
    """
    taken = {"_superusers"}  # PocketBase's own
    for table in tables:
        name = _valid_name(table.name.name, "table")
        if name.casefold() in taken:
            name = _valid_name(f"{table.name.schema}_{table.name.name}", "table")
        if name.casefold() in taken:
            name = next(n for k in count(2) if (n := f"{name}_{k}").casefold() not in taken)
        taken.add(name.casefold())
        yield name, table


def _field_renames(table: Table, key_name: str, *, is_auth: bool) -> dict[str, str]:
    """Return the field names of the columns that can't be shown under their own.

    A name that two columns could have goes to the column of that name.
    """
    others = [column for column in table.columns if column.name != key_name]
    email = _text_column(table, _EMAIL_COLUMNS) if is_auth else None
    taken = {"id", *RESERVED_MEMBERS}
    renames: dict[str, str] = {}
    unnamed: list[Column] = []
    for column in others:
        usual = _default_field_name(column, table, is_auth=is_auth)
        if (
            usual not in taken
            and name_problem(usual) is None
            and _fits_auth_kind(usual, column, is_auth=is_auth)
        ):
            taken.add(usual)
        else:
            unnamed.append(column)
    if email in others and email.name != "email" and "email" not in taken:
        unnamed = [column for column in unnamed if column != email]
        renames[email.name] = "email"
        taken.add("email")
    for column in unnamed:
        # Not a name that the server itself reads.
        name = _unused_name(
            _valid_name(column.name, "column"),
            taken | (AUTH_FIELD_KINDS.keys() if is_auth else set()),
        )
        renames[column.name] = name
        taken.add(name)
    return renames


def _default_field_name(column: Column, table: Table, *, is_auth: bool) -> str:
    if (
        is_auth
        and column.name == "email_visibility"
        and table.find_column("emailVisibility") is None
    ):
        return "emailVisibility"
    return column.name


def _fits_auth_kind(name: str, column: Column, *, is_auth: bool) -> bool:
    """Whether the column has the kind that an auth collection's field of that name must have."""
    wanted = AUTH_FIELD_KINDS.get(name) if is_auth else None
    return wanted is None or field_kind_of(column.type) == (wanted, False)


def _field_name(draft: CollectionDraft, column: Column) -> str:
    usual = _default_field_name(column, draft.table, is_auth=draft.config.type == "auth")
    return (
        "id"
        if column.name == draft.key_name
        else draft.config.fields.rename.get(column.name, usual)
    )


# -- secrets

_SECRET_PATTERN = re.compile(
    r"passw(?:or)?d|passphrase|passcode|(?:api|private|access|signing|encryption|secret)_?key"
    r"|(?:^|_)(?:pwd|salt|t?otp|credentials?)(?:_|$)|(?:secret|token)s?(?:_|$)"
)


def looks_secret(column: Column) -> bool:
    """Whether the column seems to hold a secret, by its name."""
    kind, _ = field_kind_of(column.type)
    words = split_words(column.name)
    # Not password_changed_at, has_password or token_count.
    is_about = kind in (FieldKind.DATE, FieldKind.BOOL) or (
        kind is FieldKind.NUMBER and len(words) > 1
    )
    return _SECRET_PATTERN.search("_".join(words)) is not None and not is_about


_CREDENTIAL_WORDS = {"session", "sessions", "token", "tokens"}


def may_have_credential_ids(draft: CollectionDraft) -> bool:
    """Whether the ids seem to be credentials, as those of sessions and tokens are.

    An id can't be hidden: it is part of every event of its row.
    """
    key = draft.table.find_column(draft.key_name)
    if (
        key is None
        or field_kind_of(key.type) != (FieldKind.TEXT, False)
        or key.type.base.name == "uuid"
    ):
        return False
    named = {*split_words(draft.table.name.name), *split_words(key.name)}
    return looks_secret(key) or not _CREDENTIAL_WORDS.isdisjoint(named)


# -- drafts of single tables


def _draft_collections(tables: Sequence[Table]) -> list[CollectionDraft]:
    auths = _auth_tables(tables)
    return [
        _draft_collection(name, table, is_auth=table.name in auths)
        for name, table in _name_collections(tables)
    ]


def _draft_collection(name: str, table: Table, *, is_auth: bool) -> CollectionDraft:
    key, configured_key = _choose_key(table)
    renames = _field_renames(table, key, is_auth=is_auth)
    login = _login_config(table, renames, key) if is_auth else CollectionLoginConfig()
    config = CollectionConfig(
        table=config_table_name(table.name),
        type="auth" if is_auth else "base",
        id=configured_key,
        fields=FieldsConfig(rename=renames),
        login=login,
    )
    draft = CollectionDraft(name=name, table=table, key_name=key, config=config)
    hide = tuple(_field_name(draft, column) for column in _columns_to_hide(draft))
    fields = FieldsConfig(rename=renames, hide=hide)
    auth_rule = _auth_rule(draft) if login.password_hash else ""
    has_passwords = is_auth and _text_column(table, _PASSWORD_COLUMNS) is not None
    return replace(
        draft,
        config=config.model_copy(update={"fields": fields, "auth_rule": auth_rule}),
        lacks_identity=has_passwords and not _login_identity(table),
    )


def _columns_to_hide(draft: CollectionDraft) -> Iterator[Column]:
    pointing = {name for key in draft.table.foreign_keys for name in key.columns}
    config = draft.config
    for column in draft.table.columns:
        is_in_no_record = column.name in config.login.secret_columns or (
            config.type == "auth" and _field_name(draft, column) in SECRET_FIELDS
        )
        is_key = column.name in pointing or column.name == draft.key_name
        if looks_secret(column) and not is_key and not is_in_no_record:
            yield column


def config_table_name(name: TableName) -> str:
    """Return the table's name as the configuration writes it."""
    return ".".join(p if re.fullmatch(r"\w+", p) else quote_identifier(p) for p in name)


def _choose_key(table: Table) -> tuple[str, str]:
    """Return the column to show as id, and the value of the setting ``id``.

    If no column is suitable, return the one that will be there once the table is mended.
    """
    if len(table.primary_key) == 1:
        return table.primary_key[0], ""
    unique = [c.name for c in table.columns if c.not_null and (c.name,) in table.unique_keys]
    logged = [name for name in unique if name in table.replica_identity_columns]
    if logged:
        return logged[0], logged[0]
    if not table.primary_key:
        return next((names[0] for names in table.unique_keys if len(names) == 1), "id"), ""
    if table.kind is TableKind.PARTITIONED:
        return "id" if "id" in table.primary_key else table.primary_key[0], ""
    if unique:
        return unique[0], unique[0]
    new = _unused_name(
        "id" if table.find_column("id") is None else "record_id", {c.name for c in table.columns}
    )
    return new, new


# -- faults of tables


def _with_table_faults(
    drafts: Sequence[CollectionDraft], catalog: Catalog, unreadable: Mapping[TableName, TableFault]
) -> list[CollectionDraft]:
    """Return the drafts with the faults of their tables and keys."""
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
    if (
        is_keyless
        and table.kind is not TableKind.PARTITIONED
        and table.find_column(draft.key_name) is None
    ):
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
        kept = {name: draft for name, draft in served.items() if name not in unfit}
        served = {name: _without_relations_to(draft, unfit) for name, draft in kept.items()}


def _without_relations_to(draft: CollectionDraft, removed: Container[str]) -> CollectionDraft:
    relations = draft.config.relations
    left = {name: said for name, said in relations.items() if said.collection not in removed}
    return replace(draft, config=draft.config.model_copy(update={"relations": left}))


# -- relations


@dataclass(frozen=True, slots=True)
class _JunctionTable:
    """A table that only pairs rows of two tables."""

    table: Table
    source: ForeignKey
    source_collection: str
    """The collection that ``source`` references."""
    target: ForeignKey
    target_collection: str


def _junction_table_of(
    table: Table, served: Mapping[TableName, CollectionDraft]
) -> _JunctionTable | None:
    """Return the junction if the table's key is two foreign keys to served collections."""
    names = table.primary_key or tuple(column.name for column in table.columns)
    ends = [_referenced_drafts(table, name, served)[:1] for name in names]
    match ends:
        case [[one], [other]]:
            return _orient_junction(table, one, other)
        case _:
            return None


def _referenced_drafts(
    table: Table, column: str, served: Mapping[TableName, CollectionDraft]
) -> list[tuple[ForeignKey, CollectionDraft]]:
    """Return the foreign keys of the column alone, with the drafts whose key they reference."""
    return [
        (key, draft)
        for key in table.foreign_keys
        if key.columns == (column,)
        and (draft := served.get(key.target)) is not None
        and key.target_columns == (draft.key_name,)
    ]


def _orient_junction(
    table: Table, one: tuple[ForeignKey, CollectionDraft], other: tuple[ForeignKey, CollectionDraft]
) -> _JunctionTable:
    """Choose the collection that shows the pairs.

    The one that the table is named after; or else the one that isn't an auth collection.
    """

    def claim(draft: CollectionDraft) -> tuple[bool, bool]:
        return bool(_suffix_after(table, draft.name)), draft.config.type != "auth"

    if claim(other[1]) > claim(one[1]):
        one, other = other, one
    return _JunctionTable(table, one[0], one[1].name, other[0], other[1].name)


def _suffix_after(table: Table, name: str) -> str:
    """Return what follows a collection's name in the table's: "tags" of post_tags for posts."""
    for beginning in (name, name.removesuffix("s")):
        if table.name.name.casefold().startswith(f"{beginning}_".casefold()):
            return table.name.name[len(beginning) + 1 :]
    return ""


def _with_junctions(
    served: Mapping[TableName, CollectionDraft],
    pairs: Mapping[TableName, _JunctionTable],
    left_out: dict[TableName, str],
) -> Mapping[str, CollectionDraft]:
    """Return the drafts, by name, with the relations that foreign keys alone don't give."""
    found = {draft.name: _with_chosen_foreign_keys(draft, served) for draft in served.values()}
    for name, pair in pairs.items():
        draft = found[pair.source_collection]
        taken = {_field_name(draft, column) for column in draft.table.columns}
        taken |= {"id", *RESERVED_MEMBERS, *draft.config.relations}
        shown = _unused_name(
            _valid_name(_suffix_after(pair.table, draft.name) or name.name, "pairs"), taken
        )
        relation = RelationConfig(
            collection=pair.target_collection,
            through=config_table_name(name),
            source=pair.source.columns[0],
            target=pair.target.columns[0],
        )
        relations = {**draft.config.relations, shown: relation}
        config = draft.config.model_copy(update={"relations": relations})
        found[draft.name] = replace(draft, config=config)
        left_out[name] = f"its pairs are shown as {draft.name}.{shown}"
    return found


def _with_chosen_foreign_keys(
    draft: CollectionDraft, served: Mapping[TableName, CollectionDraft]
) -> CollectionDraft:
    """Choose among foreign keys of one column; leave out columns whose type can't hold ids."""
    relations: dict[str, RelationConfig] = {}
    unfit: set[str] = set()
    for column in draft.table.columns:
        targets = sorted(
            {other.name for _, other in _referenced_drafts(draft.table, column.name, served)}
        )
        if column.name == draft.key_name or not targets:
            continue
        if field_kind_of(column.type)[0] not in (FieldKind.TEXT, FieldKind.NUMBER):
            unfit.add(column.name)
        elif len(targets) > 1:
            relations[_field_name(draft, column)] = RelationConfig(collection=targets[0])
    config = draft.config.model_copy(update={"relations": relations})
    if unfit:
        config = config.model_copy(update={"fields": _fields_without(draft, unfit)})
    return replace(draft, config=config)


def _fields_without(draft: CollectionDraft, unfit: Container[str]) -> FieldsConfig:
    kept = [column for column in draft.table.columns if column.name not in unfit]
    fields = draft.config.fields
    hide = {_field_name(draft, column) for column in kept}
    return FieldsConfig(
        include=tuple(column.name for column in kept),
        hide=tuple(name for name in fields.hide if name in hide),
        rename={name: to for name, to in fields.rename.items() if name not in unfit},
    )


# -- rules


def _with_suggested_rules(
    served: Mapping[str, CollectionDraft], catalog: Catalog
) -> Mapping[str, CollectionDraft]:
    collections = _build_drafts(served, catalog)
    guessed = {
        name: {shown: RelationConfig(collection=to)}
        for name, (shown, to) in RuleSuggestions(collections).guess_owner_fields()
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
            if rule == SIGNED_IN_RULE and may_have_credential_ids(draft)
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
