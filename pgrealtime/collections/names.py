"""Checks the names of configured collections, and returns the tables that they may refer to.

Needs no catalogue; ``check --no-database`` runs this part alone.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from pgrealtime.changes import TableName
from pgrealtime.collections.model import derive_collection_id
from pgrealtime.config.model import CollectionConfig, RelationConfig
from pgrealtime.errors import ConfigProblem
from pgrealtime.spelling import did_you_mean

_NAME_PATTERN = re.compile(r"[A-Za-z0-9_]+")
_TABLE_NAME_PATTERN = re.compile(r'(?:("(?:[^"]|"")+"|[^".]+)\.)?("(?:[^"]|"")+"|[^".]+)')


def configured_table_names(
    configured: Mapping[str, CollectionConfig], schemas: Iterable[str]
) -> tuple[TableName, ...]:
    """Return every table that the configuration may mean: those to read from the catalogue."""
    texts = [config.table for config in configured.values()]
    relations = (r for config in configured.values() for r in config.relations.values())
    texts += [relation.through for relation in relations if relation.through]
    schemas = tuple(schemas)
    names = (name for text in texts for name in candidate_tables(text, schemas))
    return tuple(dict.fromkeys(names))


def candidate_tables(text: str, schemas: Iterable[str]) -> tuple[TableName, ...]:
    """Return the tables that a text may name; none if it isn't a table's name.

    Args:
        text: ``schema.table`` or ``table``, case sensitive, with or without SQL's double quotes.
        schemas: To search for a name without schema, in order.
    """
    match = _TABLE_NAME_PATTERN.fullmatch(text)
    if match is None:
        return ()
    name = _unquote(match[2])
    if match[1] is not None:
        return (TableName(_unquote(match[1]), name),)
    return tuple(TableName(schema, name) for schema in schemas)


def _unquote(part: str) -> str:
    return part[1:-1].replace('""', '"') if part.startswith('"') else part


def is_table_name(text: str) -> bool:
    """Whether the text can name a table."""
    return _TABLE_NAME_PATTERN.fullmatch(text) is not None


def collection_id_of(name: str, config: CollectionConfig) -> str:
    """Return the configured id, or else the one that PocketBase would derive."""
    return config.collection_id or derive_collection_id(config.type, name)


def name_problem(name: str) -> str | None:
    """Return why rules, topics or records can't contain the name; None if they can."""
    if not _NAME_PATTERN.fullmatch(name):
        return "names are made of letters, digits and underscores"
    if "_via_" in name.lower():
        return 'rules use "_via_" for back relations'
    return None


def check_names(configured: Mapping[str, CollectionConfig]) -> Iterator[ConfigProblem]:
    """Yield the problems that the configured collections have whatever the database contains."""
    ids = Counter(collection_id_of(name, config) for name, config in configured.items())
    for name, config in configured.items():
        path = f"collections.{name}"
        collection_id = collection_id_of(name, config)
        if (reason := name_problem(name)) is not None:
            yield ConfigProblem(path, f'a collection can\'t be named "{name}": {reason}')
        if ids[collection_id] > 1 or collection_id in configured:
            yield ConfigProblem(f"{path}.collection_id", "another collection has this id or name")
        if not is_table_name(config.table):
            yield ConfigProblem(f"{path}.table", "not a table's name: write it as schema.table")
        for field_name, relation in config.relations.items():
            yield from _check_relation(f"{path}.relations.{field_name}", relation, configured)


def _check_relation(
    path: str, relation: RelationConfig, configured: Mapping[str, CollectionConfig]
) -> Iterator[ConfigProblem]:
    name = relation.collection
    if name not in configured:
        hint = did_you_mean(name, configured)
        yield ConfigProblem(f"{path}.collection", f'there is no collection "{name}"', hint)
    if not relation.through and (relation.source or relation.target):
        message = "source and target are columns of a junction table"
        yield ConfigProblem(path, message, "set through too")
