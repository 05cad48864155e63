"""Several processes of one cluster, each with an operator's port, behind a load balancer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conformance.http_client import Address, Request, send
from tests.conformance.process import POLL_SECONDS, free_port
from tests.e2e.numbered import OPEN
from tests.e2e.service import SCHEMA, Service, service
from tests.e2e.test_admin import scrape

READY_SECONDS = 60.0

CLUSTER = {"bus": "postgres", "secret": "a cluster's secret of thirty-two bytes", "warm_up": "0s"}


@dataclass(frozen=True, slots=True)
class Replica:
    """One process."""

    service: Service
    admin: Address

    @property
    def address(self) -> Address:
        return self.service.address

    @property
    def pid(self) -> int:
        return self.service.process.pid

    async def not_ready_reasons(self) -> list[str]:
        """Return what ``/ready`` says; nothing if it is ready."""
        answer = await send(Request(method="GET", path="/ready", headers={}), self.admin)
        reasons: list[str] = json.loads(answer.body).get("reasons", [])
        return reasons

    async def wait_ready(self) -> None:
        async with asyncio.timeout(READY_SECONDS):
            while await self.not_ready_reasons():
                await asyncio.sleep(POLL_SECONDS)  # as a probe does

    async def forwarded(self) -> float:
        """Return the number of calls that it passed on since its start."""
        counts = (await scrape(self.admin)).items()
        return sum(n for name, n in counts if name.startswith("calls_forwarded_total"))

    def kill(self) -> None:
        """End it at once, by its own id."""
        os.kill(self.pid, signal.SIGKILL)


@asynccontextmanager
async def replicas(
    database_url: str,
    directory: Path,
    count: int = 3,
    *,
    cluster: Mapping[str, Any] | None = None,
    collections: Mapping[str, Mapping[str, Any]] = OPEN,
    **sections: Mapping[str, Any],
) -> AsyncIterator[list[Replica]]:
    """Start processes on one database; the tables are those of ``service.SCHEMA``."""
    async with AsyncExitStack() as stack:
        made = []
        for n in range(count):
            admin = free_port()
            own = directory / f"replica{n}"
            own.mkdir()
            running = await stack.enter_async_context(
                service(
                    database_url,
                    own,
                    sections={
                        "cluster": {**CLUSTER, **(cluster or {})},
                        "admin": {"port": admin},
                        **sections,
                    },
                    collections=collections,
                    schema="" if n else SCHEMA,
                )
            )
            made.append(Replica(running, Address(host="127.0.0.1", port=admin)))
        for replica in made:
            await replica.wait_ready()
        yield made
