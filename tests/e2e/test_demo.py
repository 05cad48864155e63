"""A new user's first minute: one command, a page, and nothing left when it ends."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import jwt
import psycopg
import pytest
from playwright.async_api import Browser, Page, Route, expect

from pgrealtime.demo.directory import PREFIX
from tests.e2e.browser import chromium
from tests.e2e.demo import (
    EMBEDDED,
    END_SECONDS,
    Demo,
    copy_checkout,
    demo,
    eventually,
    processes_in,
    run,
    supervisor_of,
    uid_of,
)
from tests.e2e.readme_mirror import readme_mirror, wait_for_titles
from tests.e2e.sdk import sdk
from tests.lacking import lacking

PICTURES = Path(__file__).parents[1] / ".run" / "demo"
"""Screenshots for review."""

MINUTE = 60.0

_PROGRAMS = (
    *("sh", "cat", "chmod", "cksum", "dirname", "find", "id", "mkdir", "rm", "tail", "tr"),
    "python3",
)
"""All that may be on the PATH of the simulated minimal machine."""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that every user can access; pytest's own are closed to others."""
    with TemporaryDirectory(prefix="pgrealtime-tests.") as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


@pytest.fixture
async def running() -> AsyncIterator[Demo]:
    async with demo() as started:
        yield started


# --- one command


def _python_for(user: list[str]) -> str:
    """Return an interpreter that this user can run and make an environment with."""
    script = "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))"
    for name in ("/usr/bin/python3", "/usr/local/bin/python3", sys.executable):
        if Path(name).exists():
            tried = subprocess.run([*user, name, "-c", script], capture_output=True, check=False)
            if tried.returncode == 0:
                return name
    return lacking("no Python 3.11 with venv that another user can run")


def _bare_environment(folder: Path, python: str) -> dict[str, str]:
    """Return a home, a PATH without PostgreSQL, and how this machine downloads packages."""
    (folder / "bin").mkdir()
    for name in _PROGRAMS:
        target = python if name == "python3" else shutil.which(name)
        assert target is not None, name
        (folder / "bin" / name).symlink_to(target)
    network = ("PIP_", "SSL_", "HTTP_", "HTTPS_", "NO_PROXY", "http_", "https_", "no_proxy")
    kept = {name: text for name, text in os.environ.items() if name.startswith(network)}
    return {**kept, "HOME": str(folder / "home"), "PATH": str(folder / "bin")}


@pytest.mark.timeout(240)
async def test_one_command_leads_from_a_clone_to_the_first_event_within_a_minute(
    open_folder: Path,
) -> None:
    """Python only: no PostgreSQL, no settings, and a home with a broken earlier installation."""
    user: list[str] = []
    if os.geteuid() == 0:
        user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
    (open_folder / "clone").mkdir()
    clone = copy_checkout(open_folder / "clone")
    environment = _bare_environment(open_folder, _python_for(user))
    ruin = open_folder / "home" / ".cache" / "pgrealtime-demo" / "venv" / "bin"
    ruin.mkdir(parents=True)
    (ruin / "python").write_text("half removed")
    if user:
        for path in (open_folder / "home", *(open_folder / "home").rglob("*")):
            os.chown(path, 65534, 65534)

    began = time.monotonic()
    script = [*user, "/bin/sh", str(clone / "config" / "demo.sh")]
    script[0] = shutil.which(script[0]) or script[0]
    async with demo(EMBEDDED, start=script, environment=environment) as started:
        async with sdk(started.url) as guest:
            await guest.do("subscribe", collection="tasks", topic="*")
            [event, *_] = await guest.wait_for(1, seconds=MINUTE)
        took = time.monotonic() - began
        owners = {uid_of(pid) for pid in processes_in(started.directory)}

    assert event["record"]["title"]
    assert took < MINUTE
    assert owners == {65534 if user else os.geteuid()}
    assert started.is_gone()


