"""Tasks that end although a library swallows their cancellation.

The client library of NATS does so when it comes while a message is sent. ``asyncio.TaskGroup``
cancels once, and would then wait for ever.
"""

import asyncio
from collections.abc import Collection, Coroutine
from contextlib import suppress
from typing import Any

_AGAIN_SECONDS = 0.05


async def run_together(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run the coroutines until one raises, and end the others; raise what it raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failed = [task for task in tasks if task.done()]
    finally:
        await end_tasks(tasks)
    for task in failed:
        task.result()


async def end_tasks(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancel the tasks until they have ended."""
    while running := [task for task in tasks if not task.done()]:
        for task in running:
            task.cancel()
        # Whoever cancels this one may do so again as well; its own exception goes on afterwards.
        with suppress(asyncio.CancelledError):
            await asyncio.wait(running, timeout=_AGAIN_SECONDS)
