"""What the operator sets for the hub; ``service`` makes it from the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pgrealtime.config.model import CollectionLoginConfig, HiddenFieldsMode, RealtimeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSettings:
    """Settings of the hub; a reload replaces ``logins`` and ``allows_guests`` only.

    Attributes:
        limits: Timeouts, buffers and numbers of connections.
        logins: By collection name, the columns that make a caller of a row.
        allows_guests: Whether a connection keeps its topics when its caller becomes a guest.
        nulls: How NULL is shown in records.
        hidden_fields: Who may expand a hidden relation.
        epoch: Of the stream's positions before the stream has started.
        can_resume: Whether submitted positions are accepted.
        max_concurrent_catch_ups: Connections that are served from the changelog at the same time,
            and half as many isolated ones. The rest of the query pool is for the dispatcher.
    """

    limits: RealtimeConfig = field(default_factory=RealtimeConfig)
    logins: Mapping[str, CollectionLoginConfig] = field(default_factory=dict)
    allows_guests: bool = True
    nulls: Literal["null", "zero"] = "null"
    hidden_fields: HiddenFieldsMode = "strict"
    epoch: str = "000000"
    can_resume: bool = True
    max_concurrent_catch_ups: int = 16
