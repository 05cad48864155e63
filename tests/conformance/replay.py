"""Replays one recorded conversation against a target and compares what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import NoReturn, assert_never

from tests.conformance.compare import (
    are_messages_as_expected,
    expand,
    is_json_as_expected,
    is_text_as_expected,
)
from tests.conformance.fixtures import Account
from tests.conformance.http_client import (
    Answer,
    End,
    EventStream,
    Head,
    ProtocolError,
    Request,
    send,
    send_and_hold,
)
from tests.conformance.target import RefusedError, Target
from tests.conformance.transcript import (
    AlterCollection,
    Conversation,
    DropCollection,
    Exchange,
    Expect,
    ExpectClosed,
    ExpectSilence,
    Login,
    RecordedAnswer,
    RecordedRequest,
    ResetTokenSecret,
    RestartServer,
    SseClose,
    SseOpen,
    Step,
    Transaction,
    Wait,
    Write,
)

ANSWER_SECONDS = 10.0
"""How long an answer or an expected message may take; the recordings say nothing about speed."""

HELD_SECONDS = 0.35
"""How long nothing must follow the head of a held answer; the silence of most recordings."""

CLOCK_SLACK_SECONDS = 1.0
"""Granted on top of a scaled upper bound: a busy machine doesn't scale."""


class MismatchError(AssertionError):
    """The target deviated from the recording."""


