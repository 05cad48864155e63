"""Recognizes accounts, logins and secrets by the names of tables and columns."""

import re
from collections.abc import Iterable, Mapping

from pgrealtime.catalog.model import Column, Table
from pgrealtime.changes import TableName
from pgrealtime.cli.init.model import CollectionDraft
from pgrealtime.cli.init.rule_suggestions import split_words
from pgrealtime.collections.field_kinds import field_kind_of
from pgrealtime.collections.model import FieldKind
from pgrealtime.config.model import CollectionLoginConfig

EMAIL_COLUMNS = ("email", "email_address", "emailaddress", "e_mail", "mail")
PASSWORD_COLUMNS = (
    *("password_hash", "passwordhash", "hashed_password", "encrypted_password"),
    *("password_digest", "crypted_password", "pass_hash", "pwd_hash", "password", "passwd", "pass"),
)
_USERNAME_COLUMNS = ("username", "user_name", "login", "name")
USER_TABLES = (
    *("users", "user", "accounts", "account", "people", "persons", "person", "members", "member"),
    *("customers", "customer", "employees", "employee", "profiles", "profile"),
)


def text_column(table: Table, names: Iterable[str]) -> Column | None:
    """Return the first of the named columns that holds one text."""
    texts = {
        c.name.lower(): c for c in table.columns if field_kind_of(c.type) == (FieldKind.TEXT, False)
    }
    return next((texts[name] for name in names if name in texts), None)


def auth_tables(tables: Iterable[Table]) -> frozenset[TableName]:
    """Return the tables whose rows seem to be accounts.

    Those with an e-mail address and a password; if there is none, the one that is named so.
    """
    tables = list(tables)
    needed = (EMAIL_COLUMNS, PASSWORD_COLUMNS)
    chosen = {t.name for t in tables if all(text_column(t, names) for names in needed)}
    if not chosen:
        named = {t.name.name.lower(): t.name for t in reversed(tables)}
        chosen = {named[name] for name in USER_TABLES if name in named}
        chosen = set(sorted(chosen, key=lambda name: USER_TABLES.index(name.name.lower()))[:1])
    return frozenset(chosen)


def login_config(table: Table, renames: Mapping[str, str], key_name: str) -> CollectionLoginConfig:
    """Return the login settings that the columns suggest; empty without password or identity."""
    secret = text_column(table, PASSWORD_COLUMNS)
    identity = login_identity(table)
    if secret is None or not identity or key_name in (secret.name, *identity):
        return CollectionLoginConfig()
    token_key = text_column(table, ("token_key", "tokenkey"))
    return CollectionLoginConfig(
        identity=tuple(renames.get(name, name) for name in identity),
        password_hash=secret.name,
        token_key="" if token_key is None or token_key.name == key_name else token_key.name,
    )


def login_identity(table: Table) -> tuple[str, ...]:
    """Return the unique column to log in with: the e-mail address, or else a user name."""
    columns = [text_column(table, names) for names in (EMAIL_COLUMNS, _USERNAME_COLUMNS)]
    names = (column.name for column in columns if column is not None)
    return tuple(name for name in names if (name,) in table.unique_keys)[:1]


_SECRET_PATTERN = re.compile(
    r"passw(?:or)?d|passphrase|passcode|(?:api|private|access|signing|encryption|secret)_?key"
    r"|(?:^|_)(?:pwd|salt|t?otp|credentials?)(?:_|$)|(?:secret|token)s?(?:_|$)"
)


def looks_secret(column: Column) -> bool:
    """Whether the column seems to hold a secret, by its name."""
    kind, _ = field_kind_of(column.type)
    words = split_words(column.name)
    # Not password_changed_at, has_password or token_count.
    is_count = kind is FieldKind.NUMBER and len(words) > 1
    is_metadata = is_count or kind in (FieldKind.DATE, FieldKind.BOOL)
    return _SECRET_PATTERN.search("_".join(words)) is not None and not is_metadata


_CREDENTIAL_WORDS = {"session", "sessions", "token", "tokens"}


def may_have_credential_ids(draft: CollectionDraft) -> bool:
    """Whether the ids seem to be credentials, as those of sessions and tokens are.

    An id can't be hidden: it is part of every event of its row.
    """
    key = draft.table.find_column(draft.key_name)
    is_text = key is not None and field_kind_of(key.type) == (FieldKind.TEXT, False)
    if key is None or not is_text or key.type.base.name == "uuid":
        return False
    named = {*split_words(draft.table.name.name), *split_words(key.name)}
    return looks_secret(key) or not _CREDENTIAL_WORDS.isdisjoint(named)
