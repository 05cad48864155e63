"""The wheel that people install holds the whole package and only that."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this tree by its own build backend."""
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    [path] = folder.glob("*.whl")
    return path


def test_it_holds_every_module_and_no_test(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = _ROOT / "pgrealtime"
    modules = {str(path.relative_to(_ROOT)) for path in package.rglob("*.py")}
    assert modules <= names
    assert "pgrealtime/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"pgrealtime"}


def test_its_command_starts_from_an_archive_alone(wheel: Path, tmp_path: Path) -> None:
    """Nothing that works here depends on the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    ran = _run_from(tmp_path)
    assert ran.stdout.startswith(str(tmp_path)), ran.stderr
    assert "run" in ran.stdout + ran.stderr


def test_what_an_operator_reads_and_runs_is_installed_too(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    folder = Path(_run_from(tmp_path, "files").stdout.splitlines()[-1])
    assert folder.is_relative_to(tmp_path)
    for name in ("sql/roles.sql", "sql/tables.sql", "config/pgrealtime.yaml"):
        assert (folder / name).read_bytes() == (_ROOT / name).read_bytes()


def test_in_a_checkout_they_are_those_of_the_repository() -> None:
    assert _run_from(_ROOT, "files").stdout.splitlines()[-1] == str(_ROOT)


def _run_from(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            "import pgrealtime.cli.main as c; print(c.__file__); c.main()",
            *arguments,
        ],
        env={"PYTHONPATH": str(folder), "PATH": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
