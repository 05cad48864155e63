"""Writes to the demo's tables every second or two, so that the page has events to show."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from random import Random
from typing import Any, Final

import psycopg

from pgrealtime.demo.application import Application

_PAUSE_SECONDS = (1.1, 2.4)
_DEFER_SECONDS = 8.0
"""Pause after a button was pressed, so that the button's own events can be seen."""

_MIN_TASKS = 3
_MAX_TASKS = 5

_ADD_PROBABILITY = 0.25
_ASSIGN_PROBABILITY = 0.3
"""Otherwise a task is marked as done, or not done."""

TASK_TITLES: Final[Mapping[str, Sequence[str]]] = {
    "1": (
        "Hide 40 people behind one sofa",
        "Rehearse looking innocent",
        "Bake a cake shaped like a sled",
        "Bribe Bob's cat",
        "Practise whispering",
        "Tell Bob it's a dentist's appointment",
    ),
    "2": (
        "Label the salt. And the moon dust",
        "Order gravity, two boxes",
        "Find the lid of the tomato soup",
        "Ask Houston for pizza",
        "Water the potato",
        "Stop the noodles from floating off",
    ),
    "3": (
        "Measure it again, it looked short",
        "Keep the lettuce out of the wind",
        "Hire somebody tall for the middle",
        "Agree on what counts as bread",
        "Apologise to the bakery",
        "Slice the 4,000th tomato",
    ),
}
"""Titles of new tasks, by project."""


def next_operation(rows: Mapping[str, Any], random: Random) -> tuple[str, Mapping[str, object]]:
    """Return the next statement's name and values; each project stays at about four tasks."""
    project = random.choice(rows["projects"])["id"]
    tasks = [task for task in rows["tasks"] if task["project"] == project]
    done = [task for task in tasks if task["done"]]
    if len(tasks) < _MIN_TASKS or (len(tasks) < _MAX_TASKS and random.random() < _ADD_PROBABILITY):
        return "add", {"id": project, "title": new_task_title(rows, project, random)}
    if done and len(tasks) >= _MAX_TASKS:
        return "drop", {"id": random.choice(done)["id"]}
    task = random.choice(tasks)
    user_ids = [member["user"] for member in rows["members"] if member["project"] == project]
    if user_ids and random.random() < _ASSIGN_PROBABILITY:
        return "assign", {"id": task["id"], "user": random.choice(user_ids)}
    return "finish", {"id": task["id"], "done": not task["done"]}


def new_task_title(rows: Mapping[str, Any], project: str, random: Random) -> str:
    """Return a title for a new task, an unused one if possible."""
    ideas = TASK_TITLES.get(project, TASK_TITLES["2"])
    taken = {task["title"] for task in rows["tasks"]}
    return random.choice([idea for idea in ideas if idea not in taken] or list(ideas))


class Writer:
    """Runs operations, chosen by chance, until it is paused."""

    def __init__(self, application: Application, random: Random) -> None:
        self._application = application
        self._random = random
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._deferred_until = 0.0

    @property
    def is_writing(self) -> bool:
        """Whether it may write."""
        return self._may_write.is_set()

    def set_writing(self, *, writing: bool) -> None:
        """Resume or pause writing."""
        if writing:
            self._deferred_until = 0.0
            self._may_write.set()
        else:
            self._may_write.clear()

    def defer(self) -> None:
        """Pause for some seconds."""
        self._deferred_until = asyncio.get_running_loop().time() + _DEFER_SECONDS

    async def run(self) -> None:
        """Write until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._random.uniform(*_PAUSE_SECONDS))
            await self._may_write.wait()
            if loop.time() < self._deferred_until:
                continue
            # The page may have removed the row since it was chosen.
            with suppress(psycopg.IntegrityError):
                rows = await self._application.fetch_tables()
                await self._application.execute(*next_operation(rows, self._random))
