"""Headless Chromium, and a page of another origin in it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from playwright.async_api import Browser, async_playwright

from tests.e2e.sdk import Sdk
from tests.lacking import lacking

_HERE = Path(__file__).parent
_SDK = _HERE.parent / "node_modules" / "pocketbase" / "dist" / "pocketbase.es.mjs"
_QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Start the installed Chromium with its own profile; it contacts only the test's servers."""
    program = shutil.which("chromium")
    if program is None:
        lacking("Chromium is missing; sh tests/run.sh installs it")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=list(_QUIET))
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def pages() -> AsyncIterator[str]:
    """Serve ``browser_page.html`` and its scripts; yield the origin."""
    if not _SDK.exists():
        lacking("the client libraries are missing; sh tests/run.sh installs them")
    files = {
        "/": _HERE / "browser_page.html",
        "/pocketbase.es.mjs": _SDK,
        **{f"/{name}": _HERE / name for name in ("native_listener.mjs", "sdk_commands.mjs")},
    }

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path not in files:
            raise web.HTTPNotFound
        kind = "text/javascript" if request.path.endswith(".mjs") else "text/html"
        return web.Response(text=files[request.path].read_text(), content_type=kind)

    app = web.Application()
    app.router.add_get("/{name:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def page_client(browser: Browser, origin: str) -> AsyncIterator[tuple[Sdk, Any]]:
    """Open the page; yield what it reports, and the page."""
    context = await browser.new_context()
    page = await context.new_page()

    async def send(command: Mapping[str, Any]) -> None:
        await page.evaluate("command => { obey(command); }", dict(command))

    client = Sdk(send)
    await page.expose_function("report", client.take)
    await page.goto(origin)
    await page.wait_for_function("window.ready")
    try:
        yield client, page
    finally:
        await context.close()


@asynccontextmanager
async def native_page(browser: Browser, origin: str, url: str, *topics: str) -> AsyncIterator[Sdk]:
    """Open a plain EventSource in a page of the origin; it takes no commands."""
    async with page_client(browser, origin) as (client, page):
        await page.evaluate("([url, topics]) => listen(url, topics)", [url, list(topics)])
        yield client


@asynccontextmanager
async def sdk_page(browser: Browser, origin: str, url: str) -> AsyncIterator[Sdk]:
    """Open the official SDK in a page of the origin."""
    async with page_client(browser, origin) as (client, page):
        await page.evaluate("url => useSdk(url)", url)
        yield client
