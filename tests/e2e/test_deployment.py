"""What the manifests of ``config/deploy`` start, started here."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from tests.conformance.http_client import Address
from tests.conformance.pgrealtime_server import command
from tests.conformance.process import POLL_SECONDS, ServerProcess, free_port
from tests.deployment import DEPLOY, Container, read_compose, read_kubernetes
from tests.e2e.listener import listener
from tests.e2e.proxy import proxy_with
from tests.e2e.service import SECRET, token
from tests.e2e.test_admin import ask
from tests.log_world import drop_slot, nats_program

SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY, email text);
CREATE TABLE posts (
  id text PRIMARY KEY, title text, author text REFERENCES users, published boolean NOT NULL
);
ALTER TABLE users REPLICA IDENTITY FULL;
ALTER TABLE posts REPLICA IDENTITY FULL;
INSERT INTO users VALUES ('ann', 'ann@example.com');
"""
ADMIN_TOKEN = "the operator's token"
NATS_PASSWORD = "a-password-of-nats"
NATS_IMAGE = "nats:2.10"
NATS_FILE = "/etc/nats/nats.conf"


def secrets_for(url: str) -> dict[str, str]:
    return {
        "DATABASE_URL": url,
        "QUERY_URL": url,
        "APP_DATABASE_URL": url,
        "APP_JWT_SECRET": SECRET,
        "CLUSTER_SECRET": "a cluster's secret of thirty-two bytes",
        "ADMIN_TOKEN": ADMIN_TOKEN,
        "NATS_PASSWORD": NATS_PASSWORD,
        "NATS_URL": f"nats://pgrealtime:{NATS_PASSWORD}@nats:4222",
    }


@dataclass(frozen=True, slots=True)
class Started:
    """A container as a process, on ports of its own."""

    container: Container
    address: Address
    admin: Address


@asynccontextmanager
async def started(container: Container, directory: Path, **changed: str) -> AsyncIterator[Started]:
    """Run the container's command with its arguments, environment and files."""
    address, admin = (Address(host="127.0.0.1", port=free_port()) for _ in range(2))
    arguments = [str(container.files.get(text, text)) for text in container.arguments]
    ports = {
        "PGREALTIME_SERVER__PORT": str(address.port),
        "PGREALTIME_ADMIN__PORT": str(admin.port),
        "PGREALTIME_CLUSTER__WARM_UP": "1s",
    }
    process = await ServerProcess.start(
        [command(), *arguments],
        directory / f"{container.name}.log",
        {**container.environment, **ports, **changed},
    )
    try:
        await process.wait_healthy(address)
        yield Started(container, address, admin)
    finally:
        await process.stop()


@asynccontextmanager
async def writing(url: str) -> AsyncIterator[psycopg.AsyncConnection]:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(SCHEMA.encode())
        yield connection


async def wait_ready(container: Started) -> None:
    async with asyncio.timeout(30):
        while (await ask(container.admin, "/ready"))[0] != 200:
            await asyncio.sleep(POLL_SECONDS)  # as a probe does


async def run_healthcheck(container: Started) -> int:
    """Run the container's own check, on this process's port; return its exit code."""
    kind, program, *arguments = container.container.healthcheck
    assert (kind, program) == ("CMD", "python")
    arguments = [text.replace("8091", str(container.admin.port)) for text in arguments]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stderr=asyncio.subprocess.DEVNULL
    )
    return await process.wait()


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("sidecar", "compose"),
        ("sidecar", "kubernetes"),
        ("replicas", "kubernetes"),
        ("log", "kubernetes"),
    ],
)
async def test_a_container_serves_what_its_configuration_says(
    form: str, kind: str, database_url: str, tmp_path: Path
) -> None:
    secrets, file = secrets_for(database_url), DEPLOY / form / f"{kind}.yaml"
    if kind == "compose":
        (container, *_), nats = read_compose(file, secrets), []
    else:
        (container,) = read_kubernetes(file, secrets, tmp_path)
        nats = read_kubernetes(file, secrets, tmp_path, image=NATS_IMAGE)
    assert len(nats) == (form == "log")
    async with (
        writing(database_url) as write,
        log_for([container], nats, database_url, tmp_path) as changed,
        started(container, tmp_path, **changed) as running,
    ):
        await wait_ready(running)
        probes = [(await ask(running.admin, path))[0] for path in container.probe_paths]
        healthy = await run_healthcheck(running) if container.healthcheck else 0
        (without, _), (with_, _) = [
            await ask(running.admin, "/metrics", key) for key in ("", ADMIN_TOKEN)
        ]
        async with listener(running.address, "posts/*", token=token("ann")) as ann:
            await write.execute("INSERT INTO posts VALUES ('p1', 'Draft', 'ann', false)")
            (message,) = await ann.take(1)

    assert message.data["record"]["id"] == "p1"
    assert (set(probes), healthy, with_) == ({200} if probes else set(), 0, 200)
    assert without == (401 if kind == "kubernetes" else 200)


