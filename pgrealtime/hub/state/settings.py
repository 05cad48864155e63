"""What the operator sets for the hub; ``service`` makes it from the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pgrealtime.config.model import CollectionLoginConfig, HiddenFieldsMode, RealtimeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSettings:
    """Settings of the hub; a reload replaces ``logins`` and ``allows_guests`` only."""

    limits: RealtimeConfig = field(default_factory=RealtimeConfig)
    logins: Mapping[str, CollectionLoginConfig] = field(default_factory=dict)
    """By collection name, the columns that make a caller of a row."""
    allows_guests: bool = True
    """Whether a connection keeps its topics when its caller becomes a guest."""
    nulls: Literal["null", "zero"] = "null"
    hidden_fields: HiddenFieldsMode = "strict"
    epoch: str = "000000"
    """Of positions before the stream has started."""
    can_resume: bool = True
    """Whether submitted positions are accepted."""
    max_concurrent_catch_ups: int = 16
    """Connections that are served from the changelog at the same time, and half as many isolated
    ones. The rest of the query pool is for the dispatcher."""
