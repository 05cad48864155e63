"""Somebody who is busy in the demo's application, so that there is something to see."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from random import Random
from typing import Any, Final

import psycopg

from pgrealtime.demo.application import Application, Step

_PAUSE_SECONDS = (1.1, 2.4)
_MANNERS_SECONDS = 8.0
"""How long it waits after somebody did something on the page, who wants to see what came of it."""

_FEWEST_TASKS = 3
_MOST_TASKS = 5

_ADDS = 0.25
_ASSIGNS = 0.3
"""How often it does that where it could as well tick something."""

IDEAS: Final[Mapping[str, Sequence[str]]] = {
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


def next_step(rows: Mapping[str, Any], random: Random) -> Step:
    """Return something that a person might do next; projects stay at about four tasks each."""
    project = random.choice(rows["projects"])["id"]
    tasks = [task for task in rows["tasks"] if task["project"] == project]
    done = [task for task in tasks if task["done"]]
    if len(tasks) < _FEWEST_TASKS or (len(tasks) < _MOST_TASKS and random.random() < _ADDS):
        return Step("add", {"id": project, "title": fresh_title(rows, project, random)})
    if done and len(tasks) >= _MOST_TASKS:
        return Step("drop", {"id": random.choice(done)["id"]})
    task = random.choice(tasks)
    people = [one["user"] for one in rows["members"] if one["project"] == project]
    if people and random.random() < _ASSIGNS:
        return Step("assign", {"id": task["id"], "user": random.choice(people)})
    return Step("finish", {"id": task["id"], "done": not task["done"]})


def fresh_title(rows: Mapping[str, Any], project: str, random: Random) -> str:
    """Return a title for a new task, one that isn't there already if possible."""
    ideas = IDEAS.get(project, IDEAS["2"])
    taken = {task["title"] for task in rows["tasks"]}
    return random.choice([idea for idea in ideas if idea not in taken] or list(ideas))


class Writer:
    """Does something every second or two, unless it is told not to.

    Args:
        application: What it uses.
        random: What it does next is a matter of taste.
    """

    def __init__(self, application: Application, random: Random) -> None:
        self._application = application
        self._random = random
        self._allowed = asyncio.Event()
        self._allowed.set()
        self._quiet_until = 0.0

    @property
    def is_writing(self) -> bool:
        """Whether it may write."""
        return self._allowed.is_set()

    def allow(self, *, writing: bool) -> None:
        """Let it write from now on, or not."""
        if writing:
            self._quiet_until = 0.0
            self._allowed.set()
        else:
            self._allowed.clear()

    def give_way(self) -> None:
        """Leave the next few seconds to somebody else."""
        self._quiet_until = asyncio.get_running_loop().time() + _MANNERS_SECONDS

    async def run(self) -> None:
        """Write until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._random.uniform(*_PAUSE_SECONDS))
            await self._allowed.wait()
            if loop.time() < self._quiet_until:
                continue
            # Somebody may have removed the row meanwhile.
            with suppress(psycopg.IntegrityError):
                rows = await self._application.rows()
                await self._application.do(next_step(rows, self._random))