async def test_a_server_of_this_machine_is_used_if_there_is_one() -> None:
    binaries = os.environ.get("PGREALTIME_TEST_PG_BIN", "")
    if not binaries:
        lacking("no PostgreSQL programs: PGREALTIME_TEST_PG_BIN isn't set")
    async with demo(("--port", "0", "--no-browser")) as started:
        assert f"({binaries})" in started.printed
        async with (
            sdk(started.url) as guest,
            await psycopg.AsyncConnection.connect(started.database_url) as connection,
        ):
            await guest.do("subscribe", collection="tasks", topic="*")  # waits for the slot
            cursor = await connection.execute("SELECT plugin FROM pg_replication_slots")
            assert await cursor.fetchall() == [("wal2json",)]


# --- the page


async def _open(
    browser: Browser,
    url: str,
    *,
    scheme: Literal["light", "dark"] = "light",
    size: tuple[int, int] = (1440, 900),
) -> Page:
    """Open the page and stop the demo's own writer."""
    context = await browser.new_context(
        color_scheme=scheme, viewport={"width": size[0], "height": size[1]}
    )
    page = await context.new_page()
    await page.goto(url)
    for user in ("Ann Chovy", "Bob Sledd", "A guest"):
        status = page.get_by_role("status").filter(has_text=f"{user}: listening")
        await expect(status).to_have_count(1)
    await expect(page.locator("#screen li").first).to_be_attached()
    return page


async def _hush(page: Page) -> None:
    switch = page.get_by_role("switch", name="Others write too")
    if await switch.get_attribute("aria-checked") == "true":
        await switch.click()
    await expect(switch).to_have_attribute("aria-checked", "false")


async def _press(page: Page, name: str) -> None:
    """Press a button and wait for its effect."""
    before = await page.locator(".change.mine").count()
    await page.get_by_role("button", name=name).click()
    await expect(page.locator(".change.mine")).to_have_count(before + 1)
    await expect(page.locator("#outcome")).to_contain_text("received it")


async def _received(page: Page) -> list[bool]:
    """Return whether Ann, Bob and the guest have received the last click's event."""
    cells = page.locator(".change.mine").first.locator(".cell")
    return ["heard" in (await cells.nth(n).get_attribute("class") or "") for n in range(3)]


async def test_a_click_changes_a_row_and_reaches_the_clients_that_may_see_it(running: Demo) -> None:
    """The party is Ann's secret until Bob takes part, and public after that."""
    said: list[str] = []
    asked: set[str] = set()
    async with chromium() as browser:
        page = await _open(browser, f"{running.url}/")
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.add(request.url.split("/")[2]))
        await _hush(page)

        before = await running.records("tasks")
        await _press(page, "Tick off a party task")
        assert await _received(page) == [True, False, False]
        after = await running.records("tasks")
        [changed] = [task for task in after if task not in before]
        assert changed["project"] == "1"

        frame = await page.locator("#frame").inner_text()
        assert frame.startswith("id:")
        assert f'"title":"{changed["title"]}"' in frame
        assert "project.members_via_project.user" in await page.locator("#rule").inner_text()
        await page.locator(".change.mine .cell.bob").first.click()
        assert await page.locator("#frame").inner_text() == "Not a byte."

        await _press(page, "Let Bob in")
        assert await _received(page) == [True, True, False]
        await _press(page, "Tick off a party task")
        assert await _received(page) == [True, True, False]
        await _press(page, "Make it public")
        assert await _received(page) == [True, True, True]
        await _press(page, "Tick off a party task")
        assert await _received(page) == [True, True, True]
        await _press(page, "Send Bob out again")
        assert await _received(page) == [True, True, False]  # his own membership is visible to him
        await _press(page, "Make it private again")
        assert await _received(page) == [True, False, False]

    assert said == []
    assert asked == {running.url.removeprefix("http://")}


