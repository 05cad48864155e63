"""Adds collections to a configuration that exists, as text: what it has, comments too, stays.

Pure; called by ``init`` for a file that exists.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import yaml

from pgrealtime.catalog.model import Catalog
from pgrealtime.changes import TableName
from pgrealtime.cli.init.drafts import draft_config
from pgrealtime.cli.init.model import CollectionDraft, ConfigDraft, SchemaSurvey
from pgrealtime.cli.init.render import render_collection, render_relation
from pgrealtime.collections.names import candidate_tables
from pgrealtime.config.sources import parse_yaml
from pgrealtime.errors import SetupError

_COMMENTED_TABLE = re.compile(r"^ *# *table: *(\S.*?) *$", re.MULTILINE)
"""The table of a collection that is commented out, by ``init`` or by hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExistingConfig:
    """A configuration file, as far as ``init`` has to know it."""

    path: str
    text: str
    schemas: tuple[str, ...]
    tables: Mapping[str, str]
    """Collection -> the text that names its table."""
    commented_tables: tuple[str, ...]
    """Texts that name tables, of collections that are commented out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """What a file gets."""

    text: str
    """Of the whole file."""
    names: Mapping[str, str]
    """Collections that it gets -> why one is commented out, or empty."""
    relations: tuple[tuple[str, str], ...]
    """Collections that it has, with a relation by a junction table that it doesn't name."""


def parse_existing(path: str, text: str) -> ExistingConfig:
    """Return what a file has; variables needn't be set.

    Raises:
        SetupError: Code ``file_not_extended``: it isn't a configuration.
    """
    document = parse_yaml(text)
    value = document.value
    sections = value if isinstance(value, dict) else {}
    collections, database = (sections.get(k) or {} for k in ("collections", "database"))
    is_config = isinstance(value, dict) and all(
        isinstance(section, dict) for section in (collections, database)
    )
    if document.problems or not is_config:
        first = document.problems[0].message if document.problems else "not a configuration"
        raise _refusal(path, f"It is {first}.", "Mend it, or name another file with --config.")
    schemas = database.get("schemas") or ("public",)
    return ExistingConfig(
        path=path,
        text=text,
        schemas=(schemas,) if isinstance(schemas, str) else tuple(map(str, schemas)),
        tables={
            name: _unescape(str(one.get("table")))
            for name, one in collections.items()
            if isinstance(one, dict)
        },
        commented_tables=tuple(map(_commented_value, _COMMENTED_TABLE.findall(text))),
    )


def extend_config(existing: ExistingConfig, survey: SchemaSurvey) -> Addition:
    """Return the file with the tables that it doesn't name.

    Raises:
        SetupError: Code ``file_not_extended``: its collections aren't written in lines.
    """
    names = dict(_named_tables(existing, survey.catalog))
    draft = draft_config(survey, names)
    commented = {
        table for text in existing.commented_tables for table in _tables_of(text, existing)
    }
    added = [
        one
        for one in draft.drafts
        if one.table.name not in names and one.table.name not in commented
    ]
    block = _CollectionsBlock.find(existing) if added else None
    return Addition(
        text=block.insert(added, survey) if block else existing.text,
        names={one.name: "; ".join(fault.reason for fault in one.faults) for one in added},
        relations=tuple(_missing_relations(draft, names, existing.text)),
    )


def _tables_of(text: str, existing: ExistingConfig) -> tuple[TableName, ...]:
    return candidate_tables(text, existing.schemas)


def _named_tables(existing: ExistingConfig, catalog: Catalog) -> Iterator[tuple[TableName, str]]:
    """Yield the tables of the file's collections, each with its collection."""
    for name, text in existing.tables.items():
        found = [table for table in _tables_of(text, existing) if table in catalog.tables]
        if found:
            yield found[0], name


def _missing_relations(
    draft: ConfigDraft, names: Mapping[TableName, str], text: str
) -> Iterator[tuple[str, str]]:
    for one in draft.drafts:
        for name, relation in one.config.relations.items():
            through = relation.through
            if one.table.name in names and through and through.rpartition(".")[2] not in text:
                yield one.name, render_relation(name, relation)


def _commented_value(text: str) -> str:
    try:
        return _unescape(str(yaml.safe_load(text)))
    except yaml.YAMLError:
        return ""


def _unescape(text: str) -> str:
    return text.replace("$${", "${")


def _refusal(path: str, detail: str, hint: str) -> SetupError:
    return SetupError(
        f'tables can\'t be added to "{path}"', detail=detail, hint=hint, code="file_not_extended"
    )


# -- where the text goes


@dataclass(frozen=True, slots=True)
class _CollectionsBlock:
    """The lines of the file, and where in them further collections belong."""

    lines: list[str]
    position: int
    """Index of the line before which they go."""
    indent: int
    key_line: int | None = None
    """Of the key, if it has no collection yet."""

    @classmethod
    def find(cls, existing: ExistingConfig) -> "_CollectionsBlock":
        lines = existing.text.splitlines()
        node = yaml.compose(existing.text, Loader=yaml.SafeLoader)
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        for key, value in entries:
            if key.value != "collections":
                continue
            is_empty = not value.value
            if isinstance(value, yaml.MappingNode) and value.flow_style and not is_empty:
                hint = "Write each collection in lines of its own."
                raise _refusal(existing.path, "Its collections are in braces.", hint)
            first = key.start_mark.line
            if is_empty:
                return cls(lines, _end_of_block(lines, first + 1), 2, key_line=first)
            last = max(mark.line for mark in _end_marks(value))
            indent = value.value[0][0].start_mark.column
            return cls(lines, _end_of_block(lines, last + 1), indent)
        if "#collections:" in lines:
            first = lines.index("#collections:")
            return cls(lines, _end_of_block(lines, first + 1), 2, key_line=first)
        return cls([*lines, "", "#collections:"], len(lines) + 2, 2, key_line=len(lines) + 1)

    def insert(self, drafts: list[CollectionDraft], survey: SchemaSurvey) -> str:
        """Return the text of the file with the collections."""
        before, after = self.lines[: self.position], self.lines[self.position :]
        # If all that follows is commented out, the key would be null.
        if self.key_line is not None and any(not draft.faults for draft in drafts):
            before[self.key_line] = "collections:"
        for draft in drafts:
            is_first = self.key_line == len(before) - 1
            before += [*([] if is_first else [""]), *render_collection(draft, survey, self.indent)]
        return "\n".join([*before, *after]) + "\n"


def _end_marks(node: yaml.Node) -> Iterator[yaml.Mark]:
    """Yield where each scalar ends: a block's own end is after the comments that follow it."""
    match node:
        case yaml.MappingNode() | yaml.SequenceNode() if node.flow_style:
            yield node.end_mark
        case yaml.MappingNode():
            for key, value in node.value:
                yield from _end_marks(key)
                yield from _end_marks(value)
        case yaml.SequenceNode():
            for item in node.value:
                yield from _end_marks(item)
        case yaml.ScalarNode():
            # A block scalar ends where the next line begins.
            yield node.start_mark if node.style in ("|", ">") else node.end_mark
        case _:
            yield node.end_mark


def _end_of_block(lines: list[str], start: int) -> int:
    """Return the index behind the indented lines and comments that go on at ``start``."""
    end = start
    for n in range(start, len(lines)):
        if lines[n].strip() and not lines[n].startswith(" "):
            break
        if lines[n].strip():
            end = n + 1
    return end
