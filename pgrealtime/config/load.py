"""The configuration: one frozen model, read once, checked whole before anything opens."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args, get_origin

import yaml
from pydantic import (
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pgrealtime.config.model import Config, SecretMarker, Section
from pgrealtime.config.sources import (
    Document,
    KeyPath,
    Override,
    VariableSubstitution,
    apply_override,
    dotted_path,
    environment_overrides,
    parse_yaml,
)
from pgrealtime.errors import ConfigError, ConfigProblem
from pgrealtime.spelling import did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigLocations:
    """Where a configuration's keys stand, for problems found by those who know the database."""

    source: str
    """The file's name as it was given."""
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    variables: Mapping[KeyPath, str] = field(default_factory=dict)
    """Environment variable that set the key, where one did."""

    def locate(self, error: ConfigError) -> ConfigError:
        """Return the error with file and lines; places that it already has are kept."""
        return ConfigError(
            tuple(self._locate_problem(problem) for problem in error.problems),
            source_name=self.source,
        )

    def _locate_problem(self, problem: ConfigProblem) -> ConfigProblem:
        if problem.line is not None:
            return problem
        found = self.problem_at(tuple(problem.path.split(".")), problem.message, problem.hint)
        return replace(found, marked_text=problem.marked_text)

    def problem_at(self, path: KeyPath, message: str, hint: str = "") -> ConfigProblem:
        """Return the problem at a path, with the line or the variable it came from."""
        variable = self.variables.get(path)
        if variable is not None:
            message = f"{message} (set by {variable})"
        line = None if variable is not None else self._line(path)
        return ConfigProblem(dotted_path(path), message, hint, line)

    def _line(self, path: KeyPath) -> int | None:
        by_text = {tuple(map(str, key)): line for key, line in self.lines.items()}
        texts = tuple(map(str, path))
        while texts and texts not in by_text:
            texts = texts[:-1]
        return by_text.get(texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedConfig:
    """What one file said: the problems, and the configuration as far as it could be made out."""

    config: Config | None
    """Without the keys that have problems, which then have their defaults. For further checks
    only, never to run with; None if nothing sensible is left."""
    locations: ConfigLocations
    problems: tuple[ConfigProblem, ...] = ()
    dropped_keys: frozenset[KeyPath] = frozenset()
    """What was left out of ``config``."""

    def require_valid(self) -> Config:
        """Return the configuration.

        Raises:
            ConfigError: With every problem that was found.
        """
        if self.problems or self.config is None:
            raise ConfigError(self.problems, source_name=self.locations.source)
        return self.config


def load_config(path: str | Path, environ: Mapping[str, str] = os.environ) -> Config:
    """Read one file and return the configuration.

    Raises:
        ConfigError: With every problem that was found.
    """
    return read_config(path, environ).require_valid()


def read_config(path: str | Path, environ: Mapping[str, str] = os.environ) -> ParsedConfig:
    """Read one file and return all that could be made of it.

    Raises:
        ConfigError: The file itself can't be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8"
        is_missing = isinstance(error, FileNotFoundError)
        hint = "pgrealtime init writes one, and --config names another" if is_missing else ""
        problem = ConfigProblem("(document)", f"can't read the file: {reason}", hint)
        raise ConfigError((problem,), source_name=str(path)) from error
    return _parse_document(parse_yaml(text), environ, _read_secret_file, str(path))


def parse_config(mapping: Mapping[str, object], environ: Mapping[str, str] | None = None) -> Config:
    """Return the configuration that plain values describe, as YAML would give them.

    Args:
        mapping: The document.
        environ: For ``${VAR}`` and overrides; none by default.

    Raises:
        ConfigError: With every problem that was found. ``KEY_file`` is one: this reads no file.
    """
    document = Document(value=dict(mapping), lines={})
    return _parse_document(
        document, environ or {}, _refuse_secret_file, "configuration"
    ).require_valid()


def _read_secret_file(name: str) -> str:
    return Path(name).read_text(encoding="utf-8").rstrip("\r\n")


def _refuse_secret_file(_name: str) -> str:
    raise OSError("files are not read here")


def _parse_document(
    document: Document,
    environ: Mapping[str, str],
    read_file: Callable[[str], str],
    source: str,
) -> ParsedConfig:
    """Fill in, override, read secrets, validate: in this order, gathering problems all along."""
    if not isinstance(document.value, dict):
        problem = ConfigProblem("(document)", "the document must be a mapping of sections", line=1)
        return ParsedConfig(
            config=None, locations=ConfigLocations(source=source), problems=(problem,)
        )
    fill_in = VariableSubstitution(environ)
    tree = fill_in(document.value)
    assert isinstance(tree, dict)
    found = list(fill_in.problems)
    variables = _apply_overrides(tree, environment_overrides(environ), found)
    _replace_secret_files(tree, (), read_file, found)
    origin = ConfigLocations(source=source, lines=document.lines, variables=variables)
    unusable = {path for path, _ in found}
    for path in unusable:
        _remove_key(tree, path)
    config, invalid, dropped = _validate(tree, unusable)
    problems = (
        *document.problems,
        *(origin.problem_at(path, message) for path, message in found),
        *(origin.problem_at(path, message, hint) for path, message, hint in invalid),
    )
    return ParsedConfig(
        config=config,
        locations=origin,
        problems=tuple(sorted(problems, key=_in_file_order)),
        dropped_keys=frozenset(dropped | unusable),
    )


def _in_file_order(problem: ConfigProblem) -> tuple[float, str]:
    return (problem.line or float("inf"), problem.path)


def _apply_overrides(
    tree: dict[str, object],
    overrides: tuple[Override, ...],
    problems: list[tuple[KeyPath, str]],
) -> dict[KeyPath, str]:
    variables: dict[KeyPath, str] = {}
    for override in overrides:
        try:
            path = apply_override(tree, override, _parse_override)
        except LookupError:
            problems.append((override.path, f"{override.variable} names no key"))
        except yaml.YAMLError:
            problems.append((override.path, f"{override.variable} isn't YAML"))
        else:
            variables[path] = override.variable
    return variables


def _parse_override(path: KeyPath, text: str) -> object:
    """Lists and mappings are written as YAML in a variable; everything else is its text."""
    is_structure = get_origin(_annotation_at(path)) in (tuple, dict)
    return yaml.safe_load(text) if is_structure and text[:1] in ("[", "{") else text


def _validate(
    tree: dict[str, object], reported_paths: set[KeyPath]
) -> tuple[Config | None, list[tuple[KeyPath, str, str]], set[KeyPath]]:
    """Return the configuration, what is wrong beyond the reported, and what had to be left out."""
    try:
        return Config.model_validate(tree), [], set()
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    invalid = [
        (detail["loc"], *_describe_invalid(detail["loc"], detail))
        for detail in details
        if not any(_overlaps(detail["loc"], known) for known in reported_paths)
    ]
    dropped = {_droppable_path(detail) for detail in details}
    remaining = deepcopy(tree)
    for path in dropped:
        _remove_key(remaining, path)
    try:
        return Config.model_validate(remaining), invalid, dropped
    except ValidationError:
        return None, invalid, dropped


def _overlaps(one: KeyPath, other: KeyPath) -> bool:
    """Whether one is the other or within it; what lacks a key is faulty for that key's fault."""
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]