async def test_the_database_is_listed_by_the_api_and_kept_by_events(running: Demo) -> None:
    """Lists that come late don't take back what events have told meanwhile."""
    asked: list[str] = []

    async def hold_list(route: Route) -> None:
        asked.append(route.request.url)
        answer = await route.fetch()
        await connection.execute("UPDATE tasks SET title = 'Written meanwhile' WHERE id = 1")
        while not await page.evaluate("held.some(change => change.record.id === '1')"):
            await asyncio.sleep(0.01)  # the page's policy forbids waiting by a function
        await route.fulfill(response=answer)

    async with (
        chromium() as browser,
        await psycopg.AsyncConnection.connect(running.database_url, autocommit=True) as connection,
    ):
        page = await _open(browser, f"{running.url}/")
        await _hush(page)
        shown = page.locator(".task label")
        rows = await connection.execute("SELECT title FROM tasks ORDER BY project_id, id")
        await expect(shown).to_have_text([title for (title,) in await rows.fetchall()])

        await page.route("**/api/collections/tasks/records?*", hold_list)
        await page.evaluate("refresh()")
        await expect(shown.first).to_have_text("Written meanwhile")
        await page.unroute("**/api/collections/tasks/records?*")

        # Without the events: what they had told is in the list.
        await page.evaluate("everything.close()")
        await connection.execute("UPDATE tasks SET title = 'Listed' WHERE id = 1")
        await expect(shown.first).to_have_text("Written meanwhile")
        await page.evaluate("refresh()")
        await expect(shown.first).to_have_text("Listed")

    assert len(asked) == 1


async def test_a_screen_has_the_tasks_that_its_viewer_may_see_and_no_others(running: Demo) -> None:
    """They enter as Bob is put into the project and leave as he is put out of it.

    The official SDK has the same list by the README's lines.
    """
    tokens = {one["id"]: one["token"] for one in (await running.state())["people"]}
    async with chromium() as browser, readme_mirror(running.url, tokens["bob"]) as client:
        page = await _open(browser, f"{running.url}/")
        await _hush(page)
        screen = page.locator("#screen")
        party = page.get_by_role("group", name="Surprise party for Bob, on the screen")

        async def expect_tasks(projects: set[str]) -> None:
            tasks = [t for t in await running.records("tasks") if t["project"] in projects]
            titles = [f"{'✓' if task['done'] else '○'} {task['title']}" for task in tasks]
            shown = screen.locator("li:not(.left)")
            await expect(shown).to_have_count(len(titles))
            assert sorted(await shown.all_inner_texts()) == sorted(titles)
            await wait_for_titles(client, [task["title"] for task in tasks])

        await expect(page.locator("#screen-title")).to_have_text("Bob's screen")
        await expect(party).to_contain_text("none of it")
        await expect_tasks({"2", "3"})
        await _press(page, "Let Bob in")
        await expect(party.locator("li.entered").first).to_be_visible()
        await expect_tasks({"1", "2", "3"})
        await _press(page, "Send Bob out again")
        await expect(party.locator("li.left").first).to_be_attached()
        await expect_tasks({"2", "3"})
        await expect(party).to_contain_text("none of it")
        await page.get_by_label("Subscriber 2").select_option("guest")
        await expect(page.locator("#screen-title")).to_have_text("The guest's screen")
        await expect(screen.locator("li")).to_have_count(
            len([task for task in await running.records("tasks") if task["project"] == "3"])
        )


async def test_another_subscriber_can_be_chosen_and_comes_with_no_history(running: Demo) -> None:
    async with chromium() as browser:
        page = await _open(browser, f"{running.url}/")
        await _hush(page)
        await _press(page, "Tick off a party task")
        await page.get_by_label("Subscriber 2").select_option("paige")
        status = page.get_by_role("status").filter(has_text="Paige Turner: listening")
        await expect(status).to_have_count(1)
        assert await _received(page) == [True, False, False]
        await _press(page, "Tick off a party task")
        assert await _received(page) == [True, True, False]


async def test_what_happened_while_the_page_was_hidden_is_there_on_return(running: Demo) -> None:
    """A hidden page holds no connection, and resumes from its last position."""
    async with chromium() as browser:
        page = await _open(browser, f"{running.url}/")
        await _hush(page)
        await _press(page, "Tick off a party task")
        hide = """hidden => {
          Object.defineProperty(document, "hidden", {get: () => hidden, configurable: true});
          document.dispatchEvent(new Event("visibilitychange"));
        }"""
        await page.evaluate(hide, True)
        async with await psycopg.AsyncConnection.connect(
            running.database_url, autocommit=True
        ) as connection:
            await connection.execute(
                "UPDATE tasks SET title = 'Missed it' WHERE project_id = 1 AND id = 1"
            )
        await page.evaluate(hide, False)
        missed = page.locator(".change", has_text="Missed it")
        await expect(missed.locator(".cell.ann.heard")).to_have_count(1)
        await expect(missed.locator(".cell.bob.nothing")).to_have_count(1)


