"""The operator's page in a browser: light and dark, on a desk and on a phone."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import product
from pathlib import Path
from typing import Literal

from playwright.async_api import Browser, Page, expect

from tests.e2e.browser import chromium
from tests.e2e.listener import listener
from tests.e2e.service import token
from tests.e2e.test_page import KEY, SECRET, Scene, scene
from tests.topics import topic

PICTURES = Path(__file__).parents[1] / ".run" / "page"
"""Screenshots for review."""

DESK, PHONE = (1440, 900), (390, 844)


class Said:
    """What the page logged, and whom it asked."""

    def __init__(self, page: Page) -> None:
        self.lines: list[str] = []
        self.hosts: set[str] = set()
        page.on("console", lambda message: self.lines.append(message.text))
        page.on("pageerror", lambda error: self.lines.append(str(error)))
        page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))


@asynccontextmanager
async def opened(
    browser: Browser,
    made: Scene,
    *,
    scheme: Literal["light", "dark"] = "light",
    size: tuple[int, int] = DESK,
) -> AsyncIterator[tuple[Page, Said]]:
    """Open the page and give it the token."""
    context = await browser.new_context(
        color_scheme=scheme,
        viewport={"width": size[0], "height": size[1]},
        has_touch=size == PHONE,
    )
    page = await context.new_page()
    said = Said(page)
    await page.goto(f"http://127.0.0.1:{made.port.address.port}/")
    await page.get_by_role("textbox", name="Token").fill(KEY)
    await page.get_by_role("button", name="Look").click()
    await expect(page.get_by_role("heading", name="Changes are flowing.")).to_be_visible()
    yield page, said
    await context.close()


async def photograph(page: Page, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    await page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


async def view(page: Page, name: str) -> None:
    tab = page.get_by_role("tab", name=re.compile(f"^{name}"))
    await tab.click()
    await expect(tab).to_have_attribute("aria-selected", "true")
    await expect(page.locator("#body")).not_to_have_text("Asking…")


async def test_it_says_who_is_connected_and_who_gets_what(
    database_url: str, tmp_path: Path
) -> None:
    async with (
        scene(database_url, tmp_path) as made,
        chromium() as browser,
        opened(browser, made) as (page, said),
    ):
        rows = page.locator("#body tbody tr")
        await expect(rows).to_have_count(4)
        await expect(rows.first).to_contain_text("has not subscribed to anything")
        await expect(rows.filter(has_text="users/ann")).to_contain_text("title ~ … && n > …")
        await page.keyboard.press("/")
        await page.keyboard.type("users/bob")
        await expect(rows).to_have_count(1)
        await page.keyboard.press("Escape")
        await photograph(page, "connections-found")

        await page.keyboard.press("2")
        await expect(rows).to_have_count(2)
        await page.keyboard.press("ArrowDown")
        await page.keyboard.press("Enter")
        detail = page.get_by_label("Details")
        await expect(detail).to_contain_text("update of posts/p1")
        await expect(detail).to_contain_text("Matches 3 subscriptions")
        await expect(detail.locator(".people li")).to_have_count(3)
        await photograph(page, "changes-desk-light")
        await page.keyboard.press("Escape")
        await expect(detail).to_have_count(0)

        await page.keyboard.press("4")
        await page.locator("#body").get_by_role("button", name="posts").click()
        await expect(detail).to_contain_text("decided by PostgreSQL")
        await photograph(page, "collections-desk-light")

        # What comes later is shown without a reload.
        await page.keyboard.press("1")
        await page.get_by_label("Search").fill("")
        async with listener(made.running.address, "posts/*"):
            await expect(rows).to_have_count(5)
        await expect(rows).to_have_count(4)
        assert SECRET not in await page.content()
        assert [line for line in said.lines if "401" not in line] == []
        assert said.hosts == {f"127.0.0.1:{made.port.address.port}"}


async def test_it_says_why_somebody_gets_a_change_or_not(database_url: str, tmp_path: Path) -> None:
    """The row is judged as the change wrote it: what is public now was not then."""
    async with (
        scene(database_url, tmp_path) as made,
        chromium() as browser,
        opened(browser, made) as (page, _),
    ):
        detail = page.get_by_label("Details")
        await page.locator("#body tr.can button.open", has_text="users/bob").click()
        await detail.get_by_label("Does it receive").fill("posts/p2")
        await detail.get_by_role("button", name="Explain").click()
        answer = detail.get_by_role("status")
        await expect(answer).to_contain_text("none of its 2 topics is of posts/p2")

        await view(page, "Changes")
        await page.locator("#body tr.can button.open").first.click()
        await expect(detail.locator(".people li")).to_have_count(3)
        await detail.get_by_role("button", name="Why users/ann gets it").first.click()
        await expect(detail.get_by_role("status")).to_contain_text("Rule and filter admit it.")
        await detail.get_by_label("Why, or why not").fill("users/bob")
        await detail.get_by_label("with the topic").fill("users/*")
        await page.keyboard.press("Enter")
        of_users = detail.get_by_role("status")
        await expect(of_users).to_contain_text('the topic is of "users", not of "posts"')
        await detail.get_by_label("Why, or why not").fill(made.guest.client_id)
        await page.keyboard.press("Enter")
        await expect(of_users).to_contain_text("Rule and filter admit it.")
        await page.keyboard.press("Escape")
        await page.locator("#body tr.can button.open").nth(1).click()
        await expect(detail).to_contain_text("create of posts/p1")
        await detail.get_by_label("Why, or why not").fill("guest")
        await page.keyboard.press("Enter")
        await expect(detail.get_by_role("status")).to_contain_text("Not delivered: none of:")
        await photograph(page, "changes-why-not")


SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


async def test_every_view_fits_desk_and_phone(database_url: str, tmp_path: Path) -> None:
    """Nothing is cut off or scrolls sideways; the phone's rows name their figures."""
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(scene(database_url, tmp_path))
        browser = await stack.enter_async_context(chromium())
        for n in range(12):
            text = topic("posts/*", filter=f"n > {n}") if n % 3 else "posts/*"
            await stack.enter_async_context(
                listener(made.running.address, text, f"posts/r{n}", token=token("ann"))
            )
        await made.running.write.execute(
            "INSERT INTO posts (id, title, author, public, n)"
            " SELECT 'r' || n, 'x', 'ann', n % 2 = 0, n FROM generate_series(1, 8) n"
        )
        await made.running.write.execute("DELETE FROM posts WHERE id = 'r3'")
        for scheme, (name, size) in product(SCHEMES, (("desk", DESK), ("phone", PHONE))):
            async with opened(browser, made, scheme=scheme, size=size) as (page, said):
                for title in ("Connections", "Changes", "Topics", "Collections", "Trouble"):
                    await view(page, title)
                    width = await page.evaluate("document.documentElement.scrollWidth")
                    assert width <= size[0], title
                    await photograph(page, f"{title.lower()}-{name}-{scheme}")
                    if title in ("Connections", "Changes"):
                        await page.locator("#body tr.can button.open").first.click()
                        await expect(page.get_by_label("Details")).to_be_visible()
                        await expect(page.get_by_label("Details")).not_to_contain_text("Evaluating")
                        await photograph(page, f"{title.lower()}-detail-{name}-{scheme}")
                assert [line for line in said.lines if "401" not in line] == []


