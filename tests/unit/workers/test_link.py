"""The link between main process and worker, over a real socket pair."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from pgrealtime.errors import HolderGoneError, PgRealtimeError, SetupError, WorkerGoneError
from pgrealtime.workers.feed import WorkerBus
from pgrealtime.workers.link import LENGTH_BYTES, Answering, Link, MessageSplitter
from pgrealtime.workers.messages import Beat, Bytes, Call, Done, Message, Stop

Answer = Callable[[Message], Answering]


def nothing(_message: Message) -> None:
    pass


@asynccontextmanager
async def linked(answer: Answer) -> AsyncIterator[tuple[Link, Link]]:
    """Two ends of a link, of which the second answers."""
    loop = asyncio.get_running_loop()
    one, other = Link(nothing), Link(answer)
    ours, theirs = socket.socketpair()
    await loop.create_unix_connection(lambda: one, sock=ours)
    await loop.create_unix_connection(lambda: other, sock=theirs)
    try:
        async with asyncio.timeout(10):
            yield one, other
    finally:
        one.close()
        other.close()


@pytest.mark.parametrize("seed", range(20))
def test_messages_are_cut_as_they_were_sent(seed: int) -> None:
    """However the socket divides the bytes."""
    rng = random.Random(seed)
    sent = [rng.randbytes(rng.choice([0, 1, 5, 70_000])) for _ in range(20)]
    data = b"".join(len(one).to_bytes(LENGTH_BYTES) + one for one in sent)
    splitter, received = MessageSplitter(), []
    while data:
        size = rng.choice([1, 3, 100, 100_000])
        received += splitter.feed(data[:size])
        data = data[size:]
    assert received == sent


async def test_each_question_gets_its_own_answer() -> None:
    """In whatever order they are answered."""

    async def answer(message: Message) -> Message:
        assert isinstance(message, Call)
        await asyncio.sleep(0.001 * (5 - int(message.tag)))
        return Bytes(message.request)

    async with linked(answer) as (one, _):
        asked = [one.ask(Call(str(n), b"%d" % n), Bytes) for n in range(5)]
        assert [found.data for found in await asyncio.gather(*asked)] == [
            b"%d" % n for n in range(5)
        ]


async def test_an_error_arrives_with_code_detail_and_hint() -> None:
    async def answer(_message: Message) -> Message:
        raise SetupError("no", detail="It is so.", hint="Do this.", code="wal_level")

    async with linked(answer) as (one, _):
        with pytest.raises(PgRealtimeError) as caught:
            await one.ask(Stop(), Done)
    assert str(caught.value) == "wal_level: no\nDETAIL: It is so.\nHINT: Do this."


async def test_a_defect_is_an_answer_too() -> None:
    """Nobody waits for ever."""

    async def answer(_message: Message) -> Message:
        raise KeyError("row value")

    async with linked(answer) as (one, _):
        with pytest.raises(PgRealtimeError, match="internal") as caught:
            await one.ask(Stop(), Done)
    assert "row value" not in str(caught.value)


async def test_what_is_asked_of_a_process_that_ends_fails() -> None:
    never = asyncio.Event()

    async def answer(_message: Message) -> None:
        await never.wait()

    async with linked(answer) as (one, other):
        asking = asyncio.create_task(one.ask(Stop(), Done))
        await asyncio.sleep(0.01)
        other.close()
        with pytest.raises(WorkerGoneError):
            await asking
        await one.closed.wait()
        with pytest.raises(WorkerGoneError):
            await one.ask(Stop(), Done)
        one.tell(Beat(0))


async def test_what_is_asked_of_a_process_that_is_silent_is_given_up() -> None:
    """It isn't waited for; its late answer is nobody's."""
    go_on = asyncio.Event()

    async def answer(_message: Message) -> None:
        await go_on.wait()

    async with linked(answer) as (one, _):
        asking = asyncio.create_task(one.ask(Stop(), Done))
        await asyncio.sleep(0.01)
        one.give_up()
        with pytest.raises(WorkerGoneError):
            await asking
        go_on.set()
        assert await one.ask(Stop(), Done) == Done()


async def test_the_answer_of_another_process_is_passed_back() -> None:
    """As the main process does with calls: its answer, its error, or that it ended."""

    async def answer(message: Message) -> Message:
        assert isinstance(message, Call)
        if message.tag == "error":
            raise SetupError("no", code="wal_level")
        return Bytes(message.request)

    async with linked(answer) as (to_holder, holder):

        def forward(message: Message) -> Answering:
            return to_holder.ask_soon(message)

        async with linked(forward) as (one, _):
            assert await one.ask(Call("ok", b"x"), Bytes) == Bytes(b"x")
            with pytest.raises(PgRealtimeError, match="wal_level"):
                await one.ask(Call("error", b""), Bytes)
            holder.close()
            await to_holder.closed.wait()
            with pytest.raises(PgRealtimeError, match="worker_gone"):
                await one.ask(Call("ok", b""), Bytes)


async def test_a_call_for_a_worker_that_is_gone_says_so() -> None:
    async def answer(message: Message) -> Message:
        assert isinstance(message, Call)
        raise HolderGoneError(message.tag)

    async with linked(answer) as (one, _):
        with pytest.raises(HolderGoneError):
            await WorkerBus(one).call("abcdef", b"")