class Replay:
    """One run of one conversation."""

    def __init__(
        self,
        conversation: Conversation,
        accounts: Mapping[str, Account],
        target: Target,
        *,
        time_scale: float = 1.0,
    ) -> None:
        """Prepare a run.

        Args:
            conversation: The recording.
            accounts: The accounts that can log in, by short name.
            target: A server with the fixtures freshly loaded.
            time_scale: Factor on every waiting time, for a target whose limits are scaled alike.
        """
        self._conversation = conversation
        self._accounts = accounts
        self._target = target
        self._time_scale = time_scale
        self._streams: dict[str, EventStream] = {}
        self._variables: dict[str, str] = {}

    async def run(self) -> None:
        """Do all steps.

        Raises:
            MismatchError: With the step's number and what was expected and seen.
            UnsupportedStepError: The target has no way to do a step.
        """
        try:
            for number, step in enumerate(self._conversation.steps, start=1):
                try:
                    await self._do(step)
                except (MismatchError, RefusedError, ProtocolError, OSError) as error:
                    self._fail(number, step, error)
        finally:
            for stream in self._streams.values():
                await stream.close()

    def _fail(self, number: int, step: Step, error: Exception) -> NoReturn:
        kind = type(step).__name__
        note = f" ({step.note})" if step.note else ""
        reason = str(error) or type(error).__name__
        raise MismatchError(
            f"{self._conversation.name}, step {number}, {kind}{note}: {reason}"
        ) from error

    async def _do(self, step: Step) -> None:
        match step:
            case Login(account=name, variable=variable, lifetime_s=lifetime):
                token = await self._target.login(self._accounts[name], lifetime)
                self._variables[variable] = token
            case SseOpen():
                await self._open(step)
            case SseClose(conn=conn):
                await self._streams.pop(conn).close()
            case Exchange():
                await self._exchange(step)
            case Expect():
                await self._expect(step)
            case ExpectSilence(conn=conn, ms=ms):
                await self._expect_silence(self._streams[conn], self._seconds(ms))
            case ExpectClosed():
                await self._expect_closed(step)
            case Wait(ms=ms):
                await asyncio.sleep(self._seconds(ms))
            case _:
                await self._change(step)

    async def _change(
        self,
        step: Write
        | Transaction
        | AlterCollection
        | DropCollection
        | ResetTokenSecret
        | RestartServer,
    ) -> None:
        match step:
            case Write():
                await self._target.write(step)
            case Transaction(writes=writes, commit=commit):
                await self._target.transaction(writes, commit=commit)
            case AlterCollection(collection=name, patch=patch):
                await self._target.alter_collection(name, patch)
            case DropCollection(collection=name):
                await self._target.drop_collection(name)
            case ResetTokenSecret(collection=name):
                await self._target.reset_token_secret(name)
            case RestartServer():
                await self._target.restart()
            case _:
                assert_never(step)

    def _seconds(self, milliseconds: float) -> float:
        return milliseconds / 1000 * self._time_scale

    def _request(self, recorded: RecordedRequest) -> Request:
        return Request(
            method=recorded.method,
            path=expand(recorded.path, self._variables),
            headers={k: expand(v, self._variables) for k, v in recorded.headers.items()},
            body=expand(recorded.body, self._variables).encode("utf-8"),
            source_ip=recorded.source_ip,
        )

    async def _open(self, step: SseOpen) -> None:
        async with asyncio.timeout(ANSWER_SECONDS):
            stream = await EventStream.open(
                self._request(step.request), self._target.address, step.conn
            )
        self._streams[step.conn] = stream
        self._compare_head(step.response, stream.head)
        for first in await stream.wait_messages(1, ANSWER_SECONDS):
            line = first.split(b"\n")[0].decode("utf-8")
            self._variables[f"{step.conn}.clientId"] = line.removeprefix("id:")

    async def _exchange(self, step: Exchange) -> None:
        request = self._request(step.request)
        async with asyncio.timeout(ANSWER_SECONDS):
            if step.request.held:
                answer = await send_and_hold(
                    request, self._target.address, quiet_seconds=HELD_SECONDS
                )
            else:
                answer = await send(
                    request, self._target.address, complete=not step.request.incomplete
                )
        self._compare_head(step.response, answer.head)
        self._compare_body(step.response, answer)

    def _compare_head(self, expected: RecordedAnswer, head: Head) -> None:
        if head.status != expected.status:
            raise MismatchError(f"status {head.status}, recorded {expected.status}")
        for name, value in expected.headers.items():
            found = head.header(name)
            if found is None or not is_text_as_expected(
                value, found.encode("latin-1"), self._variables
            ):
                raise MismatchError(f"header {name}: {found!r}, recorded {value!r}")

    def _compare_body(self, expected: RecordedAnswer, answer: Answer) -> None:
        if answer.surplus:
            raise MismatchError(f"bytes after the answer: {answer.surplus!r}")
        if expected.body is None:
            return
        compare = is_json_as_expected if expected.match == "json" else is_text_as_expected
        if not compare(expected.body, answer.body, self._variables):
            raise MismatchError(f"body {answer.body!r}, recorded {expected.body!r}")

    async def _expect(self, step: Expect) -> None:
        stream = self._streams[step.conn]
        messages = await stream.take(len(step.messages), ANSWER_SECONDS)
        if not are_messages_as_expected(
            step.messages, messages, self._variables, how=step.match, order=step.order
        ):
            raise MismatchError(
                f"conn {step.conn}\n  received: {messages!r}\n  recorded: {step.messages!r}\n"
                f"  with: {self._variables!r}; after that: {stream.rest!r}, end: {stream.end}"
            )

    async def _expect_silence(self, stream: EventStream, seconds: float) -> None:
        if await stream.wait_noise(seconds):
            raise MismatchError(
                f"received: {stream.waiting!r}, {stream.rest!r}; end: {stream.end};"
                " recorded: nothing"
            )

    async def _expect_closed(self, step: ExpectClosed) -> None:
        stream = self._streams[step.conn]
        earliest, latest = (self._seconds(ms) for ms in step.after_ms)
        slack = 0.0 if self._time_scale == 1.0 else CLOCK_SLACK_SECONDS
        clock = asyncio.get_running_loop().time
        start = clock()
        end = await stream.wait_end(latest + slack)
        elapsed = clock() - start
        if end is None:
            raise MismatchError(f"conn {step.conn} still open after {elapsed:.3f} s")
        if elapsed < earliest:
            raise MismatchError(f"conn {step.conn} ended after {elapsed:.3f} s, too early")
        if end is not End(step.how):
            raise MismatchError(f"conn {step.conn}: {end.value}, recorded: {step.how}")
        if stream.waiting or stream.rest:
            raise MismatchError(f"before the end: {stream.waiting!r}, {stream.rest!r}")
