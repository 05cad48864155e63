"""Reads, merges and validates the configuration, and reports all problems at once."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_origin

import yaml

from pgrealtime.config import sources
from pgrealtime.config.model import Config
from pgrealtime.config.sources import Document, KeyPath
from pgrealtime.config.validate import annotation_at, keys_at, remove_key, validate_tree
from pgrealtime.errors import ConfigError, ConfigProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigLocations:
    """Where each key was set: line of the file, or environment variable.

    Later checks, of tables and rules, report problems by path; this adds the place.
    """

    source: str
    """The file's name as given."""
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    variables: Mapping[KeyPath, str] = field(default_factory=dict)
    """Environment variable that set the key."""

    def locate(self, error: ConfigError) -> ConfigError:
        """Return the error with file and lines; lines that it has are kept."""
        return ConfigError(
            tuple(self._locate_problem(problem) for problem in error.problems),
            source_name=self.source,
        )

    def _locate_problem(self, problem: ConfigProblem) -> ConfigProblem:
        if problem.line is not None:
            return problem
        located = self.problem_at(tuple(problem.path.split(".")), problem.message, problem.hint)
        return replace(located, marked_text=problem.marked_text)

    def problem_at(self, path: KeyPath, message: str, hint: str = "") -> ConfigProblem:
        """Return a problem at a path, with its line or its variable."""
        variable = self.variables.get(path)
        if variable is not None:
            message = f"{message} (set by {variable})"
        line = None if variable is not None else self._line(path)
        return ConfigProblem(sources.dotted_path(path), message, hint, line)

    def _line(self, path: KeyPath) -> int | None:
        by_text = {tuple(map(str, key)): line for key, line in self.lines.items()}
        texts = tuple(map(str, path))
        while texts and texts not in by_text:
            texts = texts[:-1]
        return by_text.get(texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedConfig:
    """The result of reading a file: its problems, and the configuration as far as it is valid."""

    config: Config | None
    """Invalid keys have their defaults: for further checks only, never to run with. None if what is
    left isn't valid either."""
    locations: ConfigLocations
    problems: tuple[ConfigProblem, ...] = ()
    dropped_keys: frozenset[KeyPath] = frozenset()
    """Keys that were invalid, and left out of ``config``."""

    def require_valid(self) -> Config:
        """Return the configuration; raises ``ConfigError`` with every problem that was found."""
        if self.problems or self.config is None:
            raise ConfigError(self.problems, source_name=self.locations.source)
        return self.config


def load_config(path: str | Path, environ: Mapping[str, str] = os.environ) -> Config:
    """Read one file and return the configuration; raises ``ConfigError`` with every problem."""
    return read_config(path, environ).require_valid()


def read_config(path: str | Path, environ: Mapping[str, str] = os.environ) -> ParsedConfig:
    """Return the configuration of a file with its problems; raises only if it can't be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8"
        is_missing = isinstance(error, FileNotFoundError)
        hint = "pgrealtime init writes one, and --config names another" if is_missing else ""
        problem = ConfigProblem("(document)", f"can't read the file: {reason}", hint)
        raise ConfigError((problem,), source_name=str(path)) from error
    return _parse_document(sources.parse_yaml(text), environ, _read_secret_file, str(path))


def _parse_document(
    document: Document, environ: Mapping[str, str], read_file: Callable[[str], str], source: str
) -> ParsedConfig:
    """Substitute variables, override, read secret files, validate; collect all problems."""
    if not isinstance(document.value, dict):
        problem = ConfigProblem("(document)", "the document must be a mapping of sections", line=1)
        locations = ConfigLocations(source=source)
        return ParsedConfig(config=None, locations=locations, problems=(problem,))
    fill_in = sources.VariableSubstitution(environ)
    tree = fill_in(document.value)
    assert isinstance(tree, dict)
    document_problems = list(fill_in.problems)
    variables = _apply_overrides(tree, environ, document_problems)
    _replace_secret_files(tree, (), read_file, document_problems)
    origin = ConfigLocations(source=source, lines=document.lines, variables=variables)
    unusable = {path for path, _ in document_problems}
    for path in unusable:
        remove_key(tree, path)
    config, invalid, dropped = validate_tree(tree, unusable)
    problems = (
        *document.problems,
        *(origin.problem_at(path, message) for path, message in document_problems),
        *(origin.problem_at(path, message, hint) for path, message, hint in invalid),
    )
    return ParsedConfig(
        config=config,
        locations=origin,
        problems=in_file_order(problems),
        dropped_keys=frozenset(dropped | unusable),
    )


def in_file_order(problems: Iterable[ConfigProblem]) -> tuple[ConfigProblem, ...]:
    """Return the problems by line; those without a line are last."""
    return tuple(sorted(problems, key=lambda p: (p.line or float("inf"), p.path)))


def _apply_overrides(
    tree: dict[str, object], environ: Mapping[str, str], problems: list[tuple[KeyPath, str]]
) -> dict[KeyPath, str]:
    variables: dict[KeyPath, str] = {}
    for override in sources.environment_overrides(environ):
        try:
            path = sources.apply_override(tree, override, _parse_override)
        except LookupError:
            problems.append((override.path, f"{override.variable} names no key"))
        except yaml.YAMLError:
            problems.append((override.path, f"{override.variable} isn't YAML"))
        else:
            variables[path] = override.variable
    return variables


def _parse_override(path: KeyPath, text: str) -> object:
    """Return the value of a variable: lists and mappings are YAML, all else is text."""
    is_structure = get_origin(annotation_at(path)) in (tuple, dict)
    return yaml.safe_load(text) if is_structure and text[:1] in ("[", "{") else text


def _read_secret_file(name: str) -> str:
    return Path(name).read_text(encoding="utf-8").rstrip("\r\n")


def _replace_secret_files(
    tree: object,
    path: KeyPath,
    read_file: Callable[[str], str],
    problems: list[tuple[KeyPath, str]],
) -> None:
    """Replace each ``KEY_file`` in the tree at a path by ``KEY`` with the file's content."""
    if isinstance(tree, dict):
        for key in keys_at(path):
            if key.endswith("_file") and key in tree:
                _replace_secret_file(tree, (*path, key), read_file, problems)
        for key, inner in tree.items():
            _replace_secret_files(inner, (*path, key), read_file, problems)
    elif isinstance(tree, list):
        for n, inner in enumerate(tree):
            _replace_secret_files(inner, (*path, n), read_file, problems)


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
