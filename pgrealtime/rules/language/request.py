"""What a rule can read of the caller's request: ``@request.*``."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pgrealtime.auth.principal import GUEST, Principal


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleRequest:
    """The ``@request`` of one subscription, or of one read.

    Query and headers of a subscription are those of its topic's options.
    """

    principal: Principal = GUEST
    query: Mapping[str, str] = field(default_factory=dict)
    """``filter``, ``expand`` and ``fields`` included, as PocketBase has it."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Names in snake case."""
    context: str = "realtime"
    method: str = "GET"
    body: Mapping[str, str | float | None] | None = None
    """Members of a read's body, containers as JSON; None if it has none."""
