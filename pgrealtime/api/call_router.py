"""Carries out a subscribe call, or has the process do it that holds the connection.

``api.realtime`` submits the calls that come by HTTP, the bus hands over those of other processes.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress

import structlog

from pgrealtime.api.error_responses import INTERNAL_ERROR, error_response_of
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.auth.principal import Guest
from pgrealtime.bus.base import Bus, tag_of
from pgrealtime.bus.calls import CallAnswer, ReachedLimit, SubscribeCall, decode, encode
from pgrealtime.errors import (
    BusError,
    HolderGoneError,
    PgRealtimeError,
    SubscriptionError,
    SubscriptionLimitError,
)
from pgrealtime.hub.hub import Hub

log = structlog.get_logger(__name__)


class CallRouter:
    """Carries out the calls of its own connections, and passes the others on."""

    def __init__(self, hub: Hub, authenticator: Authenticator, bus: Bus) -> None:
        self._hub = hub
        self._authenticator = authenticator
        self._bus = bus
        self._forwarded: Counter[str] = Counter()
        self._silent_tags: set[str] = set()
        """Processes of which the log says already that they don't answer."""
        bus.serve(self.answer)

    @property
    def forwarded_by_result(self) -> Mapping[str, int]:
        """Numbers of calls that were passed on: ``ok``, or the error's code."""
        return self._forwarded

    @property
    def ignored_by_reason(self) -> Mapping[str, int]:
        """Numbers of messages of the bus that were ignored, by the error's code."""
        return self._bus.ignored

    async def submit(self, call: SubscribeCall) -> str:
        """Have the call carried out; return the outcome, empty unless the call wants it.

        Raises:
            PgRealtimeError: As ``Authenticator.authenticate_subscriber`` and ``Hub.subscribe`` do,
                here or at the holder; ``HolderSilentError`` if that doesn't answer.
        """
        tag = tag_of(call.client_id)
        if tag is not None and tag != self._bus.tag:
            with suppress(HolderGoneError):
                return await self._pass_on(tag, call)
        # An id that no other process holds is treated as any unknown one.
        return await self._carry_out(call)

    async def _carry_out(self, call: SubscribeCall) -> str:
        caller = await self._authenticator.authenticate_subscriber(call.authorization)
        await self._hub.subscribe(call.client_id, call.topic_texts, caller, call.address)
        if not call.wants_outcome:
            return ""
        unmatchable = self._hub.unmatchable_topics(call.client_id)
        indexes = [str(n) for n, name in enumerate(call.topic_texts) if name in unmatchable]
        kind = "guest" if isinstance(caller.principal, Guest) else "known"
        return f"caller={kind}; mute={','.join(indexes)}"

    async def _pass_on(self, tag: str, call: SubscribeCall) -> str:
        try:
            answer = decode(await self._bus.call(tag, encode(call)), CallAnswer)
        except BusError as error:
            self._forwarded[error.error_code] += 1
            if isinstance(error, HolderGoneError):
                self._silent_tags.discard(tag)
            elif tag not in self._silent_tags:
                self._silent_tags.add(tag)
                code, reason = error.error_code, error.message
                log.warning("call.unanswered", code=code, holder=tag, reason=reason)
            raise
        self._silent_tags.discard(tag)
        self._forwarded[answer.error_code or "ok"] += 1
        if (limit := answer.limit) is not None:
            raise SubscriptionLimitError(
                "the holder refused a topic",
                topic=call.topic_texts[limit.topic_index],
                limit_name=limit.limit_name,
                maximum=limit.maximum,
            )
        if answer.error_code:
            raise SubscriptionError("the holder refused the call", code=answer.error_code)
        return answer.outcome

    async def answer(self, request: bytes) -> bytes:
        """Carry out a call that another process passed on; return the answer to it."""
        return encode(await self._answer(request))

    async def _answer(self, request: bytes) -> CallAnswer:
        try:
            call = decode(request, SubscribeCall)
            return CallAnswer(outcome=await self._carry_out(call))
        except SubscriptionLimitError as error:
            index = call.topic_texts.index(error.topic)
            limit = ReachedLimit(index, error.limit_name, error.maximum)
            return CallAnswer(error_code=error.error_code, limit=limit)
        except PgRealtimeError as error:
            if error_response_of(error) is INTERNAL_ERROR:
                log.error("call.failed", error=error)  # noqa: TRY400 (expected kind, known code)
            return CallAnswer(error_code=error.error_code)
        except Exception:
            # A defect of this program: the caller gets an answer all the same.
            log.exception("call.failed")
            return CallAnswer(error_code=PgRealtimeError.code)
