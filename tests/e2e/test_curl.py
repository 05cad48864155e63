"""A session by hand, as the README shows it."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.curl import curl, post
from tests.e2e.service import service, token


async def test_two_terminals_are_enough_to_receive_events(
    database_url: str, tmp_path: Path
) -> None:
    """One keeps the stream open, the other subscribes with its client id and a token."""
    async with service(database_url, tmp_path) as running:
        url = f"{running.url}/api/realtime"
        async with curl(url) as stream:
            status = await stream.line()
            client_id = await stream.client_id()
            bearer = ("-H", f"Authorization: Bearer {token('ann')}")
            await post(url, client_id, "posts/*", arguments=bearer)
            for statement in (
                "INSERT INTO posts (id, title, author) VALUES ('p', 'mine', 'ann')",
                "UPDATE posts SET title = 'still mine'",
                "DELETE FROM posts",
            ):
                await running.write.execute(statement.encode())
            events = [await stream.data_of("posts/*") for _ in range(3)]

    assert status == "HTTP/1.1 200 OK"
    assert [(e["action"], e["record"]["title"]) for e in events] == [
        ("create", "mine"),
        ("update", "still mine"),
        ("delete", "still mine"),
    ]


async def test_curl_resumes_with_the_id_of_the_last_message(
    database_url: str, tmp_path: Path
) -> None:
    """The id is sent in the address or as Last-Event-ID; what was missed comes first."""
    insert = "INSERT INTO posts (id, title, public) VALUES (%s, 'x', true)"
    async with service(database_url, tmp_path) as running:
        url = f"{running.url}/api/realtime"
        async with curl(f"{url}?lastEventId=") as stream:
            await post(url, await stream.client_id(), "posts/*")
            await running.write.execute(insert, ["heard"])
            last = ""
            while (line := await stream.line()) != "event:posts/*":
                last = line.removeprefix("id:") if line.startswith("id:") else last
        await running.write.execute(insert, ["missed"])
        async with curl("-H", f"Last-Event-ID: {last}", url) as stream:
            await post(url, await stream.client_id(), "posts/*")
            by_header = await stream.data_of("posts/*")
        async with curl(f"{url}?lastEventId={last}") as stream:
            await post(url, await stream.client_id(), "posts/*")
            by_address = await stream.data_of("posts/*")

    assert [by_header["record"]["id"], by_address["record"]["id"]] == ["missed", "missed"]
