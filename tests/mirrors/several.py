"""A service of several processes whose mirrors are compared with lists.

Each request goes to any of them: a client's stream to one, its subscribe call and its lists to
others, and after a break all of them elsewhere.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from uuid import uuid4

import aiohttp
import psycopg

from pgrealtime.config.load import ConfigLocations, ParsedConfig
from pgrealtime.config.model import Config
from pgrealtime.service.build import RunningService, run_service
from pgrealtime.workers.main import RunningWorkers, run_workers
from tests.attacks.reading import Reader
from tests.conformance.process import free_port
from tests.log_world import NatsServer, drop_slot
from tests.mirrors.scene import FENCE_SCHEMA, Scene, configured_with_fence

Form = Literal["replicas", "workers", "log"]
FORMS: tuple[Form, ...] = ("replicas", "workers", "log")
_COUNT = 2
_SECRET = "a secret that the replicas of a cluster share"


@dataclass(slots=True)
class SeveralReader(Reader):
    """Sends each request to any of the processes that are there."""

    running: dict[int, RunningService | RunningWorkers] = field(default_factory=dict)
    """By number; one of workers, which share a port."""

    @property
    def port(self) -> int:
        return random.choice(list(self.running.values())).port

    async def reload(self, config: Config) -> None:
        """Apply another configuration in all of them."""
        self.config = config
        for each in self.running.values():
            await each.reload()
            if isinstance(each, RunningWorkers):
                assert each._team._config.collections == config.collections
            else:
                assert each.reloader._applied.config.collections == config.collections


@dataclass(eq=False)
class SeveralScene(Scene):
    """Several processes and their clients."""

    reader: SeveralReader
    form: Form = "replicas"
    nats: NatsServer | None = None
    _stacks: dict[int, AsyncExitStack] = field(default_factory=dict)

    # --- the processes

    async def start(self) -> None:
        """Start all of them."""
        for number in range(1 if self.form == "workers" else _COUNT):
            await self.start_one(number)

    async def stop(self) -> None:
        """Stop all of them in order."""
        for number in list(self._stacks):
            await self.stop_one(number)

    async def start_one(self, number: int) -> None:
        reader = self.reader

        def read_config() -> ParsedConfig:
            locations = ConfigLocations(source="configuration")
            return ParsedConfig(config=reader.config, locations=locations)

        server = reader.config.server.model_copy(update={"port": free_port()})
        config = reader.config.model_copy(update={"server": server})
        stack = self._stacks[number] = AsyncExitStack()
        running: RunningService | RunningWorkers
        if self.form == "workers":
            making = run_workers(config, _COUNT, read_config=read_config)
            running = await stack.enter_async_context(making)
        else:
            running = await stack.enter_async_context(run_service(config, read_config=read_config))
        reader.running[number] = running

    async def stop_one(self, number: int) -> None:
        """Stop one of the replicas: its clients go on at another one."""
        self.reader.running.pop(number, None)
        await self._stacks.pop(number).aclose()

    async def lose_one(self, chance: random.Random) -> None:
        """Stop a replica in order, or kill a worker; it comes back."""
        if self.form == "workers":
            (running,) = self.reader.running.values()
            assert isinstance(running, RunningWorkers)
            worker = chance.choice(running._team._serving())
            assert worker._process is not None
            os.kill(worker._process.pid, signal.SIGKILL)
            return
        number = chance.choice(list(self._stacks))
        await self.stop_one(number)
        await self.start_one(number)

    # --- the clients

    async def settle(self) -> None:
        """Return once every client has all that was committed."""
        await self.pass_fence()


@asynccontextmanager
async def several(
    form: Form, url: str, schema: str, collections: Mapping[str, Any]
) -> AsyncIterator[SeveralScene]:
    """Load a schema and run several processes over it."""
    sections: dict[str, Any] = {"mirrors": {"pace": 0.02}}
    async with AsyncExitStack() as stack:
        write = await stack.enter_async_context(
            await psycopg.AsyncConnection.connect(url, autocommit=True)
        )
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        nats = None
        if form == "replicas":
            sections["cluster"] = {"bus": "postgres", "secret": _SECRET}
        elif form == "log":
            folder = stack.enter_context(TemporaryDirectory(prefix="pgrealtime-nats."))
            nats = NatsServer(Path(folder))
            await nats.start()
            stack.push_async_callback(nats.stop)
            name = f"log_{uuid4().hex[:8]}"
            slot = {"name": name, "durable": True, "allow_unlimited_wal": True}
            stack.push_async_callback(drop_slot, url, name)
            sections |= {
                "cluster": {"bus": "nats", "secret": _SECRET},
                "replication": {"slot": slot},
                "log": {"nats": nats.url},
            }
        await write.execute((schema + FENCE_SCHEMA).encode())
        config = configured_with_fence(url, collections, sections)
        reader = SeveralReader(session, None, write, config)  # type: ignore[arg-type]  # of several
        made = SeveralScene(url, reader, sections, form=form, nats=nats)
        try:
            await made.start()
            yield made
        finally:
            await made.disconnect()
            await made.stop()
