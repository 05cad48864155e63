"""The processor time of the pieces of work on the event loop, which other load doesn't change."""

import asyncio
import gc
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest


@contextmanager
def measuring_work() -> Iterator[list[float]]:
    """Collect the processor seconds of each piece of work on the event loop.

    Those of the garbage collector are left out: it scans all that the test process holds.
    """
    pieces: list[float] = []
    run, collecting = asyncio.Handle._run, 0.0

    def count_collector(phase: str, _info: Mapping[str, int]) -> None:
        nonlocal collecting
        if threading.current_thread() is threading.main_thread():
            now = time.thread_time()
            collecting += now if phase == "stop" else -now

    def run_measured(handle: asyncio.Handle) -> None:
        nonlocal collecting
        collecting, began = 0.0, time.thread_time()
        run(handle)
        pieces.append(time.thread_time() - began - collecting)

    gc.callbacks.append(count_collector)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio.Handle, "_run", run_measured)
            yield pieces
    finally:
        gc.callbacks.remove(count_collector)