async def test_a_wrong_token_and_a_port_that_is_gone_are_told(
    database_url: str, tmp_path: Path
) -> None:
    """And a page that nobody sees asks nothing."""
    async with (
        scene(database_url, tmp_path) as made,
        chromium() as browser,
        opened(browser, made) as (page, _),
    ):
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        hide = """hidden => {
          Object.defineProperty(document, "hidden", {get: () => hidden, configurable: true});
          document.dispatchEvent(new Event("visibilitychange"));
        }"""
        await page.wait_for_load_state("networkidle")
        await page.evaluate(hide, True)
        asked.clear()
        await page.wait_for_timeout(4000)  # more than one interval
        assert asked == []
        await page.evaluate(hide, False)
        async with page.expect_request("**/inspect/overview"):
            pass

        await page.evaluate("sessionStorage.setItem('key', 'another')")
        await expect(page.get_by_role("alert")).to_contain_text("That is not the token.")
        await photograph(page, "gate")
        await page.get_by_role("textbox", name="Token").fill(KEY)
        await page.keyboard.press("Enter")
        await expect(page.locator("#body tbody tr")).to_have_count(4)

        await made.running.stop()
        title = page.get_by_role("heading", name="The admin port doesn't answer.")
        await expect(title).to_be_visible(timeout=30_000)
        await photograph(page, "gone")
