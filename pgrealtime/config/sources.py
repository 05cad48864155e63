"""Reads YAML with the lines of its keys, ``${VAR}``, and overrides of the environment.

Pure; called by ``load``, which gives the values their meaning.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

from pgrealtime.errors import ConfigProblem

KeyPath: TypeAlias = tuple[str | int, ...]
"""Keys and list indexes from the top of the document, outermost first."""

_VARIABLE = re.compile(
    r"""
    \$(?P<escaped>\$\{) |
    \$\{
      (?P<name>[A-Za-z_][A-Za-z0-9_]*)
      (?: :(?P<operator>[-?]) (?P<operand>[^}]*) )?
    \} |
    (?P<broken>\$\{)
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A YAML document as plain values, with the lines of its keys."""

    value: object
    lines: Mapping[KeyPath, int]
    """1-based line of each key and list item."""
    problems: tuple[ConfigProblem, ...] = ()


def dotted_path(path: Iterable[str | int]) -> str:
    """Return ``collections.posts.list_rule``; the whole document is ``(document)``."""
    return ".".join(map(str, path)) or "(document)"


_UNQUOTED_VALUE = re.compile(r"found character '[^\\]'|found '<scalar>'")
"""PyYAML's message for a value that begins with an indicator: ``@request.auth.id``, ``"a" = b``."""
_QUOTES_HINT = "put the whole value in quotes, as in '@request.auth.id != \"\"'"


def parse_yaml(text: str) -> Document:
    """Return the document; if the text isn't YAML, an empty one with a problem."""
    try:
        reader = _NodeReader(yaml.SafeLoader(text))
        node = reader.loader.get_single_node()
        value = {} if node is None else reader.read_node(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = None if mark is None else mark.line + 1
        reason = str(error.problem or error.context)
        hint = _QUOTES_HINT if _UNQUOTED_VALUE.search(reason) else ""
        problem = ConfigProblem("(document)", f"not YAML: {reason}", hint, line)
    except yaml.YAMLError:
        problem = ConfigProblem("(document)", "not YAML: it has characters that YAML doesn't allow")
    except RecursionError:
        problem = ConfigProblem("(document)", "nested too deeply, or a part of itself")
    except ValueError as error:
        # PyYAML parses what looks like a date: 2024-13-01.
        problem = ConfigProblem("(document)", f"not YAML: {error}")
    else:
        return Document(value=value, lines=reader.lines, problems=tuple(reader.problems))
    return Document(value={}, lines={}, problems=(problem,))


@dataclass(slots=True)
class _NodeReader:
    """Converts nodes to values; PyYAML itself keeps neither lines nor repeated keys."""

    loader: yaml.SafeLoader
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[ConfigProblem] = field(default_factory=list)

    def read_node(self, node: yaml.Node, path: KeyPath) -> object:
        self.lines.setdefault(path, node.start_mark.line + 1)
        match node:
            case yaml.MappingNode():
                return self._mapping(node, path)
            case yaml.SequenceNode():
                return [self.read_node(item, (*path, n)) for n, item in enumerate(node.value)]
            case _:
                return self.loader.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        self._report_repeated(node, path)
        self.loader.flatten_mapping(node)  # resolves "<<"; what it merges in stands first
        entries: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = str(self.loader.construct_object(key_node, deep=True))
            self.lines[(*path, key)] = key_node.start_mark.line + 1
            entries[key] = self.read_node(value_node, (*path, key))
        return entries

    def _report_repeated(self, node: yaml.MappingNode, path: KeyPath) -> None:
        first: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in first:
                message = f"given twice, first in line {first[key]}"
                self.problems.append(ConfigProblem(dotted_path((*path, key)), message, line=line))
            first.setdefault(key, line)


@dataclass(slots=True)
class VariableSubstitution:
    """Fills ``${VAR}``, ``${VAR:-default}`` and ``${VAR:?message}`` into values, not into keys.

    As in a shell, ``:-`` and ``:?`` treat an empty variable like an unset one. A plain ``${VAR}``
    must be set, because an empty rule would open a collection to everyone. ``$${`` stands for
    ``${``.
    """

    environ: Mapping[str, str]
    problems: list[tuple[KeyPath, str]] = field(default_factory=list)

    def __call__(self, value: object, path: KeyPath = ()) -> object:
        """Return the value with the variables of every text in it substituted."""
        match value:
            case str():
                return _VARIABLE.sub(lambda match: self._replace(match, path), value)
            case dict():
                return {key: self(inner, (*path, key)) for key, inner in value.items()}
            case list():
                return [self(inner, (*path, n)) for n, inner in enumerate(value)]
            case _:
                return value

    def _replace(self, match: re.Match[str], path: KeyPath) -> str:
        if match["escaped"]:
            return match["escaped"]
        if match["broken"]:
            self.problems.append((path, 'a "${" that isn\'t ${VAR}; write "$${" for the text'))
            return match[0]
        name, operator, operand = match["name"], match["operator"], match["operand"]
        current = self.environ.get(name)
        if operator == "-":
            return current or operand
        if current is None or (operator == "?" and not current):
            self.problems.append((path, operand or f"environment variable {name} is not set"))
            return match[0]
        return current


@dataclass(frozen=True, slots=True)
class Override:
    """An environment variable that replaces a value of the file."""

    variable: str
    path: KeyPath
    text: str


_VARIABLE_PREFIX = "PGREALTIME_"
_PLATFORM_VARIABLES: Mapping[str, KeyPath] = {
    "DATABASE_URL": ("database", "url"),
    "PORT": ("server", "port"),
}


def environment_overrides(environ: Mapping[str, str]) -> tuple[Override, ...]:
    """Return the overrides of the environment; later ones win.

    Platforms set ``DATABASE_URL`` and ``PORT``; empty they count as unset. The program's own are
    named ``PGREALTIME_SERVER__PORT`` for ``server.port``; names without a double underscore, such
    as ``PGREALTIME_CONFIG``, aren't keys of the configuration.
    """
    platform = [
        Override(name, path, environ[name])
        for name, path in _PLATFORM_VARIABLES.items()
        if environ.get(name)
    ]
    own = [
        Override(name, _path_of_variable(name), text)
        for name, text in sorted(environ.items())
        if name.startswith(_VARIABLE_PREFIX) and "__" in name
    ]
    return (*platform, *own)


def _path_of_variable(variable: str) -> KeyPath:
    parts = variable.removeprefix(_VARIABLE_PREFIX).lower().split("__")
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def apply_override(
    tree: dict[str, object], override: Override, parse_text: Callable[[KeyPath, str], object]
) -> KeyPath:
    """Set one override in the tree and return the path with the tree's own spelling.

    Keys are found whatever their case, because variables are upper case. ``KEY`` and ``KEY_file``
    set the same thing, so that either replaces the other. ``parse_text`` returns the value of a
    text at a path.

    Raises:
        LookupError: The path leads through a text, or to a list's item that isn't there.
    """
    node: object = tree
    path: KeyPath = ()
    *outer, last = override.path
    for part in outer:
        key = _existing_key(node, part)
        node = _child_node(node, key)
        path = (*path, key)
    key = _existing_key(node, last)
    path = (*path, key)
    match node, key:
        case dict(), str():
            node.pop(f"{key}_file", None)
            node.pop(key.removesuffix("_file"), None)
            node[key] = parse_text(path, override.text)
        case list(), int() if key < len(node):
            node[key] = parse_text(path, override.text)
        case _:
            raise LookupError(override.variable)
    return path


def _existing_key(node: object, part: str | int) -> str | int:
    if isinstance(node, dict):
        return next((key for key in node if key.casefold() == str(part)), str(part))
    return part


def _child_node(node: object, key: str | int) -> object:
    match node, key:
        case dict(), str():
            if node.get(key) is None:
                node[key] = {}
            return node[key]
        case list(), int() if key < len(node):
            return node[key]
        case _:
            return None
