"""A process of hostile clients: each kind of attack runs again and again, at a steady pace.

It is the child of ``hostile``, which names the port and the kinds (all, if none); it ends when its
standard input is closed. Each kind comes from an address of its own in 127.0.0.0/8, so that limits
per address separate attackers from other clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from tests.topics import topic

_FILTERS = (
    # Every item against every item.
    'tags:each ~ "%a%_%b%" && tags:each != "x" && tags:each !~ "y%z"',
    # Backtracking over a long text.
    f'html ~ "{"%_a" * 200}b"',
    f'html ~ "{"_%" * 250}"',
    " || ".join(f'html~"{n}x%y"' for n in range(60)),
    # Queries for PostgreSQL, different in each subscription.
    "owner.name ~ '%{n}%' || owner.pages_via_owner.html ~ '%{n}%{n}%'",
    "@collection.pages.html ~ '%{n}%' && @collection.users.name ?~ '{n}'",
)
"""Each just below a limit: a topic has at most 2,500 characters."""
_FIELDS = ",".join(["*"] + [f"html:excerpt({n},true)" for n in range(100, 160)])
_EXPAND = "owner.pages_via_owner.owner.pages_via_owner.owner.pages_via_owner"


async def main() -> None:
    """Attack until the parent closes our standard input."""
    os.nice(19)  # the honest clients share this core; attackers have machines of their own
    port = int(sys.argv[1])
    done: Counter[str] = Counter()
    chosen = sys.argv[2:] or list(KINDS)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks = [
        asyncio.create_task(_again(KINDS[name], port, done), name=name)
        for name in chosen
        for _ in range(3)
    ]
    await reader.read()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    sys.stdout.write(json.dumps(done) + "\n")


async def _again(
    kind: Callable[[int, Counter[str]], Awaitable[None]], port: int, done: Counter[str]
) -> None:
    while True:
        try:
            async with asyncio.timeout(30):
                await kind(port, done)
            done[kind.__name__] += 1
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            done[f"{kind.__name__}: {type(error).__name__}"] += 1
        await asyncio.sleep(0.2)


# --- the kinds ---------------------------------------------------------------------------------


async def filters(port: int, done: Counter[str]) -> None:
    """Subscribe with expensive filters, receive some changes, disconnect."""
    async with contextlib.AsyncExitStack() as stack:
        for text in _FILTERS:
            client = await stack.enter_async_context(_stream(port, 2))
            name = topic("pages/*", filter=text.replace("{n}", str(random.randrange(10**6))))
            await _subscribe(port, 2, client, [name], done)
        await asyncio.sleep(5)


async def stalled(port: int, done: Counter[str]) -> None:
    """Submit a thousand topics that match each change, and read nothing."""
    async with _stream(port, 3) as client:
        names = [topic("pages/*", fields=f"*,n{n % 90}", n=str(n)) for n in range(1000)]
        await _subscribe(port, 3, client, names, done)
        await asyncio.sleep(20)


async def bodies(port: int, done: Counter[str]) -> None:
    """Announce 31 MB, send most of it, and never end."""
    writers = []
    try:
        for _ in range(10):
            _, writer = await _connect(port, 4)
            writers.append(writer)
            writer.write(
                b"POST /api/realtime HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 31000000\r\n\r\n"
            )
        piece = b'{"clientId":"' + b"x" * 1_000_000
        for _ in range(20):
            for writer in writers:
                writer.write(piece)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await writer.drain()
        await asyncio.sleep(3)
    finally:
        for writer in writers:
            writer.transport.abort()
    done["bodies sent"] += 1


async def logins(port: int, done: Counter[str]) -> None:
    """Guess passwords of known and unknown users."""
    for n in range(10):
        body = json.dumps({"identity": f"ann{' ' * n}@example.com", "password": "x" * 70})
        status = await _post(port, 5, "/api/collections/users/auth-with-password", body.encode())
        done[f"login {status}"] += 1


async def topics(port: int, done: Counter[str]) -> None:
    """Submit the longest lists of topics."""
    async with _stream(port, 6) as client:
        for turn in range(5):
            names = [f"pages/{turn}-{n}-{'x' * 350}" for n in range(1000)]
            await _subscribe(port, 6, client, names, done)
            await asyncio.sleep(0.5)


async def fields(port: int, done: Counter[str]) -> None:
    """Request long excerpts and deep expands, all different."""
    async with _stream(port, 7) as client:
        names = [topic("pages/*", fields=f"{_FIELDS},n{n}", expand=_EXPAND) for n in range(90)]
        await _subscribe(port, 7, client, names, done)
        await asyncio.sleep(5)


KINDS: Mapping[str, Callable[[int, Counter[str]], Awaitable[None]]] = {
    kind.__name__: kind for kind in (filters, stalled, bodies, logins, topics, fields)
}


# --- HTTP --------------------------------------------------------------------------------------


async def _connect(port: int, host: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(
        "127.0.0.1", port, local_addr=(f"127.0.0.{host}", 0), limit=2**20
    )


@contextlib.asynccontextmanager
async def _stream(port: int, host: int) -> AsyncIterator[str]:
    """Open an event stream; yield its client id. Only 2 MB of what follows are read."""
    reader, writer = await _connect(port, host)
    try:
        writer.write(b"GET /api/realtime HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await reader.readuntil(b"}\n\n")
        yield head.partition(b'"clientId":"')[2].partition(b'"')[0].decode()
    finally:
        writer.transport.abort()


async def _subscribe(
    port: int, host: int, client: str, names: list[str], done: Counter[str]
) -> None:
    body = json.dumps({"clientId": client, "subscriptions": names}).encode()
    status = await _post(port, host, "/api/realtime", body)
    done[f"subscribe {status}"] += 1


async def _post(port: int, host: int, path: str, body: bytes) -> int:
    reader, writer = await _connect(port, host)
    try:
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        return int((await reader.readuntil(b"\r\n")).split()[1])
    finally:
        writer.transport.abort()


if __name__ == "__main__":
    asyncio.run(main())
