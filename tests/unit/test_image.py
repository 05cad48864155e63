"""The container image, as far as it can be judged without an engine to build it."""

from __future__ import annotations

import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from pgrealtime.cli.main import main
from pgrealtime.config.model import ServerConfig

_ROOT = Path(__file__).parents[2]


class Instruction(NamedTuple):
    """One instruction of the Dockerfile, continuation lines joined."""

    name: str
    arguments: str


def _stages() -> list[list[Instruction]]:
    text = re.sub(r"^\s*#.*\n", "", (_ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    stages: list[list[Instruction]] = [[]]
    for line in filter(None, map(str.strip, text.replace("\\\n", " ").splitlines())):
        name, _, arguments = line.partition(" ")
        if name == "FROM":
            stages.append([])
        stages[-1].append(Instruction(name, " ".join(arguments.split())))
    return stages[1:]


BUILD, FINAL = _stages()


def _arguments(stage: list[Instruction], name: str) -> list[str]:
    return [found.arguments for found in stage if found.name == name]


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    return project


def _is_in_context(path: str) -> bool:
    """Whether .dockerignore lets the path into the build: the last pattern that fits decides."""
    verdict = True
    for line in (_ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        is_kept = pattern.startswith("!")
        pattern = pattern.removeprefix("!").removeprefix("**/")
        parts = Path(path).parts
        prefixes = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if any(fnmatch(prefix, pattern) for prefix in prefixes):
            verdict = is_kept
    return verdict


def test_everything_that_is_copied_exists_and_is_in_the_build_context() -> None:
    sources = [path for line in _arguments(BUILD, "COPY") for path in line.split()[:-1]]
    assert "pgrealtime" in sources
    assert [path for path in sources if not (_ROOT / path).exists()] == []
    assert [path for path in sources if not _is_in_context(path)] == []


@pytest.mark.parametrize(
    "path", [".git/config", ".venv/bin/python", "tests/conftest.py", "pgrealtime.yaml", ".env"]
)
def test_nothing_else_is_in_the_build_context(path: str) -> None:
    """A configuration with secrets beside the Dockerfile gets into no layer."""
    assert not _is_in_context(path)


def test_the_wheel_needs_nothing_that_was_not_copied() -> None:
    """Its metadata names files too: a missing licence breaks the build."""
    copied = {path for line in _arguments(BUILD, "COPY") for path in line.split()[:-1]}
    project = _project()
    assert {project["readme"], "pyproject.toml"} <= copied
    assert set(project["license-files"]) <= copied


def test_the_image_holds_the_environment_and_nothing_of_the_build() -> None:
    assert _arguments(FINAL, "COPY") == ["--from=build /opt/pgrealtime /opt/pgrealtime"]
    assert _arguments(FINAL, "RUN") == []
    assert _arguments(BUILD, "FROM") == [f"{_arguments(FINAL, 'FROM')[0]} AS build"]


def test_it_runs_as_nobody_in_particular() -> None:
    """A number: Kubernetes can't tell of a name whether it is root."""
    user = _arguments(FINAL, "USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_signals_reach_the_process() -> None:
    """The exec form: a shell in between would keep SIGTERM to itself, and no drain would happen."""
    [entrypoint], [command] = _arguments(FINAL, "ENTRYPOINT"), _arguments(FINAL, "CMD")
    assert json.loads(entrypoint) == ["pgrealtime"]
    assert list(_project()["scripts"]) == ["pgrealtime"]
    assert json.loads(command)[0] in main.list_commands(click.Context(main))


def test_the_port_is_the_one_that_is_served() -> None:
    assert _arguments(FINAL, "EXPOSE") == [str(ServerConfig().port)]


def test_the_python_is_one_that_the_package_names() -> None:
    default = re.search(r"^ARG PYTHON=(\S+)$", (_ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert default is not None
    assert f"Programming Language :: Python :: {default[1]}" in _project()["classifiers"]


def test_a_health_check_asks_a_command_that_exists() -> None:
    """The image has no curl."""
    (check,) = _arguments(FINAL, "HEALTHCHECK")
    command = json.loads(check[check.index("[") :])
    assert command[0] == "pgrealtime"
    assert command[1] in main.list_commands(click.Context(main))


def test_what_the_wheel_includes_is_copied() -> None:
    """The build in the image fails otherwise."""
    copied = {path for line in _arguments(BUILD, "COPY") for path in line.split()[:-1]}
    wheel = tomllib.loads((_ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = wheel["targets"]["wheel"]["force-include"]
    assert included
    for path in included:
        assert path in copied or path.split("/")[0] in copied


def test_no_secret_is_built_in() -> None:
    everything = [line.arguments for stage in (BUILD, FINAL) for line in stage]
    assert [line for line in everything if re.search(r"(?i)password|secret|token", line)] == []


def test_the_systems_roots_are_where_the_driver_is_told_to_look() -> None:
    """sslrootcert=system is what libpq itself suggests, and the wheel's OpenSSL finds none."""
    (variables,) = _arguments(FINAL, "ENV")
    assert "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt" in variables.split()
    readme = (_ROOT / "README.md").read_text(encoding="utf-8")
    assert "`SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt`" in readme
