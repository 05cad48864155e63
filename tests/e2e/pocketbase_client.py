"""Drives the PyPI client ``pocketbase``, with the commands and reports of ``sdk_client.mjs``.

Runs as a program with that client on its path, which shares its package's name with
``pocketbase-async``.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pocketbase  # type: ignore[import-not-found]  # installed beside the others, not in .venv

MISSED_SECONDS = 3.0
"""After so long a connection without PB_CONNECT has missed it, on any machine."""


def report(**what: Any) -> None:
    """Print one line."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def on_answer(response: Any, data: Any, _: Any) -> Any:
    """Report subscribe calls: ``subscribe`` returns before the first is made."""
    if response.url.path.endswith("/api/realtime"):
        report(report="submitted", status=response.status_code)
    return data


class Driver:
    """One client."""

    def __init__(self, url: str) -> None:
        self._client = pocketbase.PocketBase(url)
        self._client.after_send = on_answer

    def token(self, token: str) -> None:
        self._client.auth_store.save(token, None)

    def login(self, collection: str, identity: str, password: str) -> None:
        self._client.collection(collection).auth_with_password(identity, password)

    def subscribe(self, collection: str, topic: str) -> None:
        def on_event(message: Any) -> None:
            record = message.record
            report(
                report="event",
                action=message.action,
                record={"id": record.id, "title": record.title, "n": record.n},
            )

        of = self._client.collection(collection)
        if topic == "*":
            of.subscribe(on_event)
        else:
            of.subscribe_one(topic, on_event)
        self._see_connected()

    def _see_connected(self) -> None:
        """Reconnect where the client missed its PB_CONNECT, for which it then waits for ever.

        It opens its stream in a thread before it registers for that event.
        """
        realtime = self._client.realtime
        for _ in range(5):
            until = time.monotonic() + MISSED_SECONDS
            while not realtime.client_id and time.monotonic() < until:
                time.sleep(0.01)  # the client reports nothing
            if realtime.client_id:
                return
            realtime._connect()

    def unsubscribe(self, collection: str, topic: str) -> None:
        self._client.collection(collection).unsubscribe(topic)


def main() -> None:
    """Execute commands until standard input ends."""
    driver = Driver(sys.argv[1])
    for line in sys.stdin:
        command = json.loads(line)
        number = command.pop("number")
        try:
            getattr(driver, command.pop("do"))(**command)
            report(report="done", number=number)
        except Exception as error:  # noqa: BLE001 (whatever the client throws is the answer)
            status = getattr(error, "status", 0)
            report(report="failed", number=number, status=status, message=repr(error))


main()
