"""No value reaches a client that could not see its row, and every missing event is notified.

Random histories, each audited: ``PGREALTIME_TEST_SEED=WORLD:HISTORY`` repeats one of them, ``python
-m tests.histories`` runs any number.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest

from tests.conftest import MakeDatabase
from tests.histories.audit import Fault
from tests.histories.history import History, World, open_world, scene_of
from tests.histories.ledger import ROOT, Person
from tests.histories.reader import Client, Kind, Topic
from tests.histories.scene import DOCS, FILLER, Scene, Values
from tests.histories.writer import Draft
from tests.stream_reading import PLUGINS, Plugin

HISTORIES = int(os.environ.get("PGREALTIME_TEST_HISTORIES", "200"))
_OF_A_WORLD = 25
FAULTS = float(os.environ.get("PGREALTIME_TEST_FAULTS", "0.03"))
"""Share of the steps that are faults, in half of the random histories."""


def check(faults: list[Fault], seed: str, stories: list[str]) -> None:
    found = [str(fault) for fault in faults]
    lines = [f"PGREALTIME_TEST_SEED={seed}", *found[:20], *(stories[:2] if found else ())]
    assert not found, "\n".join(lines)


@pytest.mark.parametrize("faults", [0.0, FAULTS], ids=["calm", "with faults"])
async def test_random_histories(make_database: MakeDatabase, faults: float) -> None:
    """Each run takes other histories; a failure shows the seed."""
    given, _, number = os.environ.get("PGREALTIME_TEST_SEED", "").partition(":")
    lived = 0
    while lived < HISTORIES / 2:
        seed = given or f"{random.randrange(1 << 32):08x}"
        numbers = [int(number)] if number else range(_OF_A_WORLD)
        async with open_world(scene_of(seed), make_database()) as world:
            for one in numbers:
                name = f"{seed}:{one}"
                try:
                    findings = await History(world, name, faults=faults).run()
                except BaseException as error:
                    error.add_note(f"PGREALTIME_TEST_SEED={name}")
                    raise
                check(findings.faults, name, findings.stories)
                lived += 1
        if given:
            break


def scene(plugin: Plugin, rule: str = "public", *, is_durable: bool = False) -> Scene:
    """All collections have one rule."""
    return Scene(
        plugin=plugin,
        is_durable=is_durable,
        rules=dict.fromkeys(DOCS, (rule, rule)),
        users_identity="full",
        send_buffer=1 << 20,
    )


class Stage:
    """A history whose steps a test writes itself, on one document of each collection."""

    def __init__(self, world: World, history: History) -> None:
        self.world, self.history, self.writer = world, history, history.writer

    async def listen(self, person: Person, kind: Kind, *topics: Topic) -> Client:
        client = self.world.client(person, kind, *topics)
        self.history.clients.append(client)
        await client.wait_served()
        return client

    async def update(self, docs: str, **sets: object) -> None:
        """Commit an update of the collection's document."""
        await self.writer.commit(partial(self.change, docs, sets))

    async def change_user(self, user: str, **sets: object) -> None:
        """Commit an update of a user."""
        await self.writer.commit(lambda draft: self.writer.update(draft, "users", user, sets))

    def change(self, docs: str, sets: Values, draft: Draft) -> None:
        self.writer.update(draft, docs, self.writer.docs[docs][0], sets)


@asynccontextmanager
async def stage(url: str, of: Scene) -> AsyncIterator[Stage]:
    """Run the block's steps as a history, and audit it."""
    async with open_world(of, url) as world:
        history = History(world, "written")
        async with history.audited() as findings:
            yield Stage(world, history)
        check(findings.faults, "", findings.stories)


ALL = tuple(Topic(collection=docs) for docs in DOCS)
TEXT = f"open-x-{FILLER}"
SECRET_TEXT = f"secret-x-{FILLER}"


@pytest.mark.parametrize("plugin", PLUGINS)
async def test_a_later_version_s_value_is_withheld_from_clients_that_may_not_see_it(
    database_url: str, plugin: Plugin
) -> None:
    """Commit 1 leaves the TOASTed text unchanged, commit 2 makes it a secret of a closed row."""
    async with stage(database_url, scene(plugin)) as here:
        for docs in DOCS:
            await here.update(docs, public=True, body=TEXT)
        readers = [await here.listen("", "position", *ALL), await here.listen("", "plain", *ALL)]
        readers[1].stall()
        for _ in range(5):
            for docs in DOCS:
                first = partial(here.change, docs, {"title": "a-new"})
                second = partial(here.change, docs, {"public": False, "body": SECRET_TEXT})
                await here.writer.commit(first, second)
                await here.update(docs, public=True, body=TEXT)
                await here.update(docs, title="b-new")
                await here.update(docs, public=False, body=SECRET_TEXT)
                await here.update(docs, public=True, body=TEXT)
            await readers[0].break_off(lambda count: count)
            await readers[0].wait_served()


@pytest.mark.parametrize("plugin", PLUGINS)
async def test_a_later_value_is_withheld_from_clients_that_lost_their_rights_by_then(
    database_url: str, plugin: Plugin
) -> None:
    """A connection that catches up is still evaluated as an administrator.

    The current row is of a later time.
    """
    of = replace(scene(plugin, "role"), send_buffer=300)
    async with stage(database_url, of) as here:
        user = here.writer.users[0]
        for docs in DOCS:
            await here.update(docs, public=False, body=TEXT)
        await here.change_user(user, role="admin")
        reader = await here.listen(user, "position", *ALL)
        reader.stall()
        for number in range(3):
            for docs in DOCS:
                await here.update(docs, title=f"a-{number}")
        await here.change_user(user, role="")
        for docs in DOCS:
            await here.update(docs, body=SECRET_TEXT)
        reader.go_on()