async def test_a_healthcheck_fails_where_nothing_is_ready() -> None:
    """A check that always passes checks nothing."""
    container, *_ = read_compose(DEPLOY / "sidecar" / "compose.yaml", secrets_for("x"))
    nowhere = Address(host="127.0.0.1", port=free_port())
    assert await run_healthcheck(Started(container, nowhere, nowhere)) != 0


def nats_config(container: Container, directory: Path, address: Address, monitor: Address) -> Path:
    """Return a copy of the server's file with ports and a folder of the test's own."""
    changes = {
        "listen: 0.0.0.0:4222": f"listen: {address.host}:{address.port}",
        "http: 8222": f"http: {monitor.host}:{monitor.port}",
        "store_dir: /data": f'store_dir: "{directory}/nats"',
    }
    text = container.files[NATS_FILE].read_text()
    for line, other in changes.items():
        assert line in text
        text = text.replace(line, other)
    (config := directory / "nats.conf").write_text(text)
    return config


@asynccontextmanager
async def nats_with(container: Container, directory: Path) -> AsyncIterator[Started]:
    """Run a NATS server's container."""
    address, monitor = (Address(host="127.0.0.1", port=free_port()) for _ in range(2))
    config = str(nats_config(container, directory, address, monitor))
    process = await ServerProcess.start(
        [nats_program(), *(config if text == NATS_FILE else text for text in container.arguments)],
        directory / "nats.log",
        container.environment,
    )
    try:
        yield Started(container, address, monitor)
    finally:
        await process.stop()


@asynccontextmanager
async def log_for(
    containers: list[Container], nats: list[Container], database_url: str, directory: Path
) -> AsyncIterator[dict[str, str]]:
    """Run NATS for containers that have a log; yield what differs in their environments here."""
    if not nats:
        yield {}
        return
    slot = f"log_{uuid4().hex[:8]}"
    async with nats_with(nats[0], directory) as running:
        url = containers[0].environment["NATS_URL"]
        try:
            yield {
                "NATS_URL": url.replace(
                    "nats:4222", f"{running.address.host}:{running.address.port}"
                ),
                "PGREALTIME_REPLICATION__SLOT__NAME": slot,
                # The server of the tests sets no limit.
                "PGREALTIME_REPLICATION__SLOT__ALLOW_UNLIMITED_WAL": "true",
            }
            for path in nats[0].probe_paths:
                assert (await ask(running.admin, path))[0] == 200
        finally:
            await drop_slot(database_url, slot)


@pytest.mark.parametrize("form", ["replicas", "log"])
async def test_three_replicas_behind_nginx_are_as_one(
    form: str, database_url: str, tmp_path: Path
) -> None:
    """Most calls arrive at another replica than the one that has the connection."""
    file, secrets = DEPLOY / form / "compose.yaml", secrets_for(database_url)
    containers = read_compose(file, secrets)
    nats = read_compose(file, secrets, image=NATS_IMAGE)
    assert len(containers) == 3
    assert len(nats) == (form == "log")
    async with AsyncExitStack() as stack:
        write = await stack.enter_async_context(writing(database_url))
        changed = await stack.enter_async_context(log_for(containers, nats, database_url, tmp_path))
        starting = (
            stack.enter_async_context(started(one, tmp_path, **changed)) for one in containers
        )
        running = [await one for one in starting]
        edits = {
            f"{one.container.name}:8090": f"{one.address.host}:{one.address.port}"
            for one in running
        }
        nginx = await stack.enter_async_context(
            proxy_with("nginx", DEPLOY / form / "nginx.conf", tmp_path, edits)
        )
        for one in running:
            await wait_ready(one)
        clients = [
            await stack.enter_async_context(listener(nginx.address, "posts/*", token=token("ann")))
            for _ in range(12)
        ]
        refused = await clients[0].subscribe("posts/*")
        await write.execute("INSERT INTO posts VALUES ('p1', 'Draft', 'ann', false)")
        received = [(await one.take(1))[0].data["record"]["id"] for one in clients]
        holders = {one.client_id[:6] for one in clients}
        counts = [(await ask(one.admin, "/metrics"))[1] for one in running]

    assert received == ["p1"] * 12
    assert refused == 403
    assert len(holders) == 3
    assert any('pgrealtime_calls_forwarded_total{result="ok"}' in text for text in counts)
