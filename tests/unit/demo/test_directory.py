"""Which directories a start of the demo removes, and which it leaves alone."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from pgrealtime.demo.directory import (
    PREFIX,
    remove_directory,
    remove_stale_directories,
    server_directory,
)
from pgrealtime.demo.os_account import clean_environment


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_there_while_it_is_used_and_gone_afterwards(parent: Path) -> None:
    with server_directory(None) as folder:
        assert folder.parent == parent
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "data").mkdir()
        (folder / "data" / "file").write_text("x")
    assert list(parent.iterdir()) == []


def test_a_folder_in_use_is_left_alone(parent: Path) -> None:
    """Two demos can run side by side."""
    with server_directory(None) as first, server_directory(None) as second:
        assert sorted(parent.iterdir()) == sorted([first, second])


def test_what_was_left_behind_goes_whatever_is_missing_of_it(parent: Path) -> None:
    (parent / f"{PREFIX}empty").mkdir()
    (parent / f"{PREFIX}half" / "data").mkdir(parents=True)
    (parent / f"{PREFIX}half" / "data" / "postmaster.pid").write_text("no number\n")
    (parent / f"{PREFIX}whole" / "data" / "base").mkdir(parents=True)
    with server_directory(None) as folder:
        assert list(parent.iterdir()) == [folder]


def test_what_is_not_ours_stays(parent: Path) -> None:
    """Another user's directory, a link that leads elsewhere, any other name."""
    elsewhere = parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    (parent / f"{PREFIX}link").symlink_to(elsewhere)
    (parent / f"{PREFIX}theirs").mkdir()
    (parent / f"{PREFIX}file").write_text("x")
    before = sorted(parent.rglob("*"))
    remove_stale_directories(parent, owners={os.geteuid() + 1})
    assert sorted(parent.rglob("*")) == before
    remove_stale_directories(parent, owners={os.geteuid()})
    assert sorted(set(before) - set(parent.rglob("*"))) == [parent / f"{PREFIX}theirs"]


def test_a_process_that_only_got_the_server_s_number_is_not_ended(parent: Path) -> None:
    """The pid in postmaster.pid may belong to another process by now: here to the test."""
    left = parent / f"{PREFIX}old"
    (left / "data").mkdir(parents=True)
    (left / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n")
    remove_directory(left)
    assert not left.exists()


def test_the_server_gets_no_other_database_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGDATA", "PGHOST", "PGOPTIONS"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("PGREALTIME_TEST", "kept")
    assert {name for name in clean_environment() if name.startswith("PG")} >= {"PGREALTIME_TEST"}
    assert not {"PGDATA", "PGHOST", "PGOPTIONS"} & set(clean_environment())
