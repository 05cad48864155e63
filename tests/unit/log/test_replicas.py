"""Who is there decides which replicas try first to take the log over."""

from __future__ import annotations

from pgrealtime.log.beat import GONE_SECONDS, Presence
from pgrealtime.log.replicas import Replicas
from pgrealtime.lsn import LSN


def presence(tag: str, connections: int = 0) -> Presence:
    return Presence(tag=tag, program="1", digest="d", connections=connections, head_lsn=LSN(1))


def test_a_replica_counts_those_before_it_that_are_there() -> None:
    replicas = Replicas()
    for tag in ("dddddd", "aaaaaa", "cccccc", "AAAAAA"):
        replicas.hear(presence(tag), 10.0)
    replicas.hear(presence("bbbbbb"), 11.0)
    assert [replicas.rank(tag, 11.0) for tag in ("AAAAAA", "cccccc", "dddddd")] == [0, 3, 4]
    assert replicas.rank("cccccc", 10.0 + GONE_SECONDS) == 1


def test_what_a_replica_said_last_is_what_it_says() -> None:
    replicas = Replicas()
    replicas.hear(presence("aaaaaa", 1), 10.0)
    replicas.hear(presence("aaaaaa", 2), 12.0)
    assert replicas.present(12.0 + GONE_SECONDS - 0.1) == [presence("aaaaaa", 2)]
    assert replicas.present(12.0 + GONE_SECONDS) == []
