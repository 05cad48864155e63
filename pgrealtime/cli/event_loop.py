"""Runs the coroutines of the commands ``run`` and ``demo`` on uvloop where that is installed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


def run_coroutine(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in a new event loop."""
    try:
        import uvloop  # noqa: PLC0415 (there is none for Windows and PyPy)
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(coroutine)