def _droppable_path(detail: ErrorDetails) -> KeyPath:
    """Return the path of what can be left out to be rid of the problem; of lists, all."""
    path = detail["loc"][:-1] if detail["type"] == "missing" else detail["loc"]
    lists = (n for n, key in enumerate(path) if isinstance(key, int))
    return path[: next(lists, len(path))]


def _remove_key(tree: dict[str, object], path: KeyPath) -> None:
    place: object = tree
    for key in path[:-1]:
        place = place.get(str(key)) if isinstance(place, dict) else None
    if isinstance(place, dict) and path:
        place.pop(str(path[-1]), None)


def _describe_invalid(path: KeyPath, detail: ErrorDetails) -> tuple[str, str]:
    """Return message and hint; never the value, which may be a secret."""
    match detail["type"]:
        case "extra_forbidden":
            return f'unknown key "{path[-1]}"', did_you_mean(str(path[-1]), _keys_at(path[:-1]))
        case "missing":
            return "is required", ""
        case "model_type" | "model_attributes_type" | "dict_type":
            return "must be a mapping", ""
        case "tuple_type":
            return "must be a list", ""
        case "value_error":
            return detail["msg"].removeprefix("Value error, "), ""
        case _:
            message = detail["msg"]
            return message[:1].lower() + message[1:], ""


def _annotation_at(path: KeyPath) -> object:
    """Return the type of the key at a path, or None where there is none."""
    annotation: object = Config
    for key in path:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            info = annotation.model_fields.get(str(key))
            annotation = None if info is None else info.annotation
        elif get_origin(annotation) in (tuple, dict):
            annotation = get_args(annotation)[0 if get_origin(annotation) is tuple else 1]
        else:
            return None
    return annotation


def _keys_at(path: KeyPath) -> list[str]:
    annotation = _annotation_at(path)
    if not (isinstance(annotation, type) and issubclass(annotation, Section)):
        return []
    keys: list[str] = []
    for name, info in annotation.model_fields.items():
        keys += [name, f"{name}_file"] if _is_secret(info) else [name]
    return keys


def _is_secret(info: FieldInfo) -> bool:
    return any(isinstance(mark, SecretMarker) for mark in info.metadata)


def _replace_secret_files(
    tree: object,
    path: KeyPath,
    read_file: Callable[[str], str],
    problems: list[tuple[KeyPath, str]],
) -> None:
    """Put the content of each ``KEY_file`` under ``KEY``, through the whole tree."""
    match tree:
        case dict():
            for key in _keys_at(path):
                if key.endswith("_file") and key in tree:
                    _replace_secret_file(tree, (*path, key), read_file, problems)
            for key, inner in tree.items():
                _replace_secret_files(inner, (*path, key), read_file, problems)
        case list():
            for n, inner in enumerate(tree):
                _replace_secret_files(inner, (*path, n), read_file, problems)
        case _:
            pass


def _replace_secret_file(
    section: dict[str, object],
    path: KeyPath,
    read_file: Callable[[str], str],
    problems: list[tuple[KeyPath, str]],
) -> None:
    file_key = str(path[-1])
    key = file_key.removesuffix("_file")
    name = section.pop(file_key)
    if not name:
        return
    if section.get(key):
        problems.append((path, f'both "{key}" and "{file_key}" are given'))
        return
    section[key] = ""
    try:
        section[key] = read_file(str(name))
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "not UTF-8"
        problems.append((path, f"can't read the file: {reason}"))