async def test_our_click_is_known_as_ours_before_the_watcher_is_subscribed(running: Demo) -> None:
    """The page's own connection receives all rows.

    On a slow machine it is the last to subscribe.
    """

    async def hold_watcher(route: Route) -> None:
        token = route.request.headers.get("authorization")
        claims = jwt.decode(token, options={"verify_signature": False}) if token else {}
        if claims.get("sub") != "watcher":  # whose call is never answered
            await route.continue_()

    async with (
        chromium() as browser,
        await psycopg.AsyncConnection.connect(running.database_url, autocommit=True) as connection,
    ):
        context = await browser.new_context()
        page = await context.new_page()
        await page.route("**/api/realtime", hold_watcher)
        await page.goto(f"{running.url}/")
        status = page.get_by_role("status").filter(has_text="Ann Chovy: listening")
        await expect(status).to_have_count(1)
        await _hush(page)
        cursor = await connection.execute("SELECT pid FROM pg_stat_replication")
        [(walsender,)] = await cursor.fetchall()
        os.kill(walsender, signal.SIGSTOP)  # the click's answer is there before its event
        try:
            await page.get_by_role("button", name="Tick off a party task").click()
            await expect(page.locator("#sql")).to_contain_text("UPDATE tasks")
        finally:
            os.kill(walsender, signal.SIGCONT)
        await expect(page.locator(".change.mine .cell.ann.heard")).to_have_count(1)


_SCREENS: tuple[tuple[str, Literal["light", "dark"], tuple[int, int]], ...] = (
    ("light", "light", (1440, 900)),
    ("dark", "dark", (1440, 900)),
    ("phone", "light", (390, 844)),
    ("phone-dark", "dark", (390, 844)),
)


async def test_it_fits_every_screen_and_everything_has_a_name(running: Demo) -> None:
    """Nothing overflows sideways, and a screen reader has a name for each control."""
    async with chromium() as browser:
        for name, scheme, size in _SCREENS:
            page = await _open(browser, f"{running.url}/", scheme=scheme, size=size)
            await _hush(page)
            await _press(page, "Tick off a party task")
            await page.screenshot(path=PICTURES / f"{name}.png", full_page=True)
            assert await page.evaluate("document.documentElement.scrollWidth") == size[0], name
            unnamed = await page.evaluate(
                """[...document.querySelectorAll("button:enabled, select, input")]
                   .filter(e => !(e.ariaLabel || e.labels?.length || e.textContent.trim()))
                   .map(e => e.outerHTML)"""
            )
            assert unnamed == [], name
            shade = await page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, shade[4:-1].split(","))) < 200) == (scheme == "dark"), name
            await page.close()


# --- the configuration that users copy


async def test_a_project_without_members_is_visible_to_no_caller(running: Demo) -> None:
    """The guard in demo.yaml is needed.

    A guest's empty id would equal the empty list of members.
    """
    people = {one["id"]: one["token"] for one in (await running.state())["people"]}
    async with (
        sdk(running.url) as guest,
        sdk(running.url) as ann,
        await psycopg.AsyncConnection.connect(running.database_url, autocommit=True) as write,
    ):
        await ann.do("token", token=people["ann"])
        for client in (guest, ann):
            await client.do("subscribe", collection="projects", topic="*")
        await write.execute("DELETE FROM members WHERE project_id = 1")
        await write.execute("UPDATE projects SET name = 'owned by ann' WHERE id = 1")
        await write.execute("UPDATE projects SET name = 'public' WHERE id = 3")
        await guest.wait_for(1)
        await ann.wait_for(2)

    assert [event["record"]["name"] for event in guest.events] == ["public"]
    assert [event["record"]["name"] for event in ann.events] == ["owned by ann", "public"]


