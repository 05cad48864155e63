"""The operations on a server under test that the harness needs, besides HTTP requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tests.conformance.fixtures import Account
from tests.conformance.http_client import Address
from tests.conformance.transcript import Write


class UnsupportedStepError(Exception):
    """The target has no way to do this; its message says why."""


class RefusedError(Exception):
    """The target refused a call the harness made to change it or to log in."""


class Target(Protocol):
    """A running server with the data of the fixtures, and the operations that change them."""

    @property
    def address(self) -> Address:
        """Where the server listens."""
        ...

    async def login(self, account: Account, lifetime_seconds: float | None) -> str:
        """Return a new valid token of the account."""
        ...

    async def write(self, write: Write) -> None:
        """Commit one change; return when it is committed."""
        ...

    async def transaction(self, writes: Sequence[Write], *, commit: bool) -> None:
        """Make several changes in one transaction, which is rolled back unless ``commit``."""
        ...

    async def alter_collection(self, name: str, patch: Mapping[str, Any]) -> None:
        """Change members of a collection's definition; return when they are in force."""
        ...

    async def drop_collection(self, name: str) -> None:
        """Remove a collection."""
        ...

    async def reset_token_secret(self, name: str) -> None:
        """Replace the secret that the collection's tokens are signed with."""
        ...

    async def restart(self) -> None:
        """Stop in an orderly way and start again on the same data and address."""
        ...