@pytest.mark.parametrize("plugin", PLUGINS)
async def test_updates_under_savepoints_and_in_quick_commits_are_received_or_gaps(
    database_url: str, plugin: Plugin
) -> None:
    """The rule reads a column that the updates leave unchanged."""
    async with stage(database_url, scene(plugin, "body")) as here:
        for docs in DOCS:
            await here.update(docs, body=TEXT)
        await here.listen("", "position", *ALL)
        await here.listen("", "resync", *ALL)
        for number in range(10):
            for docs in DOCS:
                title = {"title": f"a-{number}"}
                await here.writer.commit(
                    lambda draft: draft.statements.append("SAVEPOINT s"),
                    partial(here.change, docs, title),
                    lambda draft: draft.statements.append("RELEASE s"),
                    partial(here.change, DOCS[0], title),
                )
                await here.update(docs, **title)
                await here.update(docs, **title)


@pytest.mark.parametrize("plugin", PLUGINS)
async def test_a_live_row_that_could_not_be_read_is_read_again(
    database_url: str, plugin: Plugin
) -> None:
    """An unrelated column was dropped a moment ago.

    A lock is held longer than statement_timeout.
    """
    async with stage(database_url, scene(plugin, "body")) as here:
        for docs in DOCS:
            await here.update(docs, body=TEXT)
        await here.writer.run("ALTER TABLE docs_default ADD late int")
        await here.listen("", "cursor", *ALL)
        await here.listen(ROOT, "position", *ALL)
        await here.update("docs_default", title="a-before")
        await here.history.alter("docs_default", "ALTER TABLE docs_default DROP late")
        for number in range(5):
            await here.update("docs_default", title=f"a-{number}")
        for number in range(3):
            await here.update("docs_index", title=f"a-{number}")
            await here.history.lock("docs_index")


@pytest.mark.parametrize("plugin", PLUGINS)
async def test_enrichment_survives_broken_connections(database_url: str, plugin: Plugin) -> None:
    """``expand`` and the ids of a junction table are shown, or a gap is notified."""
    async with stage(database_url, scene(plugin)) as here:
        topics = [Topic(collection=docs, expand=True) for docs in DOCS]
        await here.listen(ROOT, "position", *topics)
        await here.listen("", "cursor", *topics)
        for number in range(10):
            for docs in DOCS:
                await here.update(docs, title=f"a-{number}", team=here.writer.teams[0])
            await here.history.kill_queries()


@pytest.mark.parametrize("plugin", PLUGINS)
async def test_no_id_claims_what_was_neither_delivered_nor_notified(
    database_url: str, plugin: Plugin
) -> None:
    """The audit checks each id: a client that disconnects there misses nothing when it resumes."""
    async with stage(database_url, scene(plugin, "team")) as here:
        readers = [await here.listen("", kind, *ALL) for kind in ("position", "cursor")]
        team = here.writer.teams[0]
        await here.writer.commit(
            lambda draft: here.writer.update(draft, "teams", team, {"open": True})
        )
        for docs in DOCS:
            await here.update(docs, team=team)
        for number in range(6):
            for docs in DOCS:
                await here.update(docs, title=f"a-{number}")
            await here.history.kill_queries()
            await readers[number % 2].break_off(lambda count: count // 2)
            await readers[number % 2].wait_served()


@pytest.mark.parametrize("plugin", PLUGINS)
async def test_a_truncate_is_notified_once_the_table_is_empty_to_readers(
    database_url: str, plugin: Plugin
) -> None:
    """A client that reloads at once finds no old rows."""
    async with stage(database_url, scene(plugin)) as here:
        await here.listen("", "cursor", *ALL)
        await here.listen("", "resync", *ALL)
        for _ in range(10):
            for docs in DOCS:
                await here.writer.commit(partial(here.writer.truncate, docs=docs))
                await here.writer.commit(partial(here.writer.insert_doc, docs=docs))


@pytest.mark.parametrize("is_durable", [False, True], ids=["temporary", "durable"])
@pytest.mark.parametrize("plugin", PLUGINS)
async def test_a_stream_that_is_ended_while_it_is_opened_is_opened_again(
    database_url: str, plugin: Plugin, *, is_durable: bool
) -> None:
    """Whatever step an administrator's pg_terminate_backend interrupts."""
    async with stage(database_url, scene(plugin, is_durable=is_durable)) as here:
        await here.listen("", "cursor", *ALL)
        for number in range(60):
            if number % 10 == 0:
                await here.update("docs_full", title=f"a-{number}")
            await here.history.kill_everything()
            await asyncio.sleep(0.005 * (number % 20))


@pytest.mark.parametrize("plugin", PLUGINS)
async def test_a_durable_slot_makes_no_gap_of_a_lost_stream(
    database_url: str, plugin: Plugin
) -> None:
    async with stage(database_url, scene(plugin, is_durable=True)) as here:
        reader = await here.listen(ROOT, "cursor", *ALL)
        for number in range(3):
            for docs in DOCS:
                await here.update(docs, title=f"a-{number}")
            await here.history.kill_walsender()
            for docs in DOCS:
                await here.update(docs, title=f"b-{number}")
        names = [message.event for stream in reader.streams for message in stream.messages]
        assert "PB_RESYNC" not in names
