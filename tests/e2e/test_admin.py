"""The operator's port, over HTTP: the metrics agree with what happened."""

from __future__ import annotations

import json
import platform
import re
import socket
from pathlib import Path

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pgrealtime import __version__
from pgrealtime.hub.evaluation.filter_limits import REMOTE_FILTERS_PER_CONNECTION as COSTLY
from tests.conformance.http_client import Address, Request, send
from tests.conformance.pgrealtime_server import command
from tests.conformance.process import ServerProcess, free_port
from tests.e2e.listener import Caller, listener
from tests.e2e.service import service, token
from tests.topics import topic

COLLECTIONS = {
    "users": {"table": "users", "type": "auth", "list_rule": ""},
    "posts": {"table": "posts", "list_rule": "author.name != 'Bob'"},
}


async def ask(address: Address, path: str, key: str = "") -> tuple[int, str]:
    """Return the status and the body."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    response = await send(Request(method="GET", path=path, headers=headers, body=b""), address)
    return response.head.status, response.body.decode()


async def scrape(address: Address) -> dict[str, float]:
    """Return every sample, by its name with labels."""
    status, text = await ask(address, "/metrics")
    assert status == 200
    return {
        sample.name.removeprefix("pgrealtime_")
        + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def wait_for(address: Address, name: str, value: float) -> dict[str, float]:
    """Scrape until the condition holds; pytest's time-out is the deadline."""
    while (found := await scrape(address)).get(name) != value:
        pass
    return found


def admin(**more: object) -> tuple[Address, dict[str, dict[str, object]]]:
    port = free_port()
    return Address(host="127.0.0.1", port=port), {"admin": {"port": port, **more}}


async def test_metrics_say_what_happened(database_url: str, tmp_path: Path) -> None:
    at, sections = admin()
    asking = topic("posts/*", filter="author.name~'n'")
    topics = [f"{asking}&{n}" for n in range(COSTLY)]
    sections |= {"database": {"statement_timeout": "300ms"}}
    async with service(
        database_url, tmp_path, sections=sections, collections=COLLECTIONS
    ) as running:
        before = await wait_for(at, "replication_connected", 1)  # it may follow the service
        async with (
            listener(running.address, "users/*", "posts/*", token=token("ann")) as ann,
            listener(running.address, *topics, token="nonsense") as greedy,
        ):
            assert await greedy.subscribe(*topics, f"{asking}&more") == 400
            await running.write.execute(
                "INSERT INTO posts (id, title, author) VALUES ('a', '', 'ann'), ('b', '', 'bob')"
            )
            await running.write.execute("INSERT INTO users (id, name) VALUES ('eve', 'Eve')")
            await ann.take(2)
            await greedy.take(COSTLY)
            during = await scrape(at)
            async with await psycopg.AsyncConnection.connect(database_url) as locker:
                await locker.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
                await running.write.execute("UPDATE posts SET title = 'b' WHERE id = 'a'")
                late = await wait_for(at, "rule_query_errors_total{posts}{timeout}", 1)
                await locker.rollback()
        after = await wait_for(at, "connections_closed_total{client}", 2)

    assert (before["connections"], during["connections"], after["connections"]) == (0, 2, 0)
    assert before[f"build_info{{{platform.python_version()}}}{{{__version__}}}"] == 1
    assert during["subscriptions{posts}"] == COSTLY + 1
    assert during["subscriptions{users}"] == 1
    assert after["subscriptions{posts}"] == after["subscriptions{users}"] == 0
    assert during["expensive_filters_refused_total"] == 1
    assert during["auth_checks_total{accepted}"] == 1
    assert during["auth_checks_total{token_malformed}"] == 1
    assert during["events_sent_total"] == COSTLY + 2
    # Subscriptions with filters may have received the update too: all of them or none.
    assert after["events_sent_total"] - during["events_sent_total"] in {0, COSTLY}
    assert before["replication_changes_total"] == 0
    assert during["replication_changes_total"] == 3
    assert during["changelog_bytes"] > before["changelog_bytes"] == 0
    assert during["rule_query_seconds_count"] >= 1
    assert late["rule_query_seconds_sum"] >= during["rule_query_seconds_sum"] + 0.3
    assert during["replication_lag_bytes"] >= 0
    assert during["slot_retained_bytes"] >= during["replication_lag_bytes"]
    assert during["process_resident_memory_bytes"] > 0


async def test_lists_and_records_are_counted_by_result(database_url: str, tmp_path: Path) -> None:
    at, sections = admin()
    async with service(
        database_url, tmp_path, sections=sections, collections=COLLECTIONS
    ) as running:
        for path in ("posts/records", "posts/records?sort=nope", "posts/records/nope"):
            target = Request(method="GET", path=f"/api/collections/{path}", headers={})
            await send(target, running.address)
        found = await scrape(at)

    assert {name: count for name, count in found.items() if name.startswith("reads_total")} == {
        "reads_total{list}{ok}": 1,
        "reads_total{list}{read_invalid}": 1,
        "reads_total{view}{read_locked}": 1,
    }


