"""Every recording of PocketBase, replayed against the real PocketBase and against pgrealtime."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from _pytest.mark import ParameterSet

from tests.conformance.fixtures import Fixtures, load_fixtures
from tests.conformance.natural_schema import Style
from tests.conformance.pgrealtime_server import Setting, running, touched
from tests.conformance.pocketbase_server import PocketBaseTemplate
from tests.conformance.replay import MismatchError, Replay
from tests.conformance.transcript import Conversation, load_conversation

OWN_RECORDINGS = Path(__file__).parent.parent / "transcripts"

MORE = Path(__file__).parent / "more_transcripts"
"""Conversations written by hand for what no recording shows.

PocketBase is tested against them here.
"""

OTHER = os.environ.get("PGREALTIME_TRANSCRIPTS")
"""Another folder to replay instead; without a fixtures.json it builds on the one here."""

FOLDERS = [Path(OTHER)] if OTHER else [OWN_RECORDINGS, MORE]

FIXTURES_FILE = "fixtures.json"


def _fixtures() -> Fixtures:
    given = FOLDERS[0] / FIXTURES_FILE
    return load_fixtures(given if given.exists() else OWN_RECORDINGS / FIXTURES_FILE)


def _conversations() -> list[Conversation]:
    paths = sorted(path for folder in FOLDERS for path in folder.glob("*.json"))
    return [load_conversation(path) for path in paths if path.name != FIXTURES_FILE]


SLOW = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        os.environ.get("PGREALTIME_SLOW") != "1",
        reason="waits out PocketBase's fixed limits, minutes of them: PGREALTIME_SLOW=1",
    ),
]


def _for_pocketbase(conversation: Conversation) -> ParameterSet:
    marks = SLOW if "slow" in conversation.tags else []
    return pytest.param(conversation, id=conversation.name, marks=marks)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def template(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[PocketBaseTemplate]:
    yield await PocketBaseTemplate.build(_fixtures(), tmp_path_factory.mktemp("pocketbase"))


@pytest.mark.parametrize("conversation", [_for_pocketbase(c) for c in _conversations()])
async def test_pocketbase_itself_answers_as_recorded(
    conversation: Conversation, template: PocketBaseTemplate, tmp_path: Path
) -> None:
    """The harness is correct: PocketBase itself passes what it requires of pgrealtime."""
    async with template.running(tmp_path / "run") as server:
        await Replay(conversation, _fixtures().accounts, server).run()


# -- pgrealtime

TIME_SCALE = 1 / 50
"""Of the slow recordings: PocketBase's five minutes become six seconds."""

STYLE = Style(empty="null", json_type="json")
"""An existing database has NULLs, and PocketBase keeps the text of JSON as it was written."""

OWN_TOKENS = re.compile(r'/auth-(with-password|refresh)|"password')
"""Recordings that need tokens of pgrealtime's own login.

They use the login endpoints, or change a password, which invalidates no tokens of other issuers.
"""


@pytest.mark.parametrize("conversation", _conversations(), ids=lambda one: one.name)
async def test_pgrealtime_answers_as_pocketbase_did(
    conversation: Conversation, database_url: str, tmp_path: Path
) -> None:
    """A client can't distinguish it from PocketBase."""
    await _replay(conversation, database_url, tmp_path)


ABOUT_CALLS = (
    "authorization_switching",
    "ip_mismatch",
    "subscribe_unknown_client",
)


@pytest.mark.parametrize(
    "conversation",
    [
        pytest.param(c, id=c.name)
        for c in _conversations()
        if c.name in ABOUT_CALLS or os.environ.get("PGREALTIME_SLOW") == "1"
    ],
)
async def test_two_processes_answer_as_pocketbase_did(
    conversation: Conversation, database_url: str, tmp_path: Path
) -> None:
    """Every call arrives at the process that doesn't have the connection."""
    await _replay(conversation, database_url, tmp_path, calls_elsewhere=True)


OVER_WORKERS = ("authorization_switching", "two_streams_one_user")


@pytest.mark.parametrize(
    "conversation",
    [
        pytest.param(c, id=c.name)
        for c in _conversations()
        if c.name in OVER_WORKERS or os.environ.get("PGREALTIME_SLOW") == "1"
    ],
)
async def test_two_workers_answer_as_pocketbase_did(
    conversation: Conversation,
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calls, logins and streams are at either worker, as the kernel distributes connections."""
    monkeypatch.setenv("PGREALTIME_SERVER__WORKERS", "2")
    await _replay(conversation, database_url, tmp_path)


async def _replay(
    conversation: Conversation,
    database_url: str,
    directory: Path,
    *,
    calls_elsewhere: bool = False,
) -> None:
    scale = TIME_SCALE if "slow" in conversation.tags else 1.0
    fixtures = _fixtures()
    text = msgspec.json.encode(conversation).decode()
    async with running(
        fixtures,
        touched(text, fixtures),
        database_url=database_url,
        directory=directory,
        style=STYLE,
        setting=Setting(
            time_scale=scale,
            login_through_api=OWN_TOKENS.search(text) is not None,
            calls_elsewhere=calls_elsewhere,
        ),
    ) as server:
        try:
            await Replay(conversation, fixtures.accounts, server, time_scale=scale).run()
        except MismatchError as error:
            error.add_note(f"pgrealtime printed:\n{server.output}")
            raise
