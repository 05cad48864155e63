"""What a rule may ask of the subscriber: ``@request.*``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pgrealtime.auth.principal import GUEST, Principal


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleRequest:
    """One subscription's ``@request``. Query and header values come from the topic's options."""

    principal: Principal = GUEST
    query: Mapping[str, str] = field(default_factory=dict)
    """``filter``, ``expand`` and ``fields`` included, as PocketBase has it."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Names already in snake case."""
    context: str = "realtime"
    method: str = "GET"
