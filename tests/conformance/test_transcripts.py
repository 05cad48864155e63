"""Every recording of PocketBase, replayed against the real PocketBase and against pgrealtime."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from _pytest.mark import ParameterSet

from tests.conformance.fixtures import Fixtures, load_fixtures
from tests.conformance.pocketbase_server import PocketBaseTemplate
from tests.conformance.replay import Replay
from tests.conformance.transcript import Conversation, load_conversation

OWN_RECORDINGS = Path(__file__).parent.parent / "transcripts"

RECORDINGS = Path(os.environ.get("PGREALTIME_TRANSCRIPTS") or OWN_RECORDINGS)
"""Another folder of recordings may be replayed; without a fixtures.json it builds on ours."""

FIXTURES_FILE = "fixtures.json"


def _fixtures() -> Fixtures:
    own = RECORDINGS / FIXTURES_FILE
    return load_fixtures(own if own.exists() else OWN_RECORDINGS / FIXTURES_FILE)


def _conversations() -> list[Conversation]:
    paths = sorted(path for path in RECORDINGS.glob("*.json") if path.name != FIXTURES_FILE)
    return [load_conversation(path) for path in paths]


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


@pytest.mark.parametrize("conversation", map(_for_pocketbase, _conversations()))
async def test_pocketbase_itself_answers_as_recorded(
    conversation: Conversation, template: PocketBaseTemplate, tmp_path: Path
) -> None:
    """The harness is right: what it demands of pgrealtime, the original fulfils."""
    async with template.running(tmp_path / "run") as server:
        await Replay(conversation, _fixtures().accounts, server).run()
