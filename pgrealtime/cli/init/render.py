"""Renders drafts as YAML with comments."""

import math
import re
import textwrap
from collections.abc import Iterable, Iterator

import yaml

from pgrealtime.catalog.model import ReplicaIdentity
from pgrealtime.cli.init.accounts import may_have_credential_ids
from pgrealtime.cli.init.drafts import READ_ONLY_TABLE_KINDS, draft_config
from pgrealtime.cli.init.model import CollectionDraft, ConfigDraft, SchemaSurvey
from pgrealtime.cli.init.rule_suggestions import SIGNED_IN_RULE
from pgrealtime.config.model import RelationConfig
from pgrealtime.explain.text import escape_unprintable

_LINE_WIDTH = 100


def render_config(survey: SchemaSurvey, *, is_url_known: bool) -> str:
    """Return the configuration as YAML with comments.

    ``is_url_known``: the database was given by a URL, not by libpq's variables.
    """
    config_draft = draft_config(survey)
    lines = [
        *_HEADER,
        *_shared_remark_lines(config_draft),
        "version: 1",
        "",
        "database:",
        f'  url: "{"${DATABASE_URL}" if is_url_known else "${DATABASE_URL:-}"}"',
        f"  schemas: [{', '.join(_yaml_value(name) for name in survey.catalog.schemas)}]",
        "",
        *_auth_lines(config_draft),
        *_collections_lines(config_draft, survey),
        *_omitted_lines(config_draft),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


_HEADER = (
    "# Written by pgrealtime init from the existing tables. Edit it as needed: run again, it adds",
    "# tables that the file doesn't name, and leaves all else as it is.",
    "#",
    "# All rules are locked: only superusers see records. Lines that begin with # and no space",
    "# are suggestions: read each, change it, and remove the # to enable it.",
    "# list_rule is for lists and subscriptions to all records, view_rule for a single record.",
    "# All keys: config/pgrealtime.yaml in the folder that pgrealtime files prints.",
)


def render_collection(draft: CollectionDraft, survey: SchemaSurvey, indent: int) -> list[str]:
    """Return the lines of one collection, for a file that has others."""
    return [f"{' ' * indent}{line}".rstrip() for line in _collection_lines(draft, survey)]


def render_relation(name: str, relation: RelationConfig) -> str:
    """Return a relation in one line, as a collection's section ``relations`` has it."""
    return f"{_yaml_key(name)}: {_relation_mapping(relation)}"


def _shared_remark_lines(draft: ConfigDraft) -> Iterator[str]:
    """Yield once what is true of several collections."""
    drafts = [one for one in draft.drafts if not one.faults]
    if any(one.suggested_rule == SIGNED_IN_RULE for one in drafts):
        yield "#"
        yield f"# Where no column names the owner of a row, {SIGNED_IN_RULE} is suggested: it"
        yield "# admits every authenticated caller."
    if any(one.config.fields.hide for one in drafts):
        yield "#"
        yield '# "hide" has columns that are secrets by their names: superusers alone receive them.'
    streamed = [one.table.replica_identity for one in drafts if one.config.stream]
    if any(identity is not ReplicaIdentity.FULL for identity in streamed):
        yield "#"
        yield "# Without REPLICA IDENTITY FULL a delete logs only the key of its row, and an update"
        yield "# omits long values that it leaves unchanged. pgrealtime check says which rules need"
        yield "# more, and pgrealtime sql prints what their tables lack."


def _auth_lines(draft: ConfigDraft) -> Iterator[str]:
    auths = [d.name for d in draft.drafts if d.config.type == "auth" and not d.faults]
    yield "auth:"
    yield "  allow_guests: true"
    yield "  # Accepted tokens. Without issuers every caller is a guest: @request.auth.id is empty."
    yield (
        '  #issuers: [{name: app, algorithms: [HS256], secret: "${APP_JWT_SECRET}",'
        f" collection: {_yaml_value(auths[0] if auths else 'users')}}}]"
    )
    if any(d.config.login.password_hash and not d.faults for d in draft.drafts):
        yield "  # Password logins, checked against the hashes that login below names:"
        yield '  #login: {enabled: true, secret: "${LOGIN_SECRET}"}'
    yield ""


def _collections_lines(config_draft: ConfigDraft, survey: SchemaSurvey) -> Iterator[str]:
    if not config_draft.drafts:
        yield "# There is no table that could be served."
        yield "collections: {}"
        yield ""
        return
    # If all that follows is commented out, the key would be null.
    is_any_served = any(not draft.faults for draft in config_draft.drafts)
    yield "collections:" if is_any_served else "#collections:"
    for draft in config_draft.drafts:
        yield from (f"  {line}".rstrip() for line in _collection_lines(draft, survey))
        yield ""


def _collection_lines(draft: CollectionDraft, survey: SchemaSurvey) -> Iterator[str]:
    yield from _comment_lines(_table_summary(draft, survey))
    if draft.faults:
        yield from _comment_lines("Not served:")
        for fault in draft.faults:
            yield from _comment_lines(f"{fault.reason}.", indent="  ")
            yield from _fix_lines(fault.fix)
        yield from map(_commented_out, _setting_lines(draft))
        return
    yield from _setting_lines(draft)


def _table_summary(draft: CollectionDraft, survey: SchemaSurvey) -> str:
    table = draft.table
    rows = survey.row_estimates.get(table.name)
    facts = ["not analyzed yet" if rows is None else f"about {rows:,} row{'s' * (rows != 1)}"]
    if kind := READ_ONLY_TABLE_KINDS.get(table.kind):
        facts = [f"{kind}, which sends no changes and can only be read"]
    if table.primary_key:
        facts.append(f"primary key {', '.join(table.primary_key)}")
    if table.leaves:
        facts.append(f"{len(table.leaves)} partition{'s' * (len(table.leaves) != 1)}")
    if draft.config.stream and table.replica_identity is not ReplicaIdentity.DEFAULT:
        facts.append(f"REPLICA IDENTITY {table.replica_identity.name}")
    return f"{table.name}: {', '.join(facts)}."


def _fix_lines(fix: str) -> Iterator[str]:
    if fix.endswith(";"):
        for statement in re.split("(?<=;) (?=ALTER|GRANT)", fix):
            yield f"#   {escape_unprintable(statement)}"
    elif fix:
        yield from _comment_lines(f"{fix.removesuffix('.')}.", indent="  ")


def _setting_lines(draft: CollectionDraft) -> Iterator[str]:
    config = draft.config
    yield f"{_yaml_key(draft.name)}:"
    yield f"  table: {_yaml_value(config.table)}"
    if config.type != "base":
        yield f"  type: {config.type}"
    if config.id:
        yield f"  id: {_yaml_value(config.id)}"
    if not config.stream:
        yield "  stream: false"
    yield from _fields_lines(draft)
    yield from _relations_lines(draft)
    yield from _login_lines(draft)
    if draft.suggested_rule:
        yield _commented_out(f"  list_rule: {_yaml_value(draft.suggested_rule)}")
        yield _commented_out(f"  view_rule: {_yaml_value(draft.suggested_rule)}")
    elif may_have_credential_ids(draft) and not draft.faults:
        yield "  # By their names its ids are credentials: a receiver can use them."


def _fields_lines(draft: CollectionDraft) -> Iterator[str]:
    fields = draft.config.fields
    if fields.include == ("*",) and not fields.hide and not fields.rename:
        return
    yield "  fields:"
    if fields.include != ("*",):
        yield "    # Without foreign keys whose type can't be an id."
        yield f"    include: {_yaml_list(fields.include)}"
    if fields.hide:
        yield f"    hide: {_yaml_list(fields.hide)}"
    if fields.rename:
        renames = [f"{_yaml_key(name)}: {_yaml_value(new)}" for name, new in fields.rename.items()]
        yield f"    rename: {{{', '.join(renames)}}}"


def _relations_lines(draft: CollectionDraft) -> Iterator[str]:
    relations = draft.config.relations
    if relations:
        yield "  relations:"
    for name, relation in relations.items():
        if not relation.through:
            yield "    # Its foreign keys point to several collections; only one can be used."
        yield f"    {_yaml_key(name)}: {_relation_mapping(relation)}"
    if draft.guessed_relations:
        yield "  # Guessed from the names; there is no foreign key:"
    guesses = draft.guessed_relations.items()
    guessed = [f"{_yaml_key(name)}: {_relation_mapping(guess)}" for name, guess in guesses]
    if guessed and not relations:  # one line, so that one # enables all
        yield _commented_out(f"  relations: {{{', '.join(guessed)}}}")
    elif guessed:
        yield from (_commented_out(f"    {line}") for line in guessed)


def _relation_mapping(relation: RelationConfig) -> str:
    settings = relation.model_dump(exclude_defaults=True).items()
    return f"{{{', '.join(f'{key}: {_yaml_value(text)}' for key, text in settings)}}}"


def _login_lines(draft: CollectionDraft) -> Iterator[str]:
    login = draft.config.login
    if not login.password_hash:
        if draft.lacks_identity:
            yield "  # No login by password: no unique column identifies a user."
        return
    if draft.config.auth_rule:
        yield "  # Which users may log in:"
        yield f"  auth_rule: {_yaml_value(draft.config.auth_rule)}"
    token_key = f", token_key: {_yaml_value(login.token_key)}" if login.token_key else ""
    yield (
        f"  login: {{identity: {_yaml_list(login.identity)},"
        f" password_hash: {_yaml_value(login.password_hash)}{token_key}}}"
    )


def _omitted_lines(draft: ConfigDraft) -> Iterator[str]:
    if draft.omitted:
        yield "# Left out:"
        for name, reason in draft.omitted.items():
            yield from _comment_lines(f"{name}: {reason}", indent="  ")


def _commented_out(line: str) -> str:
    """Return the setting as a comment; without its "#" it has the right indentation."""
    setting = line.lstrip(" ")
    return f"{' ' * (len(line) - len(setting))}#{setting}"


_BLANK_OR_BREAK = re.compile(r"\s+")


def _comment_lines(text: str, indent: str = "") -> Iterator[str]:
    """Yield the lines of a comment; characters that can't be printed are escaped as in Python."""
    width = _LINE_WIDTH - 4 - len(indent)
    printable = escape_unprintable(_BLANK_OR_BREAK.sub(" ", text))
    for line in textwrap.wrap(printable, width, break_on_hyphens=False):
        yield f"# {indent}{line}"


def _yaml_key(text: str) -> str:
    """Return the text as a YAML key. Variables aren't substituted in keys."""
    is_plain = text.isprintable()
    dumped = yaml.safe_dump(
        [text],
        default_flow_style=True,
        default_style=None if is_plain else '"',
        allow_unicode=is_plain,
        width=math.inf,
    )
    return dumped.strip()[1:-1]


def _yaml_value(text: str) -> str:
    """Return the text as a YAML value, with ``${`` escaped from substitution."""
    return _yaml_key(text.replace("${", "$${"))


def _yaml_list(texts: Iterable[str]) -> str:
    return f"[{', '.join(_yaml_value(text) for text in texts)}]"