async def test_why_connections_end_is_counted(database_url: str, tmp_path: Path) -> None:
    """A connection that the service ends doesn't count as closed by the client."""
    at, sections = admin()
    sections |= {"realtime": {"idle_timeout": "2s"}}
    async with (
        service(database_url, tmp_path, sections=sections) as running,
        listener(running.address, "posts/*") as idle,
    ):
        await idle.stream.wait_end(20)
        after = await wait_for(at, "connections", 0)

    assert after["connections_closed_total{idle}"] == 1


async def test_gaps_and_resumes_are_counted(database_url: str, tmp_path: Path) -> None:
    at, sections = admin()
    async with service(
        database_url, tmp_path, sections=sections, collections=COLLECTIONS
    ) as running:
        async with listener(running.address, "users/*", "PB_CURSOR") as first:
            (cursor,) = await first.take(1)
        _client, _, position = cursor.id.rpartition(".")
        other, rest = "0" if position[0] != "0" else "1", position[1:]
        async with (
            listener(running.address, caller=_coming_back(cursor.id)) as back,
            listener(running.address, caller=_coming_back(f"x.{other}{rest}")) as lost,
        ):
            for one in (back, lost):
                assert await one.subscribe("users/*", "PB_RESYNC") == 204
            await lost.take(1)
            during = await scrape(at)
            await running.write.execute("TRUNCATE users CASCADE")
            await back.take(1)
            await lost.take(1)
            after = await scrape(at)

    assert during["resumes_total{resumed}"] == during["resumes_total{unknown}"] == 1
    assert during["gaps_total{unknown}"] == 1
    assert after["gaps_total{truncate}"] == 2


def _coming_back(position: str) -> Caller:
    return Caller(headers={"Last-Event-ID": position})


async def _settled(at: Address) -> None:
    while (await ask(at, "/ready"))[0] != 200:
        pass


async def test_readiness_says_what_is_missing(database_url: str, tmp_path: Path) -> None:
    """The process stays alive: a restart would help nothing."""
    at, sections = admin()
    async with service(database_url, tmp_path, sections=sections, collections=COLLECTIONS):
        await _settled(at)
        ready = await ask(at, "/ready")
        name = database_url.rpartition("/")[2]
        admin_url = database_url.removesuffix(name) + "postgres"
        async with await psycopg.AsyncConnection.connect(admin_url, autocommit=True) as server:
            await server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false'.encode())
            await server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,)
            )
            status, body = await ask(at, "/ready")
            while len(json.loads(body).get("reasons", ())) < 2:
                status, body = await ask(at, "/ready")
            live, metrics = await ask(at, "/live"), await scrape(at)
            await server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'.encode())
        await _settled(at)

    assert ready == (200, '{"status": "ready"}')
    assert (status, json.loads(body)["reasons"]) == (503, ["stream_away", "database_away"])
    assert live[0] == 200
    assert metrics["replication_connected"] == 0
    assert metrics["replication_breaks_total{stream_interrupted}"] == 1
    assert "replication_lag_bytes" not in metrics


async def test_metrics_need_the_token_and_health_checks_do_not(
    database_url: str, tmp_path: Path
) -> None:
    at, sections = admin(token="to be kept")
    async with service(
        database_url, tmp_path, sections=sections, collections=COLLECTIONS
    ) as running:
        found = [(await ask(at, "/metrics", key))[0] for key in ("", "to be kep", "to be kept")]
        await _settled(at)

        assert found == [401, 401, 200]
        assert (await ask(at, "/live"))[0] == 200
        assert (await ask(running.address, "/metrics"))[0] == 404


@pytest.mark.parametrize(
    ("host", "hint"),
    [
        ("127.0.0.1", "Give admin.port another number, or end the process that uses it."),
        ("192.0.2.1", "Set admin.host to an address of this machine."),
    ],
    ids=["port", "host"],
)
async def test_without_a_port_there_is_none_and_one_that_is_not_to_be_had_is_named(
    database_url: str, tmp_path: Path, host: str, hint: str
) -> None:
    async with service(database_url, tmp_path, collections=COLLECTIONS) as running:
        config = (tmp_path / "pgrealtime.yaml").read_text()
        assert "admin:" not in config.splitlines()
        assert (await ask(running.address, "/api/health"))[0] == 200
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = tmp_path / "other.yaml"
        path.write_text(config + f"admin: {{host: {host}, port: {port}, token: secret}}\n")
        process = await ServerProcess.start([command(), "run", "-c", str(path)], tmp_path / "log")
        expected = rf"port_unavailable: can't listen on admin\.port\n(.|\n)*HINT: {re.escape(hint)}"
        with pytest.raises(Exception, match=expected):
            await process.wait_healthy(running.address, "")
        await process.stop()
