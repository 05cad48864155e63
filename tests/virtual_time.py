"""An event loop whose clock jumps to the next timer instead of waiting: minutes take no time.

No task may wait for anything outside the process. The order of events depends on the program alone,
so a run that takes its choices from a seed can be repeated.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.pass_time: Callable[[float], None] = _refuse

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("everybody waits and nothing will ever happen")
        self.pass_time(max(timeout, 0.0))
        return super().select(0)


def _refuse(_seconds: float) -> None:
    raise AssertionError


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        selector = _JumpingSelector()
        super().__init__(selector)
        self._seconds = 0.0
        selector.pass_time = self._pass

    def _pass(self, seconds: float) -> None:
        self._seconds += seconds

    def time(self) -> float:
        return self._seconds


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run the coroutine in virtual time.

    Raises:
        BaseExceptionGroup: Tasks or callbacks failed that no task awaited.
    """
    faults: list[BaseException] = []
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        runner.get_loop().set_exception_handler(
            lambda _loop, context: faults.append(
                context.get("exception") or RuntimeError(context["message"])
            )
        )
        result = runner.run(main)
    if faults:
        raise BaseExceptionGroup("nobody looked at these", faults)
    return result
