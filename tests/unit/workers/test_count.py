"""How many workers there are, and what each gets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import pytest
import yaml
from structlog.testing import capture_logs

from pgrealtime.config.model import AdminConfig, Config
from pgrealtime.errors import SetupError
from pgrealtime.workers.count import count_workers, warn_of_few_cores, worker_config
from tests.config_values import parse_config


@pytest.mark.parametrize(
    ("workers", "pool_size", "cores", "count"),
    [
        (1, 1, 8, 1),
        (4, 8, 2, 4),
        ("auto", 8, 1, 1),
        ("auto", 8, 3, 3),
        ("auto", 8, 64, 4),
        ("auto", 1, 64, 1),
    ],
)
def test_workers_by_cores_and_connections(
    workers: int | Literal["auto"],
    pool_size: int,
    cores: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    config = parse_config({"server": {"workers": workers}, "database": {"pool_size": pool_size}})
    assert count_workers(config) == count


def test_more_workers_than_connections_are_an_error() -> None:
    config = parse_config({"server": {"workers": 5}})
    with pytest.raises(SetupError) as caught:
        count_workers(config)
    assert caught.value.error_code == "workers_exceed_connections"
    assert "database.pool_size to 10, or server.workers to 4" in caught.value.hint


def test_more_workers_than_cores_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    with capture_logs() as logged:
        warn_of_few_cores(2)
        warn_of_few_cores(3)
    assert [(one["event"], one["workers"], one["cores"]) for one in logged] == [
        ("workers.exceed_cores", 3, 2)
    ]


def test_pools_are_divided_and_the_rest_is_each_one_s() -> None:
    config = parse_config({"server": {"workers": 3}, "admin": {"port": 8091}})
    own = worker_config(config, 3)
    assert (own.database.pool_size, own.reads.pool_size, own.server.workers) == (2, 1, 1)
    assert own.admin == AdminConfig()
    assert own.realtime == config.realtime


@pytest.mark.parametrize("name", ["pgrealtime", "demo"])
def test_a_configuration_arrives_as_it_was(name: str) -> None:
    """Workers receive it as JSON: durations, networks and secrets included."""
    text = (Path(__file__).parents[3] / "config" / f"{name}.yaml").read_text()
    environ = {
        **dict.fromkeys(
            ("APP_JWT_SECRET", "LOGIN_SECRET", "CLUSTER_SECRET", "DEMO_SECRET"), "s" * 32
        ),
        "DATABASE_URL": "postgresql://u:p@127.0.0.1/app",
    }
    config = parse_config(yaml.safe_load(text), environ)
    networks = {"trusted_proxies": ["10.0.0.0/8", "fd00::/8"], "shutdown_grace": "500ms"}
    server = config.server.model_validate(networks)
    config = config.model_copy(update={"server": server})
    assert Config.model_validate_json(config.model_dump_json()) == config