# --- the end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_it_and_nothing_is_left(running: Demo, number: signal.Signals) -> None:
    assert processes_in(running.directory)
    assert await running.end(number) == 0
    assert running.is_gone()


async def test_killed_it_leaves_nothing_either(running: Demo) -> None:
    """SIGKILL can't be handled: the supervisor of the server detects it."""
    await running.end(signal.SIGKILL)
    await eventually(running.is_gone)


async def test_killed_while_it_starts_it_leaves_nothing(open_folder: Path) -> None:
    """Whatever the supervisor does when its input ends, it runs to the end."""
    environment = {**os.environ, "TMPDIR": str(open_folder)}

    async def kill(process: asyncio.subprocess.Process) -> None:
        await eventually(lambda: any(open_folder.glob(f"{PREFIX}*/data")))
        process.kill()

    with pytest.raises(AssertionError, match="it ended"):
        async with demo(environment=environment, started=kill):
            pass
    await eventually(lambda: not any(open_folder.iterdir()) and not processes_in(open_folder))


async def test_without_its_supervisor_it_ends_and_removes_the_server_itself(running: Demo) -> None:
    os.kill(supervisor_of(running.process), signal.SIGKILL)
    async with asyncio.timeout(END_SECONDS):
        assert await running.process.wait() != 0
    assert running.is_gone()


async def test_the_next_start_removes_what_two_kills_left(running: Demo) -> None:
    supervisor = supervisor_of(running.process)
    os.kill(supervisor, signal.SIGKILL)
    await running.end(signal.SIGKILL)
    assert not running.is_gone()
    (running.directory / "data" / "PG_VERSION").unlink()  # and half of it is removed already
    async with demo() as second:
        assert running.is_gone()
        async with demo():  # a third one leaves the second alone
            assert processes_in(second.directory)
            await second.get("/demo/state")


# --- what can go wrong


async def test_a_taken_port_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, printed = await run(*_demo_command(), "--port", port, "--embedded")
    assert status != 0
    assert printed.splitlines() == [
        f"port_taken: port {port} of 127.0.0.1 can't be used",
        "DETAIL: Address already in use.",
        "HINT: Choose another one with --port; 0 takes any that is free.",
    ]


async def test_without_a_place_to_write_it_says_so() -> None:
    code = (
        "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc'];"
        "import sys; from pgrealtime.demo.supervisor import main; sys.exit(main(['--embedded']))"
    )
    status, printed = await run(sys.executable, "-c", code)
    assert status == 1
    assert "no directory can be written to" in printed
    status, printed = await run(
        "/bin/sh",
        str(_SCRIPT),
        environment={**os.environ, "PGREALTIME_DEMO_DIRECTORY": "/proc/nowhere"},
    )
    assert (status, printed) == (
        1,
        "demo.sh: can't write to /proc/nowhere; name a folder with PGREALTIME_DEMO_DIRECTORY=...\n",
    )


async def test_without_python_or_its_venv_it_says_what_to_install(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    bare = tmp_path / "python-without-venv"
    bare.write_text(
        f'#!/bin/sh\n[ "$1" != -m ] || {{ echo "No module named venv" >&2; exit 1; }}\n'
        f'exec {sys.executable} "$@"\n'
    )
    for program in (old, bare):
        program.chmod(0o755)
    environment = {**os.environ, "PGREALTIME_DEMO_DIRECTORY": str(tmp_path / "installed")}

    status, printed = await run(
        "/bin/sh", str(_SCRIPT), environment={**environment, "PYTHON": str(old)}
    )
    assert status == 1
    assert printed == (
        "demo.sh: no Python 3.11 or newer was found; name one with PYTHON=/path/to/python3\n"
    )
    status, printed = await run(
        "/bin/sh", str(_SCRIPT), environment={**environment, "PYTHON": str(bare)}
    )
    assert status == 1
    assert printed.splitlines()[-1] == (
        f"demo.sh: {bare} can't make a virtual environment;"
        " on Debian and Ubuntu: apt install python3-venv"
    )


_SCRIPT = Path(__file__).parents[2] / "config" / "demo.sh"


def _demo_command() -> tuple[str, ...]:
    return (sys.executable, "-m", "pgrealtime", "demo", "--no-browser")
