"""Which operation the demo's writer runs next, without a database."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from random import Random
from typing import Any

from pgrealtime.demo.application import STATEMENTS
from pgrealtime.demo.writer import TASK_TITLES, new_task_title, next_operation


def _rows() -> dict[str, Any]:
    return {
        "projects": [{"id": "1"}, {"id": "2"}, {"id": "77"}],
        "members": [{"project": "1", "user": "ann"}],
        "tasks": [],
    }


def _do(rows: dict[str, Any], name: str, values: Mapping[str, object], new_id: str) -> None:
    """Apply an operation to the rows as its statement does to the tables."""
    tasks = rows["tasks"]
    match name:
        case "add":
            tasks.append({"id": new_id, "project": values["id"], "title": values["title"]})
            tasks[-1] |= {"done": False, "assignee": None}
        case "drop":
            tasks[:] = [task for task in tasks if task["id"] != values["id"]]
        case "finish" | "assign":
            [task] = [task for task in tasks if task["id"] == values["id"]]
            task |= {"done": values["done"]} if "done" in values else {"assignee": values["user"]}
        case other:
            raise AssertionError(other)


def test_it_can_go_on_for_ever_without_filling_the_page() -> None:
    rows, random = _rows(), Random(7)
    done = set()
    for number in count(1):
        name, values = next_operation(rows, random)
        assert name in STATEMENTS
        done.add(name)
        _do(rows, name, values, str(number))
        for project in rows["projects"]:
            assert sum(task["project"] == project["id"] for task in rows["tasks"]) <= 5
        if number == 3000:
            break
    assert done == {"add", "drop", "finish", "assign"}


def test_it_never_does_what_the_page_s_buttons_do() -> None:
    """The operations of the page's buttons are left to its user."""
    rows, random = _rows(), Random(1)
    for number in range(500):
        name, values = next_operation(rows, random)
        assert name not in ("publish", "join", "leave")
        if name == "assign":
            assert values["user"] == "ann"
        _do(rows, name, values, str(number))


def test_a_title_is_not_given_twice_while_there_are_others() -> None:
    rows, random = _rows(), Random(3)
    for title in TASK_TITLES["1"][1:]:
        rows["tasks"].append({"id": title, "project": "1", "title": title})
    assert new_task_title(rows, "1", random) == TASK_TITLES["1"][0]
    rows["tasks"].append({"id": "x", "project": "1", "title": TASK_TITLES["1"][0]})
    assert new_task_title(rows, "1", random) in TASK_TITLES["1"]
    assert new_task_title(rows, "no such project", random)
