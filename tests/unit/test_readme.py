"""What the README and the pages of ``docs`` point to is there, and what they show is valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pgrealtime.cli.main import main
from tests.config_values import parse_config
from tests.readme import PAGES, README, ROOT, TEXT

_MAX_LINES = 260
"""A stranger's questions. What only few need is in ``docs``, ``explain-error`` and the annotated
configuration."""


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", text)
    targets = [(page.parent / link.partition("#")[0], link.partition("#")[2]) for link in links]

    assert [path for path, _ in targets if not path.exists()] == []
    assert [(path, anchor) for path, anchor in targets if anchor not in {"", *_anchors(path)}] == []


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    if page.suffix != ".md":
        return set()
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_readme_leads_to_every_page() -> None:
    assert [page.name for page in PAGES[1:] if f"](pgrealtime/docs/{page.name}" not in README] == []


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= _MAX_LINES


def test_the_configuration_it_shows_is_one() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    text = re.sub(r"^ {3}", "", shown, flags=re.MULTILINE)
    environ = {"DATABASE_URL": "postgresql://127.0.0.1/app", "APP_JWT_SECRET": "x" * 32}

    assert set(parse_config(yaml.safe_load(text), environ).collections) == {"users", "posts"}


def test_every_command_that_is_named_exists() -> None:
    named = set(re.findall(r"(?:^ *|`|\$\()pgrealtime ([a-z][a-z-]+)", TEXT, re.MULTILINE))

    assert len(named) > 8
    assert named - set(main.list_commands(None)) == set()  # type: ignore[arg-type]


def test_every_proof_of_a_promise_is_a_test() -> None:
    text = (ROOT / "pgrealtime" / "docs" / "promises.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]

    assert len(rows) > 15
    assert [row for row in rows if "](../../tests/" not in row] == []
